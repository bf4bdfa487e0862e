"""Models signed with OpenSSF Model Signing: the signature, and the files' bytes in the pass that reads them."""

from __future__ import annotations

from mxcore.storage.signed.manifest import SignedManifest
from mxcore.storage.signed.signature import trusted_manifest
from mxcore.storage.signed.verified_files import VerifiedFiles

__all__ = ["SignedManifest", "VerifiedFiles", "trusted_manifest"]
