"""The bench's machines: engines, an object store, a trainer, a bare reader, each behind a shaped link."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxbench.demo import models
from mxbench.demo.processes import Child, clean_environment
from mxbench.demo.workers import Server, Worker
from mxbench.fleet.fleet import Network

__all__ = ["Fleet", "Script", "started"]

STORE_READY_SECONDS = 60.0
STORE, TRAINER, BARE, ENGINES = range(4)  # places in the network; engines have the last ones
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
OPTIONS = (
    *("--weight-transfer-config", json.dumps({"backend": "mx"})),
    "--no-enable-prefix-caching",  # an answer is the same whatever was asked before
)


class Script:
    """A process that takes commands as JSON lines and answers each by one."""

    def __init__(self, module: str, environment: dict[str, str], log: Path, prefix: Sequence[str]) -> None:
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**clean_environment(), **environment},
                text=True,
                bufsize=1,
            )
        self._log = log

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer. Raises RuntimeError where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"no answer to {command}: {self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """In order; killed where it takes long."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Fleet:
    """`versions` are folders of one model, also in the store at s3://models/NAME; engines begin with the first."""

    network: Network
    versions: Sequence[Path]
    engines: Sequence[Worker]
    trainer: Script
    bare: Script

    @property
    def urls(self) -> list[str]:
        """The engines' APIs."""
        return [f"http://{engine.host}:{engine.port}" for engine in self.engines]

    @property
    def model_bytes(self) -> int:
        """Of the weight files of one version."""
        return sum(file.stat().st_size for file in models.weight_files(self.versions[0]))

    def bytes_from_store(self) -> int:
        """What came over the store's link so far, headers included."""
        link = f"{self.network.tag}v{STORE}"
        return int(Path(f"/sys/class/net/{link}/statistics/rx_bytes").read_text())


def started(stack: ExitStack, folder: Path, count: int, layers: int, megabits: float) -> Fleet:
    """All of it, ready. Ends with `stack`. Raises DemoError, FleetError."""
    bucket = folder / "s3" / "models"
    shape = {**SHAPE, "num_hidden_layers": layers}
    versions = [
        models.generate(bucket / f"v{seed}", "qwen3", shape, seed=seed, shard_size="200MB") for seed in (1, 2, 3)
    ]
    network = stack.enter_context(Network(ENGINES + count, megabits))
    store = _store(stack, bucket.parent, folder, network)
    server = Server(folder, host=network.host)
    stack.callback(server.child.stop)
    address = server.start()
    scripts = []
    for name, place in (("trainer", TRAINER), ("bare", BARE)):
        settings = {
            "MODEL_EXPRESS_URL": address,
            "MX_WORKER_HOST": network.address(place),
            "MX_TRANSPORT": "tcp",
        }
        scripts.append(
            Script("mxbench.update.publisher", settings, folder / "logs" / f"{name}.log", network.prefix(place))
        )
        stack.callback(scripts[-1].end)
    engines = []
    for number in range(count):
        engine = Worker(
            f"engine-{number}",
            versions[0],
            folder,
            load_format="mx",
            pooling=False,
            server=address,
            host=network.address(ENGINES + number),
            prefix=network.prefix(ENGINES + number),
            options=OPTIONS,
            settings={**store, "MX_TRANSPORT": "tcp", "VLLM_PLUGINS": "modelexpress_mx,mx_update"},
        )
        stack.callback(engine.child.stop)
        engines.append(engine)
    for engine in engines:
        engine.start()
    return Fleet(network, versions, engines, *scripts)


def _store(stack: ExitStack, root: Path, folder: Path, network: Network) -> dict[str, str]:
    """Starts a real S3 server; returns the environment of its clients."""
    from mxbench.stand_ins.s3_server import environment

    command = ["-m", "mxbench.stand_ins.s3_server", str(root), network.address(STORE)]
    child = Child("S3 server", command, {}, folder / "logs" / "store.log", network.prefix(STORE))
    stack.callback(child.stop)
    child.wait_until(lambda: child.log.read_text().endswith("\n"), STORE_READY_SECONDS)
    return environment(child.log.read_text().split()[-1])
