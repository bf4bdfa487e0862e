"""Kubernetes' tokens, judged by a stand-in that speaks the TokenReview API over TLS."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.security import AccessUnknown, Role, Unauthenticated, token_review
from mxserver.security.access_file import AccessFile
from mxserver.security.roles import Caller
from mxserver.security.service_accounts import AllowedAccounts, FileSubjects
from mxserver.security.token_review import TokenReviews, api_server
from mxserver.wire import ServerRefused, ServerUnreachable, SettingError
from mxserver.wire.calls import ServerClient
from mxserver.wire.credentials import ClientCredentials
from tests.security.conftest import IDENTITY, READY, SOURCE, WORKER, StartServer, access_file
from tests.security.kubernetes_stand_in import ApiServer, jwt, service_account


@pytest.fixture
def api(authority: Authority, tmp_path: Path) -> Iterator[ApiServer]:
    started = ApiServer(authority, tmp_path)
    started.users[jwt("t-worker")] = service_account("models", "vllm", "vllm-0")
    started.users[jwt("t-other")] = service_account("models", "vllm", "vllm-1")
    started.users[jwt("t-account")] = service_account("models", "batch")
    started.users[jwt("t-stranger")] = service_account("games", "chess", "chess-0")
    yield started
    started.close()


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    return access_file(
        tmp_path / "access.toml",
        ("system:serviceaccount:models:batch", "read", ""),
        ("system:serviceaccount:models:*", "publish", ""),
        kind="subjects",
    )


@pytest.fixture
def reviews(api: ApiServer, subjects: Path) -> TokenReviews:
    return TokenReviews(FileSubjects(AccessFile(subjects)), api.url, account_folder=api.account)


def test_tokens_are_judged_with_pod_and_role(reviews: TokenReviews) -> None:
    assert reviews.authenticate(jwt("t-worker").encode()) == Caller(
        "system:serviceaccount:models:vllm/vllm-0", Role.PUBLISH
    )
    assert reviews.authenticate(jwt("t-account").encode()) == Caller("system:serviceaccount:models:batch", Role.READ)


def test_token_of_nobody_and_of_somebody_without_a_role_are_refused(reviews: TokenReviews) -> None:
    with pytest.raises(Unauthenticated, match="does not know the token"):
        reviews.authenticate(jwt("forged").encode())
    with pytest.raises(Unauthenticated, match="system:serviceaccount:games:chess has no role; add it to"):
        reviews.authenticate(jwt("t-stranger").encode())


def test_verdicts_are_remembered_for_a_while(reviews: TokenReviews, api: ApiServer, subjects: Path) -> None:
    for _ in range(5):
        reviews.authenticate(jwt("t-worker").encode())
        with pytest.raises(Unauthenticated):
            reviews.authenticate(jwt("forged").encode())
    assert len(api.reviews) == 2
    forgetful = TokenReviews(FileSubjects(AccessFile(subjects)), api.url, account_folder=api.account, good_seconds=0.0)
    forgetful.authenticate(jwt("t-other").encode())
    del api.users[jwt("t-other")]  # revoked
    with pytest.raises(Unauthenticated):
        forgetful.authenticate(jwt("t-other").encode())


def test_memory_of_verdicts_is_bounded(reviews: TokenReviews, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_review, "REFUSED_TOKENS", 3)
    for n in range(10):
        with pytest.raises(Unauthenticated):
            reviews.authenticate(jwt(f"forged-{n}").encode())
    assert len(reviews._bad) == 3


@pytest.mark.parametrize(
    "token",
    [
        *(b"junk", b"a.b", b"a.b.c", b"..", b"e30.e30.x", b"W10.W10.x", b"\xff.\xff.\xff"),
        jwt("late", exp=1).encode(),
        jwt("issuer", iss=7).encode(),
        jwt("t-worker").rpartition(".")[0].encode() + b".",
    ],
)
def test_what_is_no_token_of_kubernetes_is_not_asked_about(reviews: TokenReviews, api: ApiServer, token: bytes) -> None:
    with pytest.raises(Unauthenticated):
        reviews.authenticate(token)
    assert api.reviews == []


@pytest.mark.parametrize(
    ("claims", "words"),
    [({"iss": "https://elsewhere"}, "not one of this cluster"), ({"aud": ["other"]}, "not for the audience mx")],
)
def test_token_of_another_issuer_or_audience_is_not_asked_about(
    api: ApiServer, subjects: Path, claims: dict[str, object], words: str
) -> None:
    api.audiences.append("mx")
    judge = TokenReviews(FileSubjects(AccessFile(subjects)), api.url, account_folder=api.account, audiences=["mx"])
    with pytest.raises(Unauthenticated, match=words):
        judge.authenticate(jwt("t-worker", **claims).encode())
    assert not api.reviews
    judge.authenticate(jwt("t-worker").encode())


def test_connections_to_the_api_server_are_kept(reviews: TokenReviews, api: ApiServer) -> None:
    for name in ("t-worker", "t-other", "t-account"):
        reviews.authenticate(jwt(name).encode())
    assert (len(api.reviews), api.connections) == (3, 1)


def test_questions_are_bounded_and_known_tokens_do_not_wait(reviews: TokenReviews, api: ApiServer) -> None:
    reviews.authenticate(jwt("t-worker").encode())
    api.hold = threading.Event()

    def forge(number: int) -> None:
        with pytest.raises(Unauthenticated):
            reviews.authenticate(jwt(f"forged-{number}").encode())

    threads = [
        threading.Thread(target=forge, args=(n,))
        for n in range(token_review.REVIEWS_AT_ONCE + token_review.REVIEWS_WAITING)
    ]
    for thread in threads:
        thread.start()
    while reviews._places._value:
        threads[0].join(0.01)
    with pytest.raises(AccessUnknown, match="which is the limit"):
        reviews.authenticate(jwt("one-more").encode())
    assert reviews.authenticate(jwt("t-worker").encode()).role is Role.PUBLISH
    api.hold.set()
    for thread in threads:
        thread.join()
    assert not reviews._asking


def test_refused_tokens_push_no_good_one_out(
    reviews: TokenReviews, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_review, "KNOWN_TOKENS", 1)
    reviews.authenticate(jwt("t-worker").encode())
    for n in range(5):
        with pytest.raises(Unauthenticated):
            reviews.authenticate(jwt(f"forged-{n}").encode())
    asked = len(api.reviews)
    reviews.authenticate(jwt("t-worker").encode())
    assert len(api.reviews) == asked


def test_many_calls_with_one_token_are_one_question(reviews: TokenReviews, api: ApiServer) -> None:
    api.hold = threading.Event()
    callers: list[Caller] = []
    threads = [
        threading.Thread(target=lambda: callers.append(reviews.authenticate(jwt("t-worker").encode())))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    api.hold.set()
    for thread in threads:
        thread.join()
    assert len(callers) == 8
    assert len(api.reviews) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"oops"),
        (403, b"{}"),
        (201, b"no json"),
        (201, b"[]"),
        (201, b"{}"),
        (201, json.dumps({"status": {"authenticated": True}}).encode()),
        (201, json.dumps({"status": {"authenticated": True, "user": {"username": ""}}}).encode()),
        (201, json.dumps({"status": {"authenticated": True, "user": {"username": ["x"]}}}).encode()),
    ],
)
def test_answer_that_is_none_allows_nothing_and_is_not_remembered(
    reviews: TokenReviews, api: ApiServer, answer: tuple[int, bytes]
) -> None:
    api.answer = answer
    with pytest.raises(AccessUnknown, match="cannot be judged at the moment"):
        reviews.authenticate(jwt("t-worker").encode())
    api.answer = None
    assert reviews.authenticate(jwt("t-worker").encode()).role is Role.PUBLISH


@pytest.mark.parametrize("word", ["true", 1, "yes"])
def test_only_true_is_authenticated(reviews: TokenReviews, api: ApiServer, word: object) -> None:
    status = {"authenticated": word, "user": {"username": "system:serviceaccount:models:vllm"}}
    api.answer = (201, json.dumps({"status": status}).encode())
    with pytest.raises(Unauthenticated):
        reviews.authenticate(jwt("t-worker").encode())


def test_audience_is_asked_for_and_checked(api: ApiServer, subjects: Path) -> None:
    reviews = TokenReviews(
        FileSubjects(AccessFile(subjects)), api.url, audiences=("mxserver",), account_folder=api.account
    )
    with pytest.raises(Unauthenticated):
        reviews.authenticate(jwt("t-worker").encode())
    assert api.reviews[-1]["spec"]["audiences"] == ["mxserver"]
    user = service_account("models", "vllm")
    for audiences in ([], None, ["other"]):  # an authenticator that knows no audiences leaves them out
        api.answer = (
            201,
            json.dumps({"status": {"authenticated": True, "user": user, "audiences": audiences}}).encode(),
        )
        with pytest.raises(Unauthenticated, match="not for the audience mxserver"):
            reviews.authenticate(jwt(f"t-{audiences}").encode())
    api.answer, api.audiences = None, ["mxserver"]
    assert reviews.authenticate(jwt("t-other").encode()).role is Role.PUBLISH


def test_one_of_several_audiences_is_enough(api: ApiServer, subjects: Path) -> None:
    reviews = TokenReviews(
        FileSubjects(AccessFile(subjects)), api.url, audiences=("mxserver", "modelexpress"), account_folder=api.account
    )
    api.audiences = ["modelexpress"]
    assert reviews.authenticate(jwt("t-worker").encode()).role is Role.PUBLISH
    assert api.reviews[-1]["spec"]["audiences"] == ["mxserver", "modelexpress"]


def test_nobody_but_the_allowed_accounts(api: ApiServer) -> None:
    allowed = AllowedAccounts(["models:vllm"])
    reviews = TokenReviews(allowed, api.url, account_folder=api.account)
    assert reviews.authenticate(jwt("t-worker").encode()) == Caller(
        "system:serviceaccount:models:vllm/vllm-0", Role.PUBLISH
    )
    for token, account in (("t-account", "models:batch"), ("t-stranger", "games:chess")):
        with pytest.raises(Unauthenticated, match=f"system:serviceaccount:{account} is not among the allowed accounts"):
            reviews.authenticate(jwt(token).encode())
    for other in ("vllm", "models:vllm", "system:serviceaccount:models:vllm:x", "system:serviceaccount:models:*"):
        with pytest.raises(Unauthenticated):
            allowed.role_of(other)


def test_the_access_file_gives_allowed_accounts_their_roles(subjects: Path) -> None:
    both = AllowedAccounts(["models:batch", "games:chess"], FileSubjects(AccessFile(subjects)))
    assert both.role_of("system:serviceaccount:models:batch") is Role.READ
    with pytest.raises(Unauthenticated, match="is not among the allowed accounts"):
        both.role_of("system:serviceaccount:models:vllm")
    with pytest.raises(Unauthenticated, match="has no role"):
        both.role_of("system:serviceaccount:games:chess")


def test_api_server_of_another_authority_is_not_asked(api: ApiServer, subjects: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (api.account / "ca.crt").write_bytes(Authority(tmp_path / "other").ca_file.read_bytes())
    with pytest.raises(AccessUnknown):
        TokenReviews(FileSubjects(AccessFile(subjects)), api.url, account_folder=api.account).authenticate(
            jwt("t-worker").encode()
        )
    assert api.reviews == []


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "https://kubernetes.default.svc"),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://10.96.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://10.96.0.1:6443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}, "https://[fd00::1]:443"),
    ],
)
def test_the_api_server_is_where_kubernetes_says(environ: dict[str, str], url: str) -> None:
    assert api_server(environ) == url


def test_ca_that_is_none_is_refused_at_start(api: ApiServer, subjects: Path) -> None:
    (api.account / "ca.crt").write_text("no PEM")
    with pytest.raises(SettingError, match=r"ca\.crt, cannot be used"):
        TokenReviews(FileSubjects(AccessFile(subjects)), api.url, account_folder=api.account)


def test_server_with_token_review(
    start_server: StartServer, api: ApiServer, subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxserver.security.setup.ACCOUNT_FOLDER", api.account)
    for name, value in api.environ.items():
        monkeypatch.setenv(name, value)
    server = start_server(auth="kubernetes", auth_file=subjects)

    def client(token: str) -> ServerClient:
        path = tmp_path / token
        path.write_text(jwt(token))
        return ServerClient(f"127.0.0.1:{server.port}", credentials=ClientCredentials(token_file=path))

    with client("t-worker") as worker, client("t-other") as other, client("t-account") as account:
        epoch = worker.publish(IDENTITY, WORKER, "w").epoch
        worker.update_status(SOURCE, "w", 0, READY, epoch=epoch)
        with pytest.raises(ServerRefused, match=r"PERMISSION_DENIED.*models:vllm/vllm-1"):
            other.update_status(SOURCE, "w", 0, READY)
        assert len(account.list_sources()) == 1
        with pytest.raises(ServerRefused, match=r"has the role read; .* needs publish"):
            account.publish(IDENTITY, WORKER, "x")
    api.answer = (503, b"")
    with client("t-fresh") as fresh, pytest.raises(ServerUnreachable, match="API server does not answer") as caught:
        fresh.list_sources()
    assert isinstance(caught.value.__cause__, grpc.RpcError)
