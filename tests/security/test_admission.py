"""Who calls, and how much they send, is decided before a request is received and parsed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from mxserver.limits import DEFAULT, changed
from mxserver.settings import as_config, config_of, load_settings, load_with_origins
from mxserver.wire import ServerRefused, SettingError
from mxserver.wire.calls import ServerClient
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.proto import p2p_pb2
from tests.security.conftest import IDENTITY, READY, SOURCE, StartServer, access_file
from tests.server.conftest import ServerProcess
from tests.server.conftest import start_server as start_process

__all__ = ["start_process"]  # a fixture

PLAIN = ClientCredentials()
PUBLISH = "/model_express.p2p.P2pService/PublishMetadata"
MiB = 1024 * 1024


def empty_tensors(mib: int) -> bytes:
    """A publish request of so many MiB: half a million of empty tensors a MiB. Parsed, each costs 86 bytes."""
    tensors = b"\x1a\x00" * (mib * MiB // 2)
    return p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker_id="w").SerializeToString() + (
        b"\x12" + _varint(len(tensors)) + tensors
    )


def _varint(number: int) -> bytes:
    parts = []
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def peak_mib(process: ServerProcess) -> float:
    """The largest resident size so far."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def raw_call(port: int, request: bytes) -> grpc.StatusCode:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        try:
            channel.unary_unary(PUBLISH)(request, timeout=60)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def test_message_without_a_token_costs_nothing(tmp_path: Path, start_process: Callable[..., ServerProcess]) -> None:
    """It cost 43 times its size (proofs/server/p10.py), and 90 MiB each for those that others sent beside it."""
    access = access_file(tmp_path / "access.toml", ("x", "read", "secret"))
    server = start_process("--store", "memory", "--auth", "file", "--auth-file", str(access))
    before = peak_mib(server)
    assert raw_call(server.port, empty_tensors(12)) == grpc.StatusCode.UNAUTHENTICATED
    assert raw_call(server.port, b"x" * 38 * MiB) == grpc.StatusCode.UNAUTHENTICATED
    assert peak_mib(server) - before < 24


def test_tensors_are_not_parsed(start_process: Callable[..., ServerProcess]) -> None:
    """On a server that is open to all, a publish costs a few times its bytes."""
    server = start_process("--store", "memory")
    before = peak_mib(server)
    assert raw_call(server.port, empty_tensors(12)) == grpc.StatusCode.RESOURCE_EXHAUSTED  # 6 million of them
    assert raw_call(server.port, empty_tensors(12)[: 300 * 1024]) == grpc.StatusCode.INTERNAL  # cut off
    tensors = [p2p_pb2.TensorDescriptor(name="t" * 80, addr=n) for n in range(60_000)]
    request = p2p_pb2.PublishMetadataRequest(
        identity=IDENTITY, worker_id="w", worker=p2p_pb2.WorkerMetadata(tensors=tensors)
    ).SerializeToString()
    assert raw_call(server.port, request) == grpc.StatusCode.OK
    assert peak_mib(server) - before < 100


def test_large_messages_are_received_one_at_a_time(start_process: Callable[..., ServerProcess]) -> None:
    """What existing clients may send costs a few times its bytes, however many send it."""
    server = start_process("--store", "memory")
    blob = p2p_pb2.WorkerMetadata(nixl_metadata=bytes(90 * MiB))
    request = p2p_pb2.PublishMetadataRequest(identity=IDENTITY, worker_id="w", worker=blob).SerializeToString()
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda _: raw_call(server.port, request), range(4)))
    assert grpc.StatusCode.OK in outcomes
    assert set(outcomes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}  # the slow ones of a slow machine
    assert peak_mib(server) < 512


def test_requests_are_limited_by_method_and_named(start_server: StartServer) -> None:
    server = start_server(limits="request_bytes=2KiB, publish_bytes=64KiB")
    with ServerClient(f"127.0.0.1:{server.port}", credentials=PLAIN) as client:
        client.publish(IDENTITY, p2p_pb2.WorkerMetadata(nixl_metadata=b"x" * 60_000), "w")
        with pytest.raises(ServerRefused, match=r"request_bytes=2048, which MX_SERVER_LIMITS of the server raises"):
            client.update_status(SOURCE, "w" * 3000, 0, READY)


@pytest.mark.parametrize("wrong", ["recods=5", "records=0", "records=many", "records", "records=-1"])
def test_what_is_no_limit_is_refused(wrong: str) -> None:
    with pytest.raises(SettingError, match=r"--limits .* NAME=NUMBER"):
        load_settings({"limits": wrong})


def test_limits_are_printed_and_can_be_given_back(tmp_path: Path) -> None:
    printed = "\n".join(as_config(*load_with_origins({"limits": "records=7"})))
    assert all(f'"{pair}"' in printed for pair in DEFAULT.as_settings() if not pair.startswith("records="))
    file = tmp_path / "settings.toml"
    file.write_text(printed)
    assert load_settings({}, config_of(str(file))).limits == changed({"records": 7})
