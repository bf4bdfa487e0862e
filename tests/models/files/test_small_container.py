"""Server, `mx models get` and a worker that reads tensors, each in 512 MiB, with a model of twice that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mxserver.wire.files import ModelClient
from tests.models.conftest import StartServer
from tests.models.memory_group import memory_group

LIMIT_BYTES = 512 * 1024 * 1024
TENSORS, TENSOR_BYTES = 64, 16 * 1024 * 1024
GET = "from mxcore.cli.main import main; main()"
WORKER = """
import sys
from mxcore.storage.remote import ServerFolder, open_remote, stream_remote
from mxserver.wire.files import ModelClient
address, name = sys.argv[1:]
with ModelClient(address) as client:
    folder = ServerFolder(client, name, client.list_files(name))
    found = [name for name, tensor in stream_remote(folder, open_remote(folder)) if not tensor.any()]
    folder.close()
print(len(found), folder.bytes_received)
"""


def sparse_model(folder: Path) -> int:
    """Bytes of its one file, whose tensors are zeros that take no room."""
    folder.mkdir(parents=True)
    entries = {
        f"t{number}": {
            "dtype": "U8",
            "shape": [TENSOR_BYTES],
            "data_offsets": [number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES],
        }
        for number in range(TENSORS)
    }
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + TENSORS * TENSOR_BYTES)
    (folder / "config.json").write_text("{}")
    return 8 + len(header) + TENSORS * TENSOR_BYTES


def test_a_model_of_twice_the_memory(start_server: StartServer, tmp_path: Path) -> None:
    source = tmp_path / "sources" / "model"
    size_bytes = sparse_model(source)
    name = f"file://{source}"

    def ended(*command: str) -> str:
        with memory_group(LIMIT_BYTES) as group:
            run = subprocess.run([*group.launcher, *command], capture_output=True, text=True, check=False)
            assert (run.returncode, group.kills()) == (0, 0), run.stderr
        return run.stdout

    with memory_group(LIMIT_BYTES) as group:
        server = start_server("--file-sources", str(source.parent), launcher=group.launcher)
        try:
            with ModelClient(server.address) as client:
                client.ensure(name)
            ended(
                sys.executable, "-c", GET, "models", "get", name, "--server", server.address, "--to", f"{tmp_path}/to"
            )
            assert (tmp_path / "to" / "model.safetensors").stat().st_size == size_bytes
            count, received_bytes = map(int, ended(sys.executable, "-c", WORKER, server.address, name).split())
            assert (count, received_bytes >= TENSORS * TENSOR_BYTES) == (TENSORS, True)
            assert group.kills() == 0
        finally:
            server.close()
