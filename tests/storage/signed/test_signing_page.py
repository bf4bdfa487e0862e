"""docs/how-to/signing.md: what its commands sign is what a worker takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mxcore.storage.remote import LocalFolder
from mxcore.storage.signed import VerifiedFiles, trusted_manifest
from tests import doc_pages
from tests.transfer.conftest import ROOT


def test_a_model_signed_by_the_pages_commands_is_verified(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"t": np.ones(4)}, model / "model.safetensors")
    done = doc_pages.run(ROOT / "docs" / "how-to" / "signing.md", tmp_path, seconds=100)
    assert done.returncode == 0, done.stdout + done.stderr
    signature = model / "model.sig"
    manifest = trusted_manifest(signature.read_bytes(), str(signature), key=tmp_path / "signer.pub")
    VerifiedFiles(manifest, LocalFolder(model)).check_others()
