"""Tokens: the access file, what each role may call, and when a client sends its token."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.calls.handlers import wrapped
from mxserver.security import Role, Unauthenticated
from mxserver.security import access_file as access_file_module
from mxserver.security.access_file import AccessFile, read_rules
from mxserver.security.roles import OPEN_SERVICES, ROLE_OF_METHOD, Caller, required_role
from mxserver.server import Server
from mxserver.wire import ServerRefused, ServerUnreachable, SettingError
from mxserver.wire.calls import ServerClient, open_channel
from mxserver.wire.credentials import LONGEST_TOKEN_BYTES, ClientCredentials
from mxserver.wire.proto import api_pb2, cache_pb2, health_pb2, model_pb2, model_pb2_grpc, mx_pb2, p2p_pb2, watch_pb2
from tests.security.conftest import IDENTITY, READY, SOURCE, WORKER, StartServer, access_file

TOKENS = {"reader": "r" * 40, "worker": "w" * 40, "other": "o" * 40, "boss": "b" * 40}
ROLES = {"reader": "read", "worker": "publish", "other": "publish", "boss": "admin"}


@pytest.fixture
def rules_path(tmp_path: Path) -> Path:
    return access_file(tmp_path / "access.toml", *((name, ROLES[name], TOKENS[name]) for name in TOKENS))


@pytest.fixture
def server(start_server: StartServer, rules_path: Path) -> Server:
    return start_server(auth="file", auth_file=rules_path)


@pytest.fixture
def client_with(server: Server, tmp_path: Path) -> Iterator[Callable[[str | None], ServerClient]]:
    """Clients that send this token; None: none."""
    opened: list[ServerClient] = []

    def client(token: str | None) -> ServerClient:
        path = None
        if token is not None:
            path = tmp_path / f"token-{len(opened)}"
            path.write_text(token)
        credentials = ClientCredentials(token_file=path)
        opened.append(ServerClient(f"127.0.0.1:{server.port}", timeout_seconds=10, credentials=credentials))
        return opened[-1]

    yield client
    for one in opened:
        one.close()


# Roles


def test_every_method_of_the_server_has_a_role_or_is_open(start_server: StartServer) -> None:
    services = [
        module.DESCRIPTOR.services_by_name[name]
        for module, name in (
            (p2p_pb2, "P2pService"),
            (mx_pb2, "FleetService"),
            (model_pb2, "ModelService"),
            (cache_pb2, "CacheService"),
            (health_pb2, "HealthService"),
            (api_pb2, "ApiService"),
            (watch_pb2, "WatchService"),
        )
    ]
    methods = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert {method for method in methods if not method.startswith(OPEN_SERVICES)} == set(ROLE_OF_METHOD)
    assert required_role("/model_express.mx.New/Method") is Role.ADMIN
    assert required_role("/grpc.health.v1.Health/Check") is None


@pytest.mark.parametrize("method", sorted(ROLE_OF_METHOD))
@pytest.mark.parametrize("name", [None, "unknown", *TOKENS])
def test_each_role_may_call_what_it_should_and_nothing_else(server: Server, method: str, name: str | None) -> None:
    """The denial comes as an answer of the method's own kind: one message or a stream."""
    streams = method.rpartition("/")[2] in ("EnsureModelDownloaded", "StreamModelFiles", "ValidateModel")
    token = TOKENS.get(name or "", "x" * 40)
    metadata = [("authorization", f"Bearer {token}")] if name else []
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        if streams:
            outcome: grpc.Call = channel.unary_stream(method)(b"", metadata=metadata, timeout=60)
            failure: grpc.RpcError | None = None
            try:
                list(outcome)  # type: ignore[call-overload]
            except grpc.RpcError as error:
                failure = error
        else:
            failure = None
            try:
                _, outcome = channel.unary_unary(method).with_call(b"", metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                failure = outcome = error  # type: ignore[assignment]
    assert (failure is None) == (outcome.code() is grpc.StatusCode.OK)
    denied = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
    if name in (None, "unknown"):
        assert outcome.code() is grpc.StatusCode.UNAUTHENTICATED
        assert ("no token" if name is None else "not known") in (outcome.details() or "")
    elif Role[ROLES[name].upper()] < ROLE_OF_METHOD[method]:
        assert outcome.code() is grpc.StatusCode.PERMISSION_DENIED
        needed = ROLE_OF_METHOD[method].name.lower()
        assert f"{name} has the role {ROLES[name]}; {method} needs {needed}" in (outcome.details() or "")
    else:
        assert outcome.code() not in denied


def test_a_download_pins_only_for_who_may_pin(server: Server) -> None:
    request = model_pb2.ModelDownloadRequest(model_name="file:///nowhere", provider=model_pb2.FILE, pin=True)
    with open_channel(f"127.0.0.1:{server.port}") as channel:
        ensure = model_pb2_grpc.ModelServiceStub(channel).EnsureModelDownloaded
        with pytest.raises(grpc.RpcError) as caught:
            list(ensure(request, metadata=(("authorization", f"Bearer {TOKENS['worker']}"),), timeout=30))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "a pin needs admin" in caught.value.details()
        updates = list(ensure(request, metadata=(("authorization", f"Bearer {TOKENS['boss']}"),), timeout=30))
        assert updates[-1].status == model_pb2.ERROR  # it passed: there is no such folder


def test_probes_need_no_token(server: Server) -> None:
    with ServerClient(f"127.0.0.1:{server.port}", credentials=ClientCredentials()) as client:
        assert client.health().status == "ok"
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)
        channel.unary_unary("/model_express.api.ApiService/SendRequest")(b"", timeout=60)


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Basic abc")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {'x' * 7000}")],
        [("authorization", f"Bearer {'b' * 40}"), ("authorization", f"Bearer {'b' * 40}")],
        [("authorization", "b" * 40)],
    ],
)
def test_headers_that_are_no_token_are_refused(server: Server, headers: list[tuple[str, str]]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/model_express.p2p.P2pService/ListSources")(b"", metadata=headers, timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(("request_streams", "response_streams"), [(a, b) for a in (0, 1) for b in (0, 1)])
def test_a_wrapped_handler_keeps_the_kind_of_its_method(request_streams: bool, response_streams: bool) -> None:
    """Also of kinds that the server does not have yet: a new method is never left open for want of a kind."""
    kind = f"{'stream' if request_streams else 'unary'}_{'stream' if response_streams else 'unary'}"
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = wrapped("/m", make(lambda *_: None), lambda *_: pytest.fail("not called"))
    assert (handler.request_streaming, handler.response_streaming) == (request_streams, response_streams)
    assert getattr(handler, kind) is not None


# Records and their owners


def test_worker_changes_only_its_own_record(client_with: Callable[[str | None], ServerClient]) -> None:
    mine, theirs = client_with(TOKENS["worker"]), client_with(TOKENS["other"])
    epoch = mine.publish(IDENTITY, WORKER, "w").epoch
    for call in (
        lambda: theirs.publish(IDENTITY, WORKER, "w"),
        lambda: theirs.update_status(SOURCE, "w", 0, READY, epoch=epoch),
        lambda: client_with(TOKENS["boss"]).update_status(SOURCE, "w", 0, READY),
    ):
        with pytest.raises(ServerRefused, match=r"PERMISSION_DENIED.*a worker changes only its own record"):
            call()
    mine.update_status(SOURCE, "w", 0, READY, epoch=epoch)
    assert [r.worker_id for r in theirs.list_sources(IDENTITY, status=READY)] == ["w"]


def test_a_record_carries_the_name_that_published_it(client_with: Callable[[str | None], ServerClient]) -> None:
    client_with(TOKENS["worker"]).publish(IDENTITY, WORKER, "w")
    record = client_with(TOKENS["reader"]).get_metadata(SOURCE, "w")
    assert record is not None
    assert record.owner == "worker"


# The access file


def test_rotated_tokens_are_in_force_without_a_restart(
    rules_path: Path, client_with: Callable[[str | None], ServerClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_file_module, "LOOK_SECONDS", 0.0)
    worker = client_with(TOKENS["worker"])
    worker.list_sources()
    access_file(rules_path, ("worker", "publish", "new" * 20))
    with pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
        worker.list_sources()
    client_with("new" * 20).list_sources()


def test_broken_file_leaves_the_old_rules_in_force(
    rules_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_file_module, "LOOK_SECONDS", 0.0)
    access = AccessFile(rules_path)
    rules_path.write_text("[[tokens")
    with caplog.at_level(logging.ERROR):
        assert access.authenticate(TOKENS["boss"].encode()) == Caller("boss", Role.ADMIN)
    assert "the old access rules stay in force" in caplog.text
    rules_path.unlink()
    assert access.authenticate(TOKENS["boss"].encode()) == Caller("boss", Role.ADMIN)
    access_file(rules_path, ("boss", "read", TOKENS["boss"]))
    assert access.authenticate(TOKENS["boss"].encode()) == Caller("boss", Role.READ)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[[tokens", "is not TOML"),
        ("\x00", "is not TOML"),
        ("[[token]]\nname = 'a'", "'token' is no setting; the nearest one is 'tokens'"),
        ("tokens = 'a'", "must be written as [[tokens]]"),
        ("tokens = ['a']", "number 1: must have name, role, sha256"),
        (f"[[tokens]]\nrole = 'read'\nsha256 = '{DIGEST}'", "name must be a text"),
        (f"[[tokens]]\nname = 'a'\nrole = 'root'\nsha256 = '{DIGEST}'", "(a): role 'root' must be read, publish or"),
        ("[[tokens]]\nname = 'a'\nrole = 'read'\nsha256 = 'secret'", "(a): sha256 must be the 64 hexadecimal digits"),
        (
            "[[tokens]]\nname = 'a'\nrole = 'read'\ntoken = 'secret'",
            "number 1: 'token' is no setting",
        ),
        (f"[[subjects]]\nname = 'a'\nrole = 'read'\nsha256 = '{DIGEST}'", "'sha256' is no setting"),
        (f"[[tokens]]\nname = 'a'\nrole = 'read'\nsha256 = '{DIGEST}'\n" * 2, "two tokens are the same"),
    ],
)
def test_file_that_breaks_a_rule_is_refused_by_entry_and_rule(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "access.toml"
    path.write_text(text)
    with pytest.raises(SettingError, match=re.escape(named)) as caught:
        read_rules(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"none\.toml cannot be read \(No such file"):
        AccessFile(tmp_path / "none.toml")


def test_unknown_token_is_unauthenticated(rules_path: Path) -> None:
    with pytest.raises(Unauthenticated, match="not known"):
        AccessFile(rules_path).authenticate(b"")


def test_tokens_are_kept_as_hashes_alone(rules_path: Path) -> None:
    rules = read_rules(rules_path)
    assert not any(token in repr(rules) or token in rules_path.read_text() for token in TOKENS.values())


# Clients


def test_token_that_rotates_is_read_again(client_with: Callable[[str | None], ServerClient], tmp_path: Path) -> None:
    client = client_with("old")
    with pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
        client.list_sources()
    (tmp_path / "token-0").write_text(TOKENS["reader"] + "\n")
    assert client.list_sources() == []


@pytest.mark.parametrize("content", ["", " \n", "two words", "tökén", "x" * (LONGEST_TOKEN_BYTES + 1)])
def test_file_without_one_token_is_refused_before_anything_is_sent(
    client_with: Callable[[str | None], ServerClient], content: str
) -> None:
    with pytest.raises(ServerUnreachable, match="must have one token in ASCII"):
        client_with(content).list_sources()


def test_missing_token_file_is_named(server: Server, tmp_path: Path) -> None:
    credentials = ClientCredentials(token_file=tmp_path / "none")
    with (
        ServerClient(f"127.0.0.1:{server.port}", credentials=credentials) as client,
        pytest.raises(ServerUnreachable, match=r"MX_AUTH_TOKEN_PATH, the token file .*none cannot be read"),
    ):
        client.list_sources()


class _Headers(grpc.GenericRpcHandler):
    """Answers any call, and notes the tokens that came."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        self.tokens.append(dict(details.invocation_metadata).get("authorization"))
        return grpc.unary_unary_rpc_method_handler(lambda request, _: b"")


@pytest.mark.parametrize(
    ("host", "in_clear", "to_worker", "sent"),
    [
        ("127.0.0.1", False, False, True),
        ("address", False, False, False),
        ("address", True, False, True),
        ("127.0.0.1", False, True, False),  # workers get no token: it is for the server
        ("address", True, True, False),
    ],
)
def test_token_is_never_sent_in_clear_but_to_loopback_or_where_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, in_clear: bool, to_worker: bool, sent: bool
) -> None:
    seen = _Headers()
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((seen,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (tmp_path / "token").write_text("secret")
    credentials = ClientCredentials(token_file=tmp_path / "token", token_in_clear=in_clear)
    # To gRPC the same place; to us no loopback, for all that a name tells.
    target = f"127.0.0.1:{port}" if host == "127.0.0.1" else f"ipv4:127.0.0.1:{port}"
    with (
        caplog.at_level(logging.WARNING),
        open_channel(target, credentials, to_worker=to_worker) as channel,
    ):
        channel.unary_unary("/s/m")(b"", timeout=60)
    server.stop(None).wait()
    assert seen.tokens == ["Bearer secret" if sent else None]
    assert ("the token is not sent" in caplog.text) is (not sent and not to_worker)


def test_token_goes_over_tls(start_server: StartServer, rules_path: Path, authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server", "127.0.0.1")
    server = start_server(auth="file", auth_file=rules_path, tls_cert_file=cert, tls_key_file=key)
    (tmp_path / "token").write_text(TOKENS["worker"])
    credentials = ClientCredentials(ca_file=authority.ca_file, token_file=tmp_path / "token")
    with ServerClient(f"https://127.0.0.1:{server.port}", credentials=credentials) as client:
        assert client.publish(IDENTITY, WORKER, "w").success


def test_many_callers_at_once_stay_apart(client_with: Callable[[str | None], ServerClient]) -> None:
    """The caller of one call is never seen by another that runs at the same time."""
    clients = {name: client_with(TOKENS[name]) for name in ("worker", "other", "boss")}
    for name, client in clients.items():
        client.publish(IDENTITY, WORKER, name)
    wrong: list[object] = []
    start = threading.Barrier(6)

    def call(name: str) -> None:
        start.wait()
        for _ in range(100):
            try:
                clients[name].update_status(SOURCE, name, 0, READY)
            except ServerRefused as error:
                wrong.append(error)

    threads = [threading.Thread(target=call, args=(name,)) for name in clients for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_but_a_star_stands_for_anything(tmp_path: Path) -> None:
    names = ("system:serviceaccount:a?c:x", "system:serviceaccount:[ab]:x", "system:serviceaccount:models:*")
    rules = AccessFile(access_file(tmp_path / "access.toml", *((name, "read", "") for name in names), kind="subjects"))
    for name in (*names[:2], "system:serviceaccount:models:vllm", "system:serviceaccount:models:"):
        assert rules.role_of_subject(name) is Role.READ
    for name in ("system:serviceaccount:abc:x", "system:serviceaccount:a:x", "xsystem:serviceaccount:models:vllm"):
        assert rules.role_of_subject(name) is None


def test_storage_is_read_for_nobody_else(server: Server, client_with: Callable[[str | None], ServerClient]) -> None:
    worker, other = client_with(TOKENS["worker"]), client_with(TOKENS["other"])
    worker.publish(IDENTITY, WORKER, "w")
    with pytest.raises(ServerRefused, match=r"PERMISSION_DENIED.*published by another caller"):
        other.take_storage_turn(SOURCE, 0, "w")
    worker.take_storage_turn(SOURCE, 0, "w")
