"""A worker in a process of its own, told what to do by lines of JSON on stdin; answers by lines on stdout."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from typing import Any

from mxcore import metrics
from mxcore.errors import MxError, NixlMissing
from mxcore.nixl import NIXL_PACKAGES, load_library
from mxcore.nixl.agent import live_agents
from mxcore.settings import load_settings
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.move import Source
from mxserver.wire.proto import load_pb2
from tests.self_checks import end_self_checks
from tests.transfer.fleet_member import PATIENT_SECONDS
from tests.transfer.memory import HostTensors, identity, model_specs


def answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


class Worker:
    def __init__(self, task: dict[str, Any]) -> None:
        self.tensors = HostTensors(model_specs(task.get("megabytes", 4), task.get("prefix", "")), task.get("seed"))
        self.layout, self.placement = build_layout(task.get("kind", "raw"), self.tensors.local_tensors())
        self.membership = Membership(
            load_settings(
                {"MX_WORKER_GRPC_PORT": 0, "MX_STALL_TIMEOUT_SECS": PATIENT_SECONDS, **task.get("settings", {})}
            ),
            identity(task.get("checkpoint", "c0ffee")),
            task.get("rank", 0),
            "cpu",
            chunk_bytes=task.get("chunk_bytes", 65536),
            lease_seconds=task.get("lease_seconds", 15.0),
        )

    def serve(self, scalars: dict[str, float]) -> None:
        self.membership.serve(self.layout, self.placement, scalars, keep_alive=self.tensors)
        answer(
            endpoint=self.membership.endpoint,
            source_id=self.membership.source_id,
            worker_id=self.membership.worker_id,
        )

    def receive(self, sources: list[dict[str, Any]], pause_after_bytes: int | None) -> None:
        paused = False

        def progress(done: int, total: int) -> None:
            nonlocal paused
            if pause_after_bytes is not None and done >= pause_after_bytes and not paused:
                paused = True
                answer(paused_at=done, total=total)
                sys.stdin.readline()

        try:
            found = [Source(**source) for source in sources] or self.membership.find_sources()
            report = self.membership.receive(self.layout, self.placement, {}, found, progress)
        except MxError as error:
            answer(error=type(error).__name__, message=str(error))
            return
        expected = HostTensors(self.tensors.specs, 7)
        answer(
            operation=report.operation,
            transport=report.transport,
            equal=self.tensors.equal_bytes(expected),
            agents=live_agents(),
            bytes_from=report.bytes_from,
            bytes_again=report.bytes_again,
            failures=list(report.failures),
        )

    def load(self, some_bytes: int, total_bytes: int) -> None:
        """As if from storage: a part, and after a line the rest."""
        with self.membership.loads.loading(load_pb2.LOAD_PATH_STORAGE) as way:
            way(some_bytes, total_bytes)
            answer(told=some_bytes)
            sys.stdin.readline()
            way(total_bytes, total_bytes)
        answer(told=total_bytes)

    def run(self, line: dict[str, Any]) -> bool:
        match line["do"]:
            case "join":
                answer(joined=self.membership.join())
            case "load":
                self.load(line["bytes"], line["total"])
            case "serve":
                self.serve(line.get("scalars", {}))
            case "receive":
                self.receive(line.get("sources", []), line.get("pause_after_bytes"))
            case "flip":
                self.tensors.storages[line["storage"]][line["offset"]] ^= 1
                answer(flipped=True)
            case "nixl":
                answer(found=nixl_is_found(), agents=live_agents())
            case "cpu":
                answer(process_seconds=time.process_time(), wall_seconds=time.monotonic())
            case "drain":
                answer(drained=self.membership.drain(line["timeout_seconds"]))
            case "close":
                self.membership.close()
                answer(agents=live_agents())
                return False
        return True


def nixl_is_found() -> bool:
    try:
        load_library()
    except NixlMissing:
        return False
    return True


def main() -> None:
    sys.stdout = os.fdopen(os.dup(1), "w")  # UCX and NIXL log to file 1, which becomes stderr; answers go here
    os.dup2(2, 1)
    faulthandler.register(signal.SIGUSR1)  # a test that gets no answer asks where all threads are
    task = json.loads(sys.argv[1])
    if task.get("without_nixl"):
        sys.modules.update(dict.fromkeys(NIXL_PACKAGES))  # as if not installed
    if task.get("without_self_check"):  # else it may be the first to notice a flipped byte, and withdraw
        end_self_checks()
    if port := task.get("metrics_port"):
        metrics.start(port, linger_seconds=0.0)
    worker = Worker(task)
    for line in sys.stdin:
        if not worker.run(json.loads(line)):
            return
    worker.membership.close()


if __name__ == "__main__":
    main()
