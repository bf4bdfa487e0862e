"""Honest workers beside the hostile ones: what they see of the server is the verdict.

One worker sends a heartbeat and asks for a listing several times a second, each call measured; bystanders send theirs
at a third of the lease. Probes are asked as a kubelet asks them.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mxserver.wire.calls import channel_options, source_id
from mxserver.wire.proto import p2p_pb2, p2p_pb2_grpc

READY = p2p_pb2.SOURCE_STATUS_READY
IDENTITY = p2p_pb2.SourceIdentity(mx_version="mx-1", model_name="honest/model")

BYSTANDERS = 20
PAUSE_SECONDS = 0.1
MOST_SECONDS = 1.0  # of a heartbeat and of a listing: the project's own promise under attack
CALL_SECONDS = 5.0  # then a call counts as failed
MOST_RSS_MIB = 512 + (100 if os.environ.get("STORE") == "memory" else 0)  # there a record of 95 MiB is in it


@dataclass
class Seen:
    """What was seen since the last verdict."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    most_rss_mib: float = 0.0

    def p99(self, name: str) -> float:
        times = sorted(self.seconds.get(name, ())) or [float("inf")]  # not one call has ended
        return times[min(len(times) - 1, int(len(times) * 0.99))]

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {self.p99(name) * 1000:.0f} ms" for name in sorted(self.seconds) if name != "memory")
        return f"p99 {calls}; {self.most_rss_mib:.0f} MiB; failed: { {k: len(v) for k, v in self.failures.items()} }"


def rss_mib(pid: int) -> float:
    """Resident memory of a process (proc(5))."""
    [line] = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


class Reference:
    """A gRPC server of a few lines in a process of its own, which nobody attacks: what the machine itself takes."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.adversary.reference"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._channel = grpc.insecure_channel(f"127.0.0.1:{int(self._process.stdout.readline())}")
        self.call = self._channel.unary_unary("/reference/Call")

    def close(self) -> None:
        self._channel.close()
        self._process.communicate()


class Honest:
    """The honest workers of one server. `close` ends them. Verdicts are asked from one thread."""

    def __init__(
        self,
        address: str,
        http_port: int,
        pid: int,
        lease_seconds: float,
        token: str,
        known: dict[str, int] | None = None,
    ) -> None:
        """`known` workers (id -> epoch) were published earlier."""
        self._channel = grpc.insecure_channel(
            address, options=[*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._p2p = p2p_pb2_grpc.P2pServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._http_port, self.pid = http_port, pid
        self._lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._seen = Seen()
        self._stopping = threading.Event()
        self._source = source_id(IDENTITY)
        self.published = dict(known or {})  # worker id -> epoch
        for name in () if known else ("measured", *(f"bystander-{n}" for n in range(BYSTANDERS))):
            self.publish(name, 60.0)
        self._reference = Reference()
        self._threads = [
            threading.Thread(target=self._repeat, args=(name, pause, what), name=name, daemon=True)
            for name, pause, what in (
                ("heartbeat", PAUSE_SECONDS, lambda: self._beat("measured")),
                ("listing", PAUSE_SECONDS, self._list),
                ("bystanders", lease_seconds / 3, self._beat_all),
                ("livez", 0.5, lambda: self._probe("/livez")),
                ("readyz", 0.5, lambda: self._probe("/readyz")),
                ("health", 0.5, self._check),
                ("memory", 0.05, self._weigh),
                ("machine", PAUSE_SECONDS, self._ask_reference),
            )
        ]
        for thread in self._threads:
            thread.start()

    def publish(self, name: str, timeout_seconds: float = 30.0) -> None:
        """One more worker, which must not be lost from then on."""
        answer = self._p2p.PublishMetadata(
            p2p_pb2.PublishMetadataRequest(
                identity=IDENTITY, worker=p2p_pb2.WorkerMetadata(status=READY), worker_id=name
            ),
            metadata=self._metadata,
            timeout=timeout_seconds,
        )
        assert answer.success, answer.message
        self.published[name] = answer.epoch

    def _beat(self, *names: str) -> None:
        calls = [
            self._p2p.UpdateStatus.future(
                p2p_pb2.UpdateStatusRequest(
                    mx_source_id=self._source, worker_id=name, status=READY, epoch=self.published[name]
                ),
                metadata=self._metadata,
                timeout=CALL_SECONDS,
            )
            for name in names
        ]
        for call in calls:
            answer = call.result()
            assert answer.success, answer.message

    def _beat_all(self) -> None:
        """All at once: each is a worker of its own."""
        self._beat(*self.published)

    def _list(self) -> None:
        """Every worker that was published before is there, and READY."""
        known = set(self.published)
        answer = self._p2p.ListSources(
            p2p_pb2.ListSourcesRequest(identity=IDENTITY, status_filter=READY),
            metadata=self._metadata,
            timeout=CALL_SECONDS,
        )
        missing = known - {one.worker_id for one in answer.instances}
        assert not missing, f"{len(missing)} live workers are STALE or lost: {sorted(missing)[:3]}"

    def _probe(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._http_port, timeout=CALL_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == 200, f"{answer.status} {answer.read()[:200]!r}"
        finally:
            connection.close()

    def _check(self) -> None:
        answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer

    def _ask_reference(self) -> None:
        self._reference.call(b"", timeout=CALL_SECONDS)

    def _weigh(self) -> None:
        weight = rss_mib(self.pid)
        with self._lock:
            self._seen.most_rss_mib = max(self._seen.most_rss_mib, weight)

    def _repeat(self, name: str, pause: float, what: Callable[[], None]) -> None:
        while not self._stopping.wait(pause):
            started = time.monotonic()
            try:
                what()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is in the verdict
                reason = f"{error.code().name} {error.details()}" if isinstance(error, grpc.Call) else repr(error)
                with self._lock:
                    self._seen.failures.setdefault(name, []).append(reason[:300])
            with self._lock:
                self._seen.seconds.setdefault(name, []).append(time.monotonic() - started)

    def take(self) -> Seen:
        """What was seen since the last call."""
        with self._lock:
            seen, self._seen = self._seen, Seen()
        return seen

    def observe(self, seconds: float) -> Seen:
        """What is seen in this time."""
        self.take()
        self._stopping.wait(seconds)
        return self.take()

    def close(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()
        self._reference.close()


def judge(seen: Seen, when: str, allowed: tuple[str, ...] = ()) -> None:
    """Fails, with everything that is wrong. What is `allowed` may fail meanwhile: a full disk, say, is not ready."""
    wrong = [
        f"{name} failed {len(reasons)} of {len(seen.seconds[name])} times: {sorted(set(reasons))[:3]}"
        for name, reasons in seen.failures.items()
        if name not in allowed
    ]
    for name in ("heartbeat", "listing"):
        machine = seen.p99("machine")
        if name not in allowed and seen.p99(name) > MOST_SECONDS + machine:
            late = f"{seen.p99(name):.2f} s at the 99th percentile of {len(seen.seconds[name])}"
            wrong.append(f"{name}: {late}; the machine itself takes {machine:.2f} s")
    if seen.most_rss_mib > MOST_RSS_MIB:
        wrong.append(f"{seen.most_rss_mib:.0f} MiB resident")
    assert not wrong, "\n".join([f"{when}:", *wrong])
