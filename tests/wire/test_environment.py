"""Names in the environment: ours, misspelt ones, and those that Kubernetes makes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.wire import environment
from mxserver.wire.environment import BY_NAME, VARIABLES, is_kubernetes_value, misspelt, setting, without_effect

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_unique_and_described() -> None:
    assert len(BY_NAME) == len(VARIABLES)
    assert all(variable.meaning and not variable.meaning.endswith(".") for variable in VARIABLES)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("MX_TRANSPROT", "MX_TRANSPORT"),
        ("MX_SERVER_ADDRES", "MX_SERVER_ADDRESS"),
        ("MODEL_EXPRESS_URI", "MODEL_EXPRESS_URL"),
        ("MODEL_EXPRESS_LOGLEVEL", "MODEL_EXPRESS_LOG_LEVEL"),
        ("MX_HEARTBEAT_TIMEOUT_SEC", "MX_HEARTBEAT_TIMEOUT_SECS"),
    ],
)
def test_misspelt_names_come_with_the_nearest(wrong: str, nearest: str) -> None:
    assert misspelt({wrong: "1", "PATH": "/bin", "MX_LAYOUT": "raw"}) == [(wrong, nearest)]


@given(st.sampled_from(sorted(BY_NAME)), st.text(max_size=5))
def test_known_names_are_never_misspelt(name: str, value: str) -> None:
    assert misspelt({name: value}) == []


# What `kubectl exec … env` shows for services named mx-server (with a named port) and model-express-server.
KUBERNETES = {
    "MX_SERVER_SERVICE_HOST": "10.0.0.7",
    "MX_SERVER_SERVICE_PORT": "8001",
    "MX_SERVER_SERVICE_PORT_GRPC": "8001",
    "MX_SERVER_PORT": "tcp://10.0.0.7:8001",
    "MX_SERVER_PORT_8001_TCP": "tcp://10.0.0.7:8001",
    "MX_SERVER_PORT_8001_TCP_PROTO": "tcp",
    "MX_SERVER_PORT_8001_TCP_PORT": "8001",
    "MX_SERVER_PORT_8001_TCP_ADDR": "10.0.0.7",
    "MX_DNS_PORT_53_UDP_ADDR": "10.0.0.9",
    "MODEL_EXPRESS_SERVER_SERVICE_HOST": "10.0.0.8",
    "MODEL_EXPRESS_SERVER_PORT": "tcp://10.0.0.8:8001",
    "MX_REDIS_PORT": "tcp://10.0.0.8:6379",
}


def test_what_kubernetes_injects_is_no_setting_and_not_misspelt() -> None:
    assert misspelt(KUBERNETES) == []
    assert without_effect(KUBERNETES, "server") == []
    assert setting(KUBERNETES, "MODEL_EXPRESS_SERVER_PORT") is None
    assert environment.warnings_for(KUBERNETES, "server") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("tcp://10.0.0.1:80", True),
        (" UDP://x:1", True),
        ("sctp://[::1]:1", True),
        ("8001", False),
        ("", False),
        ("http://server:8001", False),
        ("server:8001", False),
    ],
)
def test_kubernetes_values(value: str, expected: bool) -> None:
    assert is_kubernetes_value(value) is expected


def test_setting_is_stripped_and_empty_is_unset() -> None:
    environ = {"MX_LAYOUT": "  raw ", "MX_TRANSPORT": "  "}
    assert setting(environ, "MX_LAYOUT") == "raw"
    assert setting(environ, "MX_TRANSPORT") is None
    assert setting(environ, "MX_STORE_PATH") is None


def test_names_of_later_versions_are_known_and_said_to_have_no_effect() -> None:
    environ = {"REDIS_URL": "redis://r", "MX_CONTIGUOUS_REG": "1", "MX_METADATA_PORT": "1", "MX_EXPECTED_WORKERS": ""}
    assert misspelt(environ) == []
    assert without_effect(environ, "server") == []
    assert [v.name for v in without_effect(environ, "worker")] == ["MX_METADATA_PORT", "MX_CONTIGUOUS_REG"]


def test_warnings_are_one_line_a_name() -> None:
    lines = environment.warnings_for({"MX_LAYUOT": "raw", "MX_METADATA_PORT": "1"}, "worker")
    assert lines == [
        "MX_LAYUOT is no setting; the nearest one is MX_LAYOUT",
        "MX_METADATA_PORT (port of NIXL's own metadata exchange) has no effect in this version",
    ]


@pytest.mark.parametrize("reader", ["server", "worker", "both", "build"])
def test_names_with_effect_are_read_by_the_code_that_they_name(reader: str) -> None:
    """A name in the table that nobody reads would be a setting without an effect."""
    shared = "mxserver/wire/calls/credentials.py"
    sources = {"server": ["mxserver/settings.py"], "worker": ["mxcore/settings.py", shared], "build": ["setup.py"]}
    sources["both"] = ["mxserver/settings.py", shared]
    nodes = [node for name in sources[reader] for node in ast.walk(ast.parse((ROOT / name).read_text()))]
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {variable.name for variable in VARIABLES if variable.reader == reader}
    effective = {variable.name for variable in VARIABLES if variable.reader == reader and variable.has_effect}
    assert named & words == effective
