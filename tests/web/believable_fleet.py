"""A fleet to look at: three models, with loads that workers have reported, and some that run.

Records and loads that run are made by real calls. What has ended lies in the server's own file, as it keeps load
reports: calls would all have ended at the same moment.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mxserver.telemetry import LoadHistory
from mxserver.wire.calls import ServerClient
from mxserver.wire.proto import load_pb2, mx_pb2, p2p_pb2
from tests.web.conftest import INITIALIZING, READY, identity

GB = 10**9
LETTERS = "bcdfghjklmnpqrstvwxz2456789"
STORAGE = load_pb2.LOAD_PATH_OBJECT_STORE
RDMA = load_pb2.LOAD_PATH_PEER_RDMA
TCP = load_pb2.LOAD_PATH_PEER_TCP
DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Deployment:
    """Pods of one model; `bytes` are those of a rank."""

    model: str
    name: str
    replicas: int
    ranks: int
    bytes: int
    accelerator: str = "NVIDIA H200"
    path: load_pb2.LoadPath.ValueType = RDMA
    quantization: str = ""

    @property
    def identity(self) -> p2p_pb2.SourceIdentity:
        return identity(
            self.model, tensor_parallel_size=self.ranks, quantization=self.quantization, revision="9f1c6bb1f39a"
        )

    def pods(self, rollout: int = 0) -> list[str]:
        chance = random.Random(f"{self.name}/{rollout}")
        template = "".join(chance.choices(LETTERS, k=9))
        return [f"{self.name}-{template}-{''.join(chance.choices(LETTERS, k=5))}" for _ in range(self.replicas)]

    def workers(self, pod: str) -> list[str]:
        return [hashlib.md5(f"{pod}/{rank}".encode()).hexdigest() for rank in range(self.ranks)]  # noqa: S324 - no secret


LLAMA = Deployment("meta-llama/Llama-3.3-70B-Instruct", "llama-70b", 24, 8, 8_870_000_000, quantization="fp8")
QWEN = Deployment("Qwen/Qwen3-8B", "qwen3-8b", 6, 1, 16_381_470_720, "NVIDIA L40S", TCP)
MISTRAL = Deployment("mistralai/Mistral-Small-24B", "mistral-24b", 3, 2, 23_600_000_000, "NVIDIA H100")
LOADING = 2  # more of QWEN


def node(pod: str) -> str:
    number = int(hashlib.md5(pod.encode()).hexdigest(), 16)  # noqa: S324 - no secret
    return f"gpu-{'abc'[number % 3]}-{number // 3 % 24:02}"


def reports(of: Deployment, rollout: int, at_ms: float, spread_seconds: float) -> Iterator[load_pb2.KeptLoad]:
    """One rollout that ends at that time: the first replica reads storage, the others take from those before them."""
    chance = random.Random(f"{of.name}/{rollout}/times")
    pods = of.pods(rollout)
    for index, pod in enumerate(pods):
        joined_seconds = chance.uniform(0, spread_seconds) if index else 0.0
        wait = 1.2 + chance.expovariate(0.8) + (2.5 if 0 < index < 4 else 0)
        transfer = chance.uniform(2.4, 7.5) if index else of.bytes / 0.42e9
        process = chance.uniform(6.8, 9.5)
        givers = chance.sample(pods[:index], min(index, 3 if index < 8 else 4))
        for rank, worker in enumerate(of.workers(pod)):
            parts = [chance.uniform(0.5, 1.5) for _ in givers]
            shares = [int(of.bytes * part / sum(parts)) for part in parts]
            if shares:
                shares[0] += of.bytes - sum(shares)
            given = [
                load_pb2.GivenBytes(worker_id=of.workers(giver)[rank], bytes=share)
                for giver, share in zip(givers, shares, strict=True)
            ]
            late = 0.15 * rank
            ended = at_ms + 1000 * (joined_seconds + wait + transfer + late + process)
            yield load_pb2.KeptLoad(
                mx_source_id="s",
                worker_id=worker,
                worker_rank=rank,
                model_name=of.model,
                at_unix_ms=round(ended),
                pod_name=pod,
                node_name=node(pod),
                replica=pod,
                report=load_pb2.LoadReport(
                    path=of.path if index else STORAGE,
                    bytes=of.bytes,
                    seconds=transfer + late,
                    wait_seconds=wait,
                    transfer_seconds=transfer + late,
                    process_seconds=process,
                    chunks_verified=of.bytes >> 24,
                    from_worker_id=given[0].worker_id if given else "",
                    given=given,
                    givers=len(given),
                    bytes_from_workers=sum(one.bytes for one in given),
                ),
            )


def write_history(path: Path, deployments: tuple[Deployment, ...] = (LLAMA, QWEN, MISTRAL)) -> None:
    """Rollouts of the last days, the last one minutes ago, into the file beside the store at `path`."""
    now_ms = 1000 * time.time()
    history = LoadHistory(path.with_name(f"{path.stem}-loads{path.suffix}"))
    for ago_seconds, rollout in ((3 * DAY_SECONDS, 2), (DAY_SECONDS, 1), (420.0, 0)):
        for of in deployments:
            for kept in sorted(reports(of, rollout, now_ms - 1000 * ago_seconds, 26.0), key=lambda one: one.at_unix_ms):
                history.add(kept)
    history.close()


def publish_ranks(
    client: ServerClient, of: Deployment, pods: list[str], status: p2p_pb2.SourceStatus.ValueType = READY
) -> str:
    """By real calls, several at a time. Returns the source id."""

    def one(at: tuple[int, str, int, str]) -> str:
        number, pod, rank, worker = at
        facts = p2p_pb2.WorkerMetadata(
            worker_rank=rank,
            status=status,
            accelerator=of.accelerator,
            worker_grpc_endpoint=f"10.42.{number % 250}.{number // 250 + 7}:{6555 + rank}",
            digest_origin=mx_pb2.DIGEST_ORIGIN_RECEIVED,
            received_from=of.workers(pods[0])[rank : rank + 1],
            pod_name=pod,
            node_name=node(pod),
            replica=pod,
        )
        return client.publish(of.identity, facts, worker).mx_source_id

    ranks = [
        (number, pod, rank, worker) for number, pod in enumerate(pods) for rank, worker in enumerate(of.workers(pod))
    ]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, ranks))[-1]


def make_fleet(client: ServerClient) -> str:
    """The workers of all three models; two replicas more of one load. Returns that one's source id."""
    for of in (LLAMA, MISTRAL):
        publish_ranks(client, of, of.pods())
    publish_ranks(client, QWEN, QWEN.pods())
    source = publish_ranks(client, QWEN, loading_pods(), INITIALIZING)
    why = "layout differs from ours: model.embed_tokens.weight has dtype torch.float16 there [MX_LAYOUT_MISMATCH]"
    refusal = load_pb2.Refusal(
        id="1",
        side=load_pb2.REFUSAL_SIDE_RECEIVE,
        reason=load_pb2.REFUSAL_REASON_LAYOUT_MISMATCH,
        text=f"worker {QWEN.workers(QWEN.pods()[1])[0][:12]}: {why}",
    )
    worker = QWEN.workers(QWEN.pods()[3])[0]
    client.update_status(source, worker, 0, READY, refusals=[refusal])
    client.tell_doubt(
        mx_pb2.Doubt(
            kind=mx_pb2.DOUBT_KIND_WRONG_CHUNKS,
            mx_source_id=source,
            worker_id=worker,
            holders=[QWEN.workers(QWEN.pods()[4])[0]],
            chunks=1,
            text="chunk 212 came twice with other bytes than its digest promises; taken from another holder",
        )
    )
    return source


def loading_pods() -> list[str]:
    return QWEN.pods(9)[:LOADING]


def report_progress(client: ServerClient, source: str, step: int) -> None:
    """A second of both loads."""
    givers = [QWEN.workers(pod)[0] for pod in QWEN.pods()[:3]]
    for index, pod in enumerate(loading_pods()):
        done = (step + 1) * (2 + index) * GB
        given = [
            load_pb2.GivenBytes(worker_id=giver, bytes=done * part // 6)
            for giver, part in zip(givers, (3, 2, 1), strict=True)
        ]
        client.update_status(
            source,
            QWEN.workers(pod)[0],
            0,
            INITIALIZING,
            load_progress=load_pb2.LoadProgress(
                load_id=pod,
                path=TCP,
                bytes_done=done,
                bytes_total=QWEN.bytes,
                from_worker_id=givers[0],
                holders=3,
                given=given,
            ),
        )
