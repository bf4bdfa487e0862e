"""Names in the environment: ours, misspelt ones, and those that Kubernetes makes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxserver.limits import MEANINGS
from mxserver.wire import BY_NAME, VARIABLES, environment, is_kubernetes_value, misspelt, setting, without_effect
from mxserver.wire.removed_names import REMOVED
from mxserver.wire.unused_names import NOT_TOLD

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


def test_names_of_other_versions_are_known_and_said_to_have_no_effect() -> None:
    environ = {
        "REDIS_URL": "redis://r",
        "MX_CONTIGUOUS_REG": "1",
        "MX_METADATA_PORT": "1",
        "MX_REFIT_X": "2",
        "MX_S3_Y": "",
    }
    assert misspelt(environ) == []
    assert without_effect(environ, "server") == []
    assert without_effect(environ, "worker") == ["MX_METADATA_PORT", "MX_CONTIGUOUS_REG", "MX_REFIT_X"]


def test_warnings_are_one_line_a_misspelt_name_and_one_for_all_without_effect() -> None:
    environ = {"MX_LAYUOT": "raw", "MX_QUITE_ELSE": "1", "MX_METADATA_PORT": "1", "MX_POOL_REG": "1"}
    assert environment.warnings_for(environ, "worker") == [
        "MX_LAYUOT is no setting; the nearest one is MX_LAYOUT",
        "MX_QUITE_ELSE is no setting",
        "MX_METADATA_PORT, MX_POOL_REG have no effect here (docs/reference/settings.md says why)",
    ]
    assert environment.warnings_for({"MX_METADATA_NAMESPACE": "n"}, "server") == [
        "MX_METADATA_NAMESPACE has no effect here (docs/reference/settings.md says why)"
    ]


def published_names() -> list[tuple[str, str]]:
    """The names that manifests for NVIDIA's ModelExpress 0.3 to 0.8 set, each with who reads it there."""
    lines = (Path(__file__).parent / "published_names.txt").read_text().splitlines()
    return [(name, reader) for line in lines if line and line[0] != "#" for reader, _, name in [line.partition(" ")]]


@pytest.mark.parametrize(("name", "reader"), published_names())
def test_every_published_name_is_mapped_or_said_to_have_no_effect(name: str, reader: str) -> None:
    environ = {name: "1"}
    assert misspelt(environ) == []
    assert environment.unprotected(environ) == ""
    mapped = name in BY_NAME and BY_NAME[name].reader in (reader, "both", "plugin")
    told = name in without_effect(environ, "server" if reader == "server" else "worker")
    assert mapped != told or name in NOT_TOLD, f"{name}: mapped {mapped}, said to have no effect {told}"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("MX_AUTH_FIEL", "MX_AUTH_FILE"),
        ("MX_TLS_SKIP_VERIFY", None),
        ("MODEL_EXPRESS_SECURITY_MOD", "MODEL_EXPRESS_SECURITY_MODE"),
        ("MX_ATUH", "MX_AUTH"),
    ],
)
def test_a_misspelt_name_that_protects_is_not_ignored(name: str, near: str | None) -> None:
    reason = environment.unprotected({name: "x", "MX_LAYUOT": "raw"})
    assert reason.startswith(f"{name} is no setting")
    assert near is None or f"did you mean {near}?" in reason
    assert "MX_LAYUOT" not in reason
    assert environment.unprotected({name: " "}) == ""


def test_what_kubernetes_makes_of_a_service_named_mx_auth_protects_nothing() -> None:
    environ = {
        "MX_AUTH_PORT": "tcp://10.0.0.7:1",
        "MX_AUTH_SERVICE_HOST": "10.0.0.7",
        "MX_AUTH_PORT_1_TCP_PROTO": "tcp",
    }
    assert environment.unprotected(environ) == ""


@pytest.mark.parametrize("reader", ["server", "worker", "both", "plugin", "build"])
def test_names_with_effect_are_read_by_the_code_that_they_name(reader: str) -> None:
    """A name in the table that nobody reads would be a setting without an effect."""
    shared = "mxserver/wire/credentials/credentials.py"
    sources = {"server": ["mxserver/settings.py"], "worker": ["mxcore/settings.py", shared], "build": ["setup.py"]}
    sources["plugin"] = ["vllm_plugin/formats.py", "vllm_plugin/route/endpoint.py"]
    sources["both"] = ["mxserver/settings.py", shared]
    nodes = [node for name in sources[reader] for node in ast.walk(ast.parse((ROOT / name).read_text()))]
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {variable.name for variable in VARIABLES if variable.reader == reader}
    assert named <= words


def test_a_name_that_was_a_setting_says_what_replaced_it() -> None:
    environ = {"MX_SAME_HOST_THREADS": "2", "MX_TOPOLOGY": " ", "MX_CONFIG_FILE": "tcp://10.0.0.7:1"}
    assert environment.warnings_for(environ, "worker") == [
        "MX_SAME_HOST_THREADS is no setting any more: one thread a core reads, at most four"
    ]
    assert environment.unprotected(environ) == ""
    reason = environment.unprotected({"MX_AUTH_AUDIENCE": "x"})
    assert reason.startswith("MX_AUTH_AUDIENCE is no setting any more: set MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES")


def test_removed_names_are_gone_and_what_they_name_is_there() -> None:
    names = [removed.name for removed in REMOVED]
    assert sorted(set(names)) == sorted(names)
    assert not set(names) & set(BY_NAME)
    for removed in REMOVED:
        for name in re.findall(r"\b(?:MX|MODEL_EXPRESS)_[A-Z0-9_]+", removed.instead):
            assert name in BY_NAME
        for limit in re.findall(r"(\w+)=NUMBER", removed.instead):
            assert limit in MEANINGS


def test_settings_beside_those_that_manifests_have_already_do_not_grow() -> None:
    """Fifty are wanted: a new one takes the place of one that nobody needs."""
    published = {name for name, _ in published_names()}
    own = sorted(set(BY_NAME) - published)
    assert len(own) <= 55, own
