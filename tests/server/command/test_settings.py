"""The server's settings: who wins, what is refused and how, and that the flags are the settings."""

from __future__ import annotations

import logging
from pathlib import Path

import click
import pytest

from mxserver import logs
from mxserver.cli import main
from mxserver.setting_values import default_cache_directory, default_store_path
from mxserver.settings import FIELDS, FLAGS, OTHER_NAMES, ServerSettings, load_settings
from mxserver.wire import BY_NAME, VARIABLES, SettingError


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.port, settings.store, settings.log_level) == (8001, "sqlite", "info")
    assert settings.host == "0.0.0.0"  # noqa: S104
    assert (settings.heartbeat_timeout_seconds, settings.gc_timeout_seconds, settings.drain_seconds) == (90, 3600, 10)
    assert settings.store_path == default_store_path()


def test_flag_wins_over_environment_and_environment_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_EXPRESS_SERVER_PORT", " 9001 ")
    assert load_settings({"port": None}).port == 9001
    assert load_settings({"port": "9002"}).port == 9002


@pytest.mark.parametrize("value", ["tcp://10.0.0.7:8001", "", "  "])
def test_values_of_kubernetes_and_empty_ones_count_as_unset(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MODEL_EXPRESS_SERVER_PORT", value)
    assert load_settings({}).port == 8001


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "eighty"),
        ("port", "-1"),
        ("port", "65536"),
        ("port", "8001.5"),
        ("host", ""),
        ("host", "a b"),
        ("log_level", "loud"),
        ("store", "etcd"),
        ("redis_url", "localhost:6379"),
        ("redis_port", "0"),
        ("auth", "yes"),
        ("limits", "calls=0"),
        ("limits", "silence_seconds=0.5"),
        ("heartbeat_timeout_seconds", "0"),
        ("heartbeat_timeout_seconds", "nan"),
        ("gc_timeout_seconds", "-5"),
        ("gc_timeout_seconds", "inf"),
        ("drain_seconds", "10s"),
    ],
)
def test_bad_value_is_refused_by_name_value_rule_and_remedy(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    description = ServerSettings.model_fields[field].description
    name = str(ServerSettings.model_fields[field].alias)
    assert description is not None
    with pytest.raises(SettingError) as caught:
        load_settings({field: value})
    assert f"{FLAGS[field]} {value!r} is refused: it must be {description}" in str(caught.value)
    assert "leave the flag out for" in str(caught.value)
    if value:  # an empty variable is an unset one
        monkeypatch.setenv(name, value)
        with pytest.raises(SettingError) as caught:
            load_settings({})
        assert f"{name}={value!r} is refused: it must be {description}" in str(caught.value)
        assert "unset it for" in str(caught.value)


def test_all_bad_values_are_named_at_once_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_GC_TIMEOUT_SECS", "long")
    with pytest.raises(SettingError) as caught:
        load_settings({"port": "x"})
    message = str(caught.value)
    assert "--port" in message
    assert "MX_GC_TIMEOUT_SECS" in message
    assert "\n" not in message


@pytest.mark.parametrize("value", ["trace", "DEBUG", "Info", "warn", "WARNING", "error"])
def test_log_levels_of_existing_deployments_are_known(value: str) -> None:
    level = load_settings({"log_level": value}).log_level
    assert level in logs.LEVELS


def test_state_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_store_path() == Path("/state/mxserver/state.sqlite3")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("HOME", "/home/u")
    assert default_store_path() == Path("/home/u/.local/state/mxserver/state.sqlite3")


def test_table_of_names_flags_and_fields_agree() -> None:
    names = {str(field.alias) for field in ServerSettings.model_fields.values()}
    of_server = {v.name for v in VARIABLES if v.reader in ("server", "both")}
    assert names == of_server - set(OTHER_NAMES)
    options = {
        FIELDS.get(str(option.name), str(option.name)): option
        for option in main.params
        if isinstance(option, click.Option)
    }
    assert {name: [flag] for name, flag in FLAGS.items()} == {
        name: option.opts
        for name, option in options.items()
        if name not in ("version", "config", "print_config", "check_config")
    }
    assert set(FLAGS) == set(ServerSettings.model_fields)
    for field, info in ServerSettings.model_fields.items():
        text = options[field].help
        assert text is not None
        assert str(info.alias) in text
        assert BY_NAME[str(info.alias)].meaning[1:] in text
        if isinstance(info.default, str | float) and info.default:  # others are described
            assert text.endswith(
                f"default {str(info.default).removesuffix('.0') if field != 'host' else info.default}]"
            )


def test_log_lines_cannot_be_forged() -> None:
    record = logging.LogRecord("mxserver", logging.INFO, "", 0, "worker=%s", ("w\n2026 INFO fake\r",), None)
    line = logs.LineFormatter("%(asctime)s %(levelname)s %(message)s").format(record)
    assert line.endswith("INFO worker=w\\n2026 INFO fake\\r")
    assert "\n" not in line


def test_without_a_home_there_is_a_path_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in the password database, and no HOME (findings, row 17)."""

    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert default_store_path() == Path("/.local/state/mxserver/state.sqlite3")
    assert default_cache_directory() == Path("/.cache/huggingface/hub")
    assert load_settings({"store": "memory"}).store == "memory"
