"""Checkpoints out of a real S3 server: bytes, digests, small files, and every way in which it can fail."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxbench.stand_ins.s3_server import KEY_ID, SECRET, S3Server
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxcore.errors import (
    CheckpointError,
    ObjectDenied,
    ObjectMissing,
    ObjectStoreError,
    ObjectTruncated,
    StoreTimeout,
    StoreUnreachable,
    StreamerMissing,
    WrongRegion,
)
from mxcore.storage.checkpoint import checkpoint_digest
from mxcore.storage.remote import (
    ObjectFolder,
    RemoteRange,
    model_streamer,
    open_remote,
    parse_model_uri,
    pull_small_files,
    ranged_gets,
    remote_digest,
    stream_remote,
)
from mxcore.storage.remote.object_store import ObjectOptions, Reader
from tests.object_store.conftest import PREFIX, SMALL, URI, make_checkpoint, use

Made = tuple[Path, dict[str, np.ndarray]]


@pytest.fixture(params=["obstore", "runai"])
def reader(request: pytest.FixtureRequest) -> Reader:
    found: Reader = request.param
    return found


def opened(uri: str = URI, reader: Reader = "obstore", **options: Any) -> ObjectFolder:
    return ObjectFolder(parse_model_uri(uri), ObjectOptions(reader, **options))


def load(folder: ObjectFolder, **options: object) -> dict[str, np.ndarray]:
    checkpoint = open_remote(folder)
    return {name: tensor.numpy().copy() for name, tensor in stream_remote(folder, checkpoint, **options)}  # type: ignore[arg-type]


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def test_tensors_are_those_of_the_files(reader: Reader, s3: S3Server, made: Made) -> None:
    folder = opened(reader=reader)
    try:
        assert equal(load(folder), made[1])
        total = sum(tensor.nbytes for tensor in made[1].values())
        assert total <= folder.bytes_read <= total + 2 * 64 * 1024
        assert folder.resumed == 0
    finally:
        folder.close()
    folder.close()


def test_small_batches_and_some_names(reader: Reader, s3: S3Server, made: Made) -> None:
    folder = opened(reader=reader)
    names = {"layers.3.weight", "layers.0.bias"}
    try:
        found = load(folder, names=names, batch_bytes=1 << 20)
    finally:
        folder.close()
    assert equal(found, {name: made[1][name] for name in names})


def test_the_digest_is_that_of_local_files(s3: S3Server, made: Made) -> None:
    local = made[0] / "models" / PREFIX
    folder = opened()
    try:
        assert remote_digest(folder) == checkpoint_digest(
            sorted(local.glob("*.safetensors")), local / "model.safetensors.index.json"
        )
    finally:
        folder.close()


def test_small_files_come_whole_and_weights_stay(s3: S3Server, tmp_path: Path) -> None:
    folder = opened()
    try:
        assert pull_small_files(folder, tmp_path) == len(SMALL)
    finally:
        folder.close()
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == SMALL


def test_a_prefix_is_a_folder_not_a_beginning(s3: S3Server) -> None:
    with pytest.raises(ObjectMissing, match=r"bucket 'models'.*'team/tin'"):
        opened("s3://models/team/tin")


def test_what_is_not_there(s3: S3Server) -> None:
    with pytest.raises(ObjectMissing, match=r"bucket 'no-such-bucket'"):
        opened("s3://no-such-bucket/x")
    folder = opened()
    try:
        with pytest.raises(ObjectMissing, match=r"bucket 'models'.*key 'team/tiny/none'"):
            folder.whole("none")
    finally:
        folder.close()


def test_a_wrong_secret_is_denied_and_stays_secret(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server.address, AWS_SECRET_ACCESS_KEY="another-secret-than-that")  # noqa: S106
    with pytest.raises(ObjectDenied, match="bucket 'models', key 'team/tiny'") as caught:
        opened()
    assert "another-secret-than-that" not in str(caught.value)
    assert KEY_ID not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_server_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"127.0.0.1:{found.getsockname()[1]}"
    use(monkeypatch, address)
    with pytest.raises((StoreUnreachable, StoreTimeout), match="bucket 'models'"):
        opened()


def test_another_region(server: S3Server, proxy: TcpProxy) -> None:
    """rclone's server knows no regions: the answer is the one that AWS gives."""
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-west-1'</Message></Error>"
    proxy.answer_next(answer(400, b"Bad Request", body), 1)
    with pytest.raises(WrongRegion, match="AWS_REGION=us-east-1"):
        opened()


def answer(status: int, reason: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %d %s\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (status, reason, len(body)) + body


def test_an_overloaded_store_is_asked_again(reader: Reader, proxy: TcpProxy, made: Made) -> None:
    slow_down = answer(503, b"Service Unavailable", b"<Error><Code>SlowDown</Code></Error>")
    proxy.answer_next(slow_down, 1)
    folder = opened(reader=reader)
    try:
        proxy.answer_next(slow_down, 2)
        assert equal(load(folder), made[1])
    finally:
        folder.close()
    assert proxy.answered_itself == 3


def test_a_cut_in_the_middle_costs_little_again(reader: Reader, proxy: TcpProxy, made: Made) -> None:
    folder = opened(reader=reader)
    total = sum(tensor.nbytes for tensor in made[1].values())
    try:
        proxy.bytes_per_second = 5e6  # what is cut was read before, but for the last of it
        proxy.cut_after(total // 2)
        assert equal(load(folder), made[1])
    finally:
        folder.close()
    assert proxy.cuts == 1
    if reader == "obstore":  # of the answers that broke, no byte that had come is fetched again
        assert proxy.resumed() >= 1
        assert proxy.answered_bytes < total + (1 << 20)


def test_a_store_that_stays_away_is_a_timeout_or_unreachable(
    reader: Reader, proxy: TcpProxy, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged_gets, "ATTEMPTS", 2)
    monkeypatch.setattr(model_streamer, "ATTEMPTS", 1)  # its own tries are many and long
    monkeypatch.setattr(model_streamer, "SILENCE_SECONDS", 2.0)
    folder = opened(reader=reader, timeout_seconds=2.0)
    try:
        proxy.cut_after(1_000_000, forever=True)
        with pytest.raises(ObjectStoreError, match="bucket 'models', key 'team/tiny"):
            load(folder)
    finally:
        folder.close()


def test_latency_and_a_slow_store_change_nothing(reader: Reader, proxy: TcpProxy, made: Made) -> None:
    proxy.latency_seconds, proxy.bytes_per_second = 0.02, 40e6
    folder = opened(reader=reader)
    try:
        assert equal(load(folder, batch_bytes=4 << 20), made[1])
    finally:
        folder.close()


@pytest.fixture
def own(made: Made, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A checkpoint of the test's own on the server."""
    use(monkeypatch, server.address)
    folder = made[0] / "models" / "own"
    shutil.rmtree(folder, ignore_errors=True)
    make_checkpoint(folder, rows=300)
    return folder, "s3://models/own"


def test_an_object_that_is_truncated_meanwhile(reader: Reader, own: tuple[Path, str]) -> None:
    path = own[0] / "model-00002-of-00002.safetensors"
    folder = opened(own[1], reader)
    try:
        checkpoint = open_remote(folder)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(ObjectTruncated, match=r"key 'own/model-00002-of-00002.safetensors' has \d+ bytes now"):
            list(stream_remote(folder, checkpoint))
    finally:
        folder.close()


def test_an_object_that_is_replaced_meanwhile(reader: Reader, own: tuple[Path, str]) -> None:
    folder = opened(own[1], reader)
    try:
        checkpoint = open_remote(folder)
        tensors = stream_remote(folder, checkpoint)
        next(tensors)
        make_checkpoint(own[0], rows=301)
        with pytest.raises(ObjectTruncated, match=r"replaced while it was read|bytes now"):
            list(tensors)
    finally:
        folder.close()


def test_an_object_that_is_replaced_by_one_of_its_size(own: tuple[Path, str]) -> None:
    """rclone does not look at If-Match: the ETag of the answer tells."""
    path = own[0] / "model-00002-of-00002.safetensors"
    folder = opened(own[1])
    try:
        checkpoint = open_remote(folder)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(ObjectTruncated, match=r"key 'own/model-00002-of-00002.safetensors' was replaced"):
            list(stream_remote(folder, checkpoint))
    finally:
        folder.close()


def test_a_store_that_looks_at_if_match(proxy: TcpProxy) -> None:
    """It answers 412 as S3 does, and is asked once: another try would bring another object."""
    folder = opened()
    try:
        checkpoint = open_remote(folder)
        proxy.answer_next(answer(412, b"Precondition Failed", b"<Error><Code>PreconditionFailed</Code></Error>"), 1)
        with pytest.raises(ObjectTruncated, match=r"bucket 'models', key 'team/tiny/model.*replaced"):
            list(stream_remote(folder, checkpoint, ["layers.0.bias"]))
    finally:
        folder.close()
    assert proxy.answered_itself == 1
    assert folder.resumed == 0


def test_a_store_that_falls_silent_is_a_timeout(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_gets, "ATTEMPTS", 1)
    folder = opened(timeout_seconds=1.0)
    try:
        checkpoint = open_remote(folder)
        s3.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreTimeout, match=r"bucket 'models', key 'team/tiny/model.*did not answer in time"):
                list(stream_remote(folder, checkpoint, ["layers.0.bias"]))
        finally:
            s3.process.send_signal(signal.SIGCONT)
    finally:
        folder.close()


def test_a_store_without_partial_answers_is_left_to_run_ai(
    server: S3Server, made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """rclone by itself answers ranges with 200: obstore refuses such bytes."""
    use(monkeypatch, server.own_address)
    folder = opened(reader="auto")
    try:
        assert equal(load(folder), made[1])
    finally:
        folder.close()
    assert "does not answer ranges of objects as HTTP says (206)" in caplog.text
    assert caplog.text.count("Run:ai's model streamer reads on") == 1


def test_a_store_without_partial_answers_by_obstore_alone(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server.own_address)
    folder = opened()
    try:
        with pytest.raises(StoreUnreachable, match=r"bucket 'models', key 'team/tiny/model.*\(206\)"):
            open_remote(folder)
    finally:
        folder.close()
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "runai" in name else find(name, *rest))
    folder = opened(reader="auto")
    try:
        with pytest.raises(StreamerMissing, match=r"\(206\).*pip install 'obstore>=0.12' 'runai-model-streamer-s3"):
            open_remote(folder)
    finally:
        folder.close()


def test_an_index_that_lists_what_is_not_there(own: tuple[Path, str]) -> None:
    (own[0] / "model-00002-of-00002.safetensors").unlink()
    folder = opened(own[1])
    try:
        with pytest.raises(CheckpointError, match=r"lists model-00002-of-00002.safetensors, which is not there"):
            open_remote(folder)
    finally:
        folder.close()


def test_a_folder_without_weights(own: tuple[Path, str]) -> None:
    for path in own[0].glob("model*"):
        path.unlink()
    folder = opened(own[1])
    try:
        with pytest.raises(CheckpointError, match=r"no \*.safetensors there"):
            open_remote(folder)
    finally:
        folder.close()


def test_ranges_go_where_they_are_told(reader: Reader, s3: S3Server, made: Made) -> None:
    file = "model-00001-of-00002.safetensors"
    data = (made[0] / "models" / PREFIX / file).read_bytes()
    room = np.zeros(300, dtype=np.uint8)
    folder = opened(reader=reader)
    try:
        address = room.ctypes.data
        folder.read_into([RemoteRange(file, 5, 100, address), RemoteRange(file, 1000, 0, address)])
        folder.read_into([RemoteRange(file, 900, 200, address + 100)])
    finally:
        folder.close()
    assert room.tobytes() == data[5:105] + data[900:1100]


def test_secrets_leave_no_trace_in_errors(s3: S3Server) -> None:
    errors: list[str] = []
    for uri in ("s3://models/none", "s3://no-such-bucket/x"):
        with pytest.raises(ObjectStoreError) as caught:
            opened(uri)
        errors.append(str(caught.value))
    assert not any(SECRET in text or KEY_ID in text for text in errors)
