"""A deployment of NVIDIA's server that was secured stays so here: its switch is ours, or the server does not start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxbench.stand_ins.authority import Authority
from mxserver.settings import ServerSettings, load_settings, load_with_origins
from mxserver.wire import ServerRefused, SettingError
from mxserver.wire.calls import ServerClient
from mxserver.wire.credentials import ClientCredentials, credentials
from mxserver.wire.proto import p2p_pb2
from tests.security.conftest import IDENTITY, READY, WORKER, StartServer, access_file
from tests.security.kubernetes_stand_in import ApiServer, jwt, service_account

MODE, ACCOUNTS, AUDIENCES, TTL = (
    "MODEL_EXPRESS_SECURITY_MODE",
    "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS",
    "MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES",
    "MODEL_EXPRESS_SECURITY_CACHE_TTL_SECS",
)
# What llm-d's guide sets (tests/vllm/published_examples.toml has where it stands), its namespace filled in.
ENFORCED = {MODE: "enforce", AUDIENCES: "modelexpress", ACCOUNTS: "models:modelexpress-p2p-nvidia-gpu-vllm-sa"}


@pytest.fixture
def api(authority: Authority, tmp_path: Path) -> Iterator[ApiServer]:
    started = ApiServer(authority, tmp_path)
    started.audiences = ["modelexpress"]
    started.users[jwt("t-worker")] = service_account("models", "modelexpress-p2p-nvidia-gpu-vllm-sa", "decode-0")
    started.users[jwt("t-other")] = service_account("models", "default", "other-0")
    yield started
    started.close()


def settings(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], **flags: str) -> ServerSettings:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return load_settings(flags)


def mxserver(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A server that is not to start: one that does is killed when the time is over, and fails the test."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS_"))}
    command = [sys.executable, "-m", "mxserver", "--host", "127.0.0.1", "--port", "0", "--store", "memory", *arguments]
    return subprocess.run(command, env={**plain, **environ}, capture_output=True, text=True, check=False, timeout=120)


def test_enforce_is_token_review_with_the_list(
    start_server: StartServer, api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ENFORCED, **api.environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mxserver.security.setup.ACCOUNT_FOLDER", api.account)
    server = start_server()

    def client(token: str | None) -> ServerClient:
        path = tmp_path / "token"
        path.write_text(jwt(token) if token else "")
        shown = ClientCredentials(token_file=path if token else None)
        return ServerClient(f"127.0.0.1:{server.port}", credentials=shown)

    with client("t-worker") as worker:
        worker.publish(IDENTITY, WORKER, "w")
        assert len(worker.list_sources()) == 1
    assert api.reviews[-1]["spec"]["audiences"] == ["modelexpress"]
    with client("t-other") as other, pytest.raises(ServerRefused, match="models:default is not among the allowed"):
        other.list_sources()
    with client(None) as nobody, pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
        nobody.update_status("0" * 16, "w", 0, READY)
    api.audiences = ["another"]
    api.users[jwt("t-elsewhere")] = api.users[jwt("t-worker")]
    with client("t-elsewhere") as elsewhere, pytest.raises(ServerRefused, match="UNAUTHENTICATED"):
        elsewhere.publish(p2p_pb2.SourceIdentity(model_name="m"), WORKER, "x")


def test_its_names_are_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {MODE: "Enforce", ACCOUNTS: " a:b , c:d.e,", AUDIENCES: "x, y", TTL: "5"}
    found = settings(monkeypatch, environ)
    assert (found.auth, found.auth_accounts, found.auth_audience) == ("kubernetes", ("a:b", "c:d.e"), ("x", "y"))
    assert found.auth_cache_seconds == 5
    origins = load_with_origins({})[1]
    assert (origins["auth"], origins["auth_audience"]) == (MODE, AUDIENCES)
    assert load_settings({"auth_audience": "z"}).auth_audience == ("z",)  # a flag wins


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({MODE: "enforce"}, {}, f"Set {ACCOUNTS} and {AUDIENCES}, or unset {MODE}"),
        ({MODE: "enforce", ACCOUNTS: "a:b"}, {}, f"Set {AUDIENCES}, or unset"),
        ({MODE: "enforce", AUDIENCES: "x"}, {}, f"Set {ACCOUNTS}, or unset"),
        ({MODE: "enforce", ACCOUNTS: " , ", AUDIENCES: "x"}, {}, f"Set {ACCOUNTS}, or unset"),
        ({MODE: "kubernetes", ACCOUNTS: "a:b"}, {}, f"{MODE}='kubernetes' is refused: it must be off or enforce"),
        ({MODE: "enforce", ACCOUNTS: "vllm", AUDIENCES: "x"}, {}, "must be namespace:name of service accounts"),
        ({MODE: "enforce", ACCOUNTS: "a:*", AUDIENCES: "x"}, {}, "must be namespace:name of service accounts"),
        ({MODE: "enforce", ACCOUNTS: "a:b", AUDIENCES: "x y"}, {}, f"{AUDIENCES}="),
        ({ACCOUNTS: "a:b"}, {}, f"{ACCOUNTS} would have no effect"),
        ({AUDIENCES: "x"}, {}, f"{AUDIENCES} would have no effect"),
        ({"MX_AUTH_AUDIENCE": "x"}, {}, f"MX_AUTH_AUDIENCE is no setting any more: set {AUDIENCES}"),
        ({"MODEL_EXPRESS_SECURITY_MODUS": "enforce"}, {}, "MODEL_EXPRESS_SECURITY_MODUS is no setting, did you mean"),
        ({"MODEL_EXPRESS_SECURITY_ALLOWED_ACCOUNTS": "a:b"}, {}, "it looks like one that protects"),
        ({"MX_TLS_CERT": "/c"}, {}, "MX_TLS_CERT is no setting"),
        ({"MX_AUTH_FIEL": "/c"}, {}, "did you mean MX_AUTH_FILE?"),
        ({**ENFORCED, "MX_AUTH": "file"}, {}, "say different things"),
        ({**ENFORCED, "MX_AUTH": "off"}, {}, "say different things"),
        (ENFORCED, {"auth": "off"}, f"{MODE}=enforce and --auth off say different things"),
        ({**ENFORCED, TTL: "-1"}, {}, f"{TTL}='-1' is refused"),
    ],
)
def test_what_would_not_be_honoured_is_refused(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], flags: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingError) as caught:
        settings(monkeypatch, environ, **flags)
    assert said in str(caught.value)


def test_off_is_off_whatever_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kubectl set env` leaves it behind when somebody switches it off."""
    assert settings(monkeypatch, {**ENFORCED, MODE: "off"}).auth == "off"


def test_two_names_that_agree_are_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rules = access_file(tmp_path / "access.toml", ("a", "read", ""), kind="subjects")
    environ = {**ENFORCED, "MX_AUTH": "kubernetes", "MX_AUTH_FILE": str(rules)}
    assert settings(monkeypatch, environ).auth == "kubernetes"


@pytest.mark.parametrize("check", [("--check-config",), ()])
@pytest.mark.parametrize(
    ("environ", "said"),
    [({MODE: "enforce", ACCOUNTS: "a:b"}, f"Set {AUDIENCES}"), ({"MX_TLS_CRET_FILE": "/c"}, "MX_TLS_CERT_FILE")],
)
def test_neither_the_check_nor_the_start_passes(check: tuple[str, ...], environ: dict[str, str], said: str) -> None:
    run = mxserver(*check, **environ)
    assert (run.returncode, run.stdout) == (2, "")
    assert said in run.stderr
    assert run.stderr.endswith(" [MX_SETTING]\n")
    assert len(run.stderr.splitlines()) == 1


def test_a_client_whose_protection_is_misspelt_calls_nobody() -> None:
    """A worker then loads from storage and says why; `mx` ends with the reason."""
    with pytest.raises(SettingError, match=r"MX_TLS_CA_FIEL is no setting, did you mean MX_TLS_CA_FILE\?"):
        ClientCredentials.from_environ({"MX_TLS_CA_FIEL": "/ca"})
    assert ClientCredentials.from_environ({"MX_LAYUOT": "raw"}) == ClientCredentials()


def test_a_projected_token_is_found_without_being_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As llm-d's guide mounts it. It goes no other ways than one that is named: not over plain connections."""
    projected = tmp_path / "modelexpress"
    monkeypatch.setattr(credentials, "PROJECTED_TOKEN", projected)
    assert ClientCredentials.from_environ({}).token_file is None
    projected.write_text("t-worker")
    found = ClientCredentials.from_environ({})
    assert found.token_file == projected
    assert (found.authorization("mx.example:8001"), found.authorization("https://mx.example:8001")) == (
        None,
        "Bearer t-worker",
    )
    assert ClientCredentials.from_environ({"MX_AUTH_TOKEN_PATH": "/other"}).token_file == Path("/other")
