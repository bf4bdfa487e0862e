"""Models signed by the real library with real keys."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from model_signing import hashing, signing


class Key:
    """A key pair in files; `public` is what workers are given."""

    def __init__(self, folder: Path, name: str = "signer") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._private_key = ec.generate_private_key(ec.SECP256R1())
        self._private = folder / f"{name}.private.pem"
        self.public = folder / f"{name}.pub"
        self._private.write_bytes(
            self._private_key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.public_key = self._private_key.public_key()
        self.public.write_bytes(
            self.public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )

    def sign(self, model: Path, algorithm: str = "sha256", shard_bytes: int | None = None) -> Path:
        """Signs all files of a folder; returns the signature, model.sig in it."""
        signature = model / "model.sig"
        signature.unlink(missing_ok=True)
        config = signing.Config().use_elliptic_key_signer(private_key=self._private)
        self._written(config, model, signature, algorithm, shard_bytes)
        return signature

    def sign_by_certificate(self, model: Path, authority: Path) -> Path:
        """As `sign`, by a certificate that is its own authority, which is written to `authority`."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "signer")])
        now = datetime.datetime.now(datetime.UTC)
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._private_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True)
            .sign(self._private_key, hashes.SHA256())
        )
        authority.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        signature = model / "model.sig"
        config = signing.Config().use_certificate_signer(
            private_key=self._private, signing_certificate=authority, certificate_chain=[authority]
        )
        self._written(config, model, signature, "sha256", None)
        return signature

    def _written(
        self, config: signing.Config, model: Path, signature: Path, algorithm: str, shard_bytes: int | None
    ) -> None:
        files = hashing.Config().set_ignored_paths(paths=[signature.name])
        if shard_bytes is None:
            files.use_file_serialization(hashing_algorithm=algorithm)
        else:
            files.use_shard_serialization(hashing_algorithm=algorithm, shard_size=shard_bytes)
        config.set_hashing_config(files).sign(model, signature)
