"""The settings file, --check-config, --print-config: who wins, what is refused, what is shown."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxbench.stand_ins.authority import Authority
from mxserver.config_file import as_toml, read_config
from mxserver.settings import FLAGS, ServerSettings, as_config, config_of, load_settings, load_with_origins, shown
from mxserver.wire import SettingError
from mxserver.wire.calls import ServerClient
from tests.security.conftest import access_file
from tests.server.command.test_cli import mxserver
from tests.server.conftest import ServerProcess


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mxserver.toml"


def loaded(path: Path, text: str, **flags: str) -> ServerSettings:
    path.write_text(text)
    return load_settings(flags, read_config(path, ServerSettings.model_fields))


def test_flag_wins_over_environment_over_file_over_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_EXPRESS_SERVER_PORT", "2")
    monkeypatch.setenv("MX_GC_TIMEOUT_SECS", "20")
    path.write_text("port = 3\ngc_timeout_seconds = 30\ndrain_seconds = 3.5\n")
    file = read_config(path, ServerSettings.model_fields)
    settings, origins = load_with_origins({"port": "1", "host": None}, file)
    assert (settings.port, settings.gc_timeout_seconds, settings.drain_seconds) == (1, 20, 3.5)
    assert settings.heartbeat_timeout_seconds == 90
    assert (origins["port"], origins["gc_timeout_seconds"]) == ("--port", "MX_GC_TIMEOUT_SECS")
    assert (origins["drain_seconds"], origins["heartbeat_timeout_seconds"]) == (str(path), "default")


def test_every_setting_can_come_from_the_file(path: Path) -> None:
    values = {
        "host": "127.0.0.1",
        "store": "redis",
        "redis_url": "redis://u:p@h/0",
        "cache_max_bytes": "1GiB",
        "file_sources": ["/a", "/b"],
        "store_path": "/s",
        "metrics_port": 9,
    }
    text = "\n".join(
        f"{name} = {value!r}" if not isinstance(value, int) else f"{name} = {value}" for name, value in values.items()
    )
    settings = loaded(path, text)
    assert settings.file_sources == (Path("/a"), Path("/b"))
    assert (settings.cache_max_bytes, settings.store_path, settings.metrics_port) == (2**30, Path("/s"), 9)
    assert settings.effective_redis_url == "redis://u:p@h/0"
    assert settings.model_fields_set == set(values)


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ({}, "redis://localhost:6379/0"),
        ({"redis_host": "r", "redis_port": "7"}, "redis://r:7/0"),
        ({"redis_host": "fd00::1"}, "redis://[fd00::1]:6379/0"),
        ({"redis_host": "r", "redis_url": "rediss://s:1"}, "rediss://s:1"),
    ],
)
def test_url_of_redis(flags: dict[str, str], url: str) -> None:
    assert load_settings(flags).effective_redis_url == url


def test_service_of_kubernetes_named_mx_redis_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_REDIS_PORT", "tcp://10.0.0.9:6379")
    assert load_settings({}).redis_port == 6379


# The port of probes, metrics and page


@pytest.mark.parametrize(
    ("environ", "flags", "text", "port"),
    [
        ("0", {}, "", None),  # as manifests for NVIDIA's server mean it
        ("off", {}, "", None),
        ("9", {}, "", 9),
        ("", {"metrics_port": "0"}, "", 0),
        ("", {"metrics_port": "off"}, "", None),
        ("0", {"metrics_port": "0"}, "", 0),
        ("", {}, "metrics_port = 0", 0),
        ("", {}, "metrics_port = 'off'", None),
        ("0", {}, "metrics_port = 7", None),
        ("tcp://10.0.0.1:9401", {}, "", 9401),
    ],
)
def test_metrics_port(
    path: Path, monkeypatch: pytest.MonkeyPatch, environ: str, flags: dict[str, str], text: str, port: int | None
) -> None:
    monkeypatch.setenv("MODEL_EXPRESS_SERVER_METRICS_PORT", environ)
    settings = loaded(path, text, **flags)
    assert settings.effective_metrics_port == port
    origins = load_with_origins(flags, read_config(path, ServerSettings.model_fields))[1]
    monkeypatch.delenv("MODEL_EXPRESS_SERVER_METRICS_PORT")
    assert loaded(path, "\n".join(as_config(settings, origins))).effective_metrics_port == port


def test_server_without_probes_metrics_and_page(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(MODEL_EXPRESS_SERVER_METRICS_PORT="0", MX_SERVER_FILES_PORT="off")
    server.wait_for(r"no status page, metrics and HTTP probes: they are off")
    assert not [line for line in server.lines if "status page on" in line]
    with ServerClient(server.address) as client:
        assert client.health().status == "ok"
        assert client.list_sources() == []
    assert listening_ports(server.process.pid) == {server.port}


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which a process listens: its sockets' inodes, looked up in the kernel's tables."""
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.add(str(link.readlink()))
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in links:
                listening.add(int(local.rpartition(":")[2], 16))
    return listening


def test_a_store_in_objects_of_kubernetes_is_refused_with_what_does_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_METADATA_BACKEND", "kubernetes")
    with pytest.raises(
        SettingError, match=r"nothing is kept in objects of Kubernetes: sqlite on a volume does for one"
    ):
        load_settings({})


# What is refused


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot = 1", "'prot' is no setting; the nearest one is 'port'"),
        ("[server]\nport = 1", "'server' is no setting"),
        ("MX_STORE_PATH = '/s'\nportt = 1", "'portt' is no setting; the nearest one is 'port'"),
        ("port = true", "port = true must be a string or a number"),
        ("port = ", "is not TOML"),
        ("\xff", "is not TOML"),
    ],
)
def test_file_that_breaks_a_rule_is_refused_by_key_and_nearest(path: Path, text: str, named: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingError, match=re.escape(named)) as caught:
        read_config(path, ServerSettings.model_fields)
    assert f"settings file {path}" in str(caught.value)


@pytest.mark.parametrize("value", ["'eighty'", "70000", "1.5", "[1]", "{a = 1}", "1979-05-27"])
def test_bad_value_is_refused_with_its_file_rule_and_remedy(path: Path, value: str) -> None:
    with pytest.raises(SettingError, match="must be a whole number from 0 to 65535") as caught:
        loaded(path, f"port = {value}")
    assert str(caught.value).startswith("port = ")
    assert f"in {path} is refused" in str(caught.value)
    assert "take the line out for 8001" in str(caught.value)


def test_missing_file_is_refused(path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot be read .*--config"):
        config_of(str(path))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"tls_cert_file": "/c"}, "belong together"),
        ({"tls_client_ca_file": "/c"}, "needs --tls-cert"),
        ({"auth": "file"}, "--auth file needs --auth-file"),
        ({"auth": "kubernetes"}, "--auth kubernetes needs --auth-file"),
        ({"auth_file": "/a"}, "no effect without --auth"),
    ],
)
def test_settings_that_only_make_sense_together(flags: dict[str, str], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        load_settings(flags)


# What is shown


def test_printed_settings_are_a_file_with_the_same_settings(path: Path) -> None:
    flags = {"port": "7", "file_sources": "/a b:/ü\"'", "drain_seconds": "1e-3", "log_level": "debug"}
    settings, origins = load_with_origins(flags)
    lines = as_config(settings, origins)
    assert len(lines) == len(FLAGS)
    assert "port = 7  # --port" in lines
    assert "# redis_url is unset" in lines
    assert loaded(path, "\n".join(lines)) == settings


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_file(text: str) -> None:
    assert tomllib.loads(as_toml("a", text, "x")) == {"a": text}


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://u:p@ss:w@h:1/0", "redis://u:***@h:1/0"),
        ("redis://:secret@h", "redis://:***@h"),
        ("unix://u:secret@/run/s", "unix://u:***@/run/s"),
        ("redis://h:1/0?password=secret", "redis://h:1/0?password=***"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)
def test_passwords_are_not_shown(url: str, safe: str) -> None:
    assert shown("redis_url", url) == safe
    lines = as_config(*load_with_origins({"redis_url": url}))
    assert f'redis_url = "{safe}"  # --redis-url' in lines


def test_refused_url_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "http://u:secret@h")
    with pytest.raises(SettingError, match="REDIS_URL='http://u:") as caught:
        load_settings({})
    assert "secret" not in str(caught.value)


# The command


def test_print_config_says_where_each_value_comes_from(path: Path) -> None:
    path.write_text("port = 9\n")
    run = mxserver("--config", str(path), "--store", "memory", "--print-config", MX_GC_TIMEOUT_SECS="7")
    assert run.returncode == 0
    lines = run.stdout.splitlines()
    assert f"port = 9  # {path}" in lines
    assert 'store = "memory"  # --store' in lines
    assert "gc_timeout_seconds = 7.0  # MX_GC_TIMEOUT_SECS" in lines
    assert 'log_level = "info"  # default' in lines


def test_check_config_finds_what_would_fail_at_the_start(path: Path, tmp_path: Path) -> None:
    cert, key = Authority(tmp_path).issue("server", "localhost")
    rules = access_file(tmp_path / "access.toml", ("a", "read", "x"))
    path.write_text(
        f'tls_cert_file = "{cert}"\ntls_key_file = "{key}"\nauth = "file"\nauth_file = "{rules}"\nport = 1\n'
    )
    run = mxserver("--check-config", "--config", str(path))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "mxserver: the settings are good\n")
    rules.write_text("[[tokens]]\nname = 'a'\n")
    run = mxserver("--check-config", "--config", str(path))
    assert run.returncode == 2
    assert "[[tokens]] number 1 (a): role None must be read, publish or admin" in run.stderr
    access_file(rules, ("a", "read", "x"))
    key.unlink()
    run = mxserver("--check-config", "--config", str(path))
    assert run.returncode == 2
    assert f"certificate {cert} and key {key} cannot be used" in run.stderr
    path.write_text("prot = 1\n")
    run = mxserver("--check-config", "--config", str(path))
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"mxserver: settings file .*: 'prot' is no setting; .* \[MX_SETTING\]\n", run.stderr)


def test_unprotected_server_is_one_loud_line() -> None:
    run = mxserver("--check-config", "--host", "0.0.0.0")  # noqa: S104
    assert run.returncode == 0
    assert run.stderr.count("NOT PROTECTED") == 1
    run = mxserver("--check-config", "--host", "127.0.0.1")
    assert "NOT PROTECTED" not in run.stderr
