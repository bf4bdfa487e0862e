"""Renders deploy/kubernetes out of the chart, for those who have no Helm: python tools/render_manifests.py

tests/deploy holds the files to what this makes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "modelexpress"
VALUES = ROOT / "deploy" / "helm" / "values"
FOLDER = ROOT / "deploy" / "kubernetes"
# file -> values file, and what stands above it
MANIFESTS = {
    "server.yaml": (None, "One server with its state in SQLite on a volume. Workers reach it as mx-server:8001."),
    "server-redis.yaml": ("redis.yaml", "Two servers over one Redis, whose password is in the Secret mx-server-redis."),
    "server-secured.yaml": ("secured.yaml", "One server with TLS by cert-manager, tokens and service accounts."),
}


def helm() -> Path:
    """The program that tools/get_helm.py put beside this Python."""
    return Path(sys.executable).parent / "helm"


def rendered(*arguments: str, name: str = "mx-server") -> str:
    """What `helm template` makes of the chart, without its test pod. Raises CalledProcessError where it refuses."""
    command = [str(helm()), "template", name, str(CHART), "--skip-tests", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def manifest(file: str) -> str:
    """The text of one file of deploy/kubernetes."""
    values, headline = MANIFESTS[file]
    given = ["-f", str(VALUES / values)] if values else []
    text = "".join(
        f"{line}\n" for line in rendered(*given).splitlines() if not line.startswith("# Source: ") and line.strip()
    )
    where = f"deploy/helm/values/{values}" if values else "the defaults of deploy/helm/modelexpress"
    return (
        f"# {headline}\n# kubectl apply -f deploy/kubernetes/{file}\n"
        f"# Made of {where} by tools/render_manifests.py: change those.\n{text}"
    )


def main() -> None:
    for file in MANIFESTS:
        (FOLDER / file).write_text(manifest(file))


if __name__ == "__main__":
    main()
