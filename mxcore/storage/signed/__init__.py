"""Models signed with OpenSSF Model Signing: the signature, and the files' bytes in the pass that reads them."""

from __future__ import annotations

from mxcore.storage.signed.manifest import SignedManifest
from mxcore.storage.signed.signature import KeylessSigner, trusted_manifest
from mxcore.storage.signed.verified_files import VerifiedFiles

__all__ = ["KeylessSigner", "SignedManifest", "VerifiedFiles", "trusted_manifest"]
