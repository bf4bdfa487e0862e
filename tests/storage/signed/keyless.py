"""A Sigstore to test with: an authority for short-lived certificates, its log, and the transparency log of signatures.

It makes of a signature by a key a keyless one: the real library has signed the model, and gets a certificate for that
key, that says whose it is, and an entry in the log. After RFC 6962, Fulcio's and Rekor's documents.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
TIMESTAMPS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
MINUTE = datetime.timedelta(minutes=1)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class _SigningKey:
    """A key of a log, named by its digest."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.public = self.private.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.id = hashlib.sha256(self.public).digest()

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data, ec.ECDSA(hashes.SHA256()))

    def as_log(self, url: str, start: str) -> dict[str, Any]:
        key = {"rawBytes": b64(self.public), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": {"start": start}}
        return {"baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": key, "logId": {"keyId": b64(self.id)}}


class OwnSigstore:
    """`trust` is written to a file for whoever verifies. Nothing of it is a server."""

    def __init__(self) -> None:
        self.now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        self.certificate_log, self.signature_log = _SigningKey(), _SigningKey()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        builder = self._builder(self._name, self._key.public_key(), datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.authority = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True).sign(
            self._key, hashes.SHA256()
        )

    def trust(self, file: Path, *, whole: bool = False) -> Path:
        """Writes the trusted root; `whole` is a client's trust configuration around it."""
        start = (self.now - datetime.timedelta(days=1)).isoformat().replace("+00:00", "Z")
        root: dict[str, Any] = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [self.signature_log.as_log("https://log.invalid", start)],
            "certificateAuthorities": [
                {
                    "subject": {"organization": "tests", "commonName": "authority"},
                    "uri": "https://authority.invalid",
                    "certChain": {"certificates": [{"rawBytes": b64(_der(self.authority))}]},
                    "validFor": {"start": start},
                }
            ],
            "ctlogs": [self.certificate_log.as_log("https://certificates.invalid", start)],
            "timestampAuthorities": [],
        }
        if whole:
            root = {
                "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                "trustedRoot": root,
                "signingConfig": {"mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json"},
            }
        file.write_text(json.dumps(root))
        return file

    def certify(self, signature: Path, key: ec.EllipticCurvePublicKey, identity: str, issuer: str) -> None:
        """Makes of a signature by that key one of an identity, in its file."""
        bundle = json.loads(signature.read_text())
        certificate = self._certificate(key, identity, issuer)
        envelope = bundle["dsseEnvelope"]
        [signed] = envelope["signatures"]
        envelope["signatures"] = [{"sig": signed["sig"]}]
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _sha256(json.dumps(envelope).encode()),
                "payloadHash": _sha256(base64.b64decode(envelope["payload"])),
                "signatures": [
                    {
                        "signature": signed["sig"],
                        "verifier": b64(certificate.public_bytes(serialization.Encoding.PEM)),
                    }
                ],
            },
        }
        bundle["verificationMaterial"] = {
            "certificate": {"rawBytes": b64(_der(certificate))},
            "tlogEntries": [self._entry(_canonical(body))],
        }
        signature.write_text(json.dumps(bundle))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, lasts: datetime.timedelta
    ) -> x509.CertificateBuilder:
        issuing = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - 5 * MINUTE)
            .not_valid_after(self.now + lasts)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(issuing, critical=False)
        )

    def _certificate(self, key: ec.EllipticCurvePublicKey, identity: str, issuer: str) -> x509.Certificate:
        """Of ten minutes, with the promise of the certificates' log."""
        who = x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        builder = (
            self._builder(x509.Name([]), key, 5 * MINUTE)
            .add_extension(x509.SubjectAlternativeName([who]), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.UnrecognizedExtension(ISSUER, issuer.encode()), critical=False)
        )
        before = builder.sign(self._key, hashes.SHA256()).tbs_certificate_bytes
        issuing = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        moment = int(self.now.timestamp()) * 1000
        promised = struct.pack("!BBQH", 0, 0, moment, 1) + hashlib.sha256(issuing).digest()
        promised += len(before).to_bytes(3, "big") + before + struct.pack("!H", 0)
        signature = self.certificate_log.sign(promised)
        promise = struct.pack("!B32sQHBBH", 0, self.certificate_log.id, moment, 0, 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(promise) + 2, len(promise)) + promise
        in_der = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        return builder.add_extension(x509.UnrecognizedExtension(TIMESTAMPS, in_der), critical=False).sign(
            self._key, hashes.SHA256()
        )

    def _entry(self, body: bytes) -> dict[str, Any]:
        """The first entry of a log that has no other one."""
        log, root, moment = self.signature_log, hashlib.sha256(b"\0" + body).digest(), int(self.now.timestamp())
        note = f"log.invalid - 1\n1\n{b64(root)}\n"
        signed = b64(log.id[:4] + log.sign(note.encode()))
        promise = {"body": b64(body), "integratedTime": moment, "logID": log.id.hex(), "logIndex": 0}
        return {
            "logIndex": "0",
            "logId": {"keyId": b64(log.id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(moment),
            "inclusionPromise": {"signedEntryTimestamp": b64(log.sign(_canonical(promise)))},
            "inclusionProof": {
                "logIndex": "0",
                "rootHash": b64(root),
                "treeSize": "1",
                "hashes": [],
                "checkpoint": {"envelope": f"{note}\n\u2014 log.invalid {signed}\n"},
            },
            "canonicalizedBody": b64(body),
        }


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _usage(**uses: bool) -> x509.KeyUsage:
    none = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**{**none, **uses})
