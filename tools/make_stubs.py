"""Makes mxserver/wire/proto/*_pb2*.py from the .proto files. Run by `make stubs`; the results are committed.

The generator is old on purpose: stubs of a newer protoc refuse to import under protobuf 5, which vLLM images
still carry (tests/wire/test_protobuf_versions.py holds the range).

The stubs are put into a descriptor pool of our own. With the default pool, importing ours and those of the
PyPI package `modelexpress` in one process would fail: both describe `model_express.p2p.*`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIRE = ROOT / "mxserver" / "wire" / "proto"
GENERATOR = ["grpcio-tools==1.66.2", "mypy-protobuf==3.6.0", "setuptools<81"]


def own_pool(stub: str, text: str) -> str:
    """The stub's text with the wire's own descriptor pool instead of protobuf's default one."""
    text = text.replace(
        "from google.protobuf import descriptor_pool as _descriptor_pool\n",
        "from mxserver.wire.proto import descriptor_pool as _wire_pool\n",
    )
    text, count = re.subn(r"_descriptor_pool\.Default\(\)", "_wire_pool.POOL", text)
    if count != 1:
        sys.exit(f"{stub}: expected one use of the default descriptor pool, found {count}")
    return text


def main() -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in WIRE.glob("*.proto"))
    # Beside the stubs, so that each can be renamed into place: whoever imports meanwhile never sees half of one.
    with tempfile.TemporaryDirectory(dir=ROOT / "build" if (ROOT / "build").is_dir() else ROOT) as scratch:
        environment = Path(scratch) / "venv"
        made = Path(scratch) / "made"
        made.mkdir()
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", *GENERATOR], check=True)
        outputs = [f"--{kind}_out={made}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        subprocess.run(
            [python, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos],
            check=True,
            cwd=ROOT,
            env={"PATH": f"{environment / 'bin'}:/usr/bin:/bin"},
        )
        for stub in sorted((made / "mxserver" / "wire" / "proto").iterdir()):
            if (
                "_pb2_grpc" in stub.name
                and "service " not in (WIRE / f"{stub.name.split('_pb2')[0]}.proto").read_text()
            ):
                continue
            if stub.name.endswith("_pb2.py"):
                stub.write_text(own_pool(stub.name, stub.read_text()))
            stub.rename(WIRE / stub.name)


if __name__ == "__main__":
    main()
