"""A certificate for the workers of a bench, made by the command `openssl`."""

from __future__ import annotations

import subprocess
from pathlib import Path

NAME = "mx-bench"


def certificates(folder: Path) -> dict[str, str]:
    """Settings of workers with one certificate, which both sides show and trust (mTLS)."""
    cert, key = str(folder / "worker.crt"), str(folder / "worker.key")
    what = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    name = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    subprocess.run(["openssl", "req", *what, *name, "-out", cert, "-keyout", key], check=True, capture_output=True)
    trusted = {"MX_TLS_CA_FILE": cert, "MX_TLS_CLIENT_CA_FILE": cert, "MX_TLS_PEER_NAME": NAME}
    return {"MX_TLS_CERT_FILE": cert, "MX_TLS_KEY_FILE": key, **trusted}
