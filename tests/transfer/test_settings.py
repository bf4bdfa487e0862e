"""The worker's settings: names, precedence, bad values, addresses."""

from __future__ import annotations

import logging

import pytest

from mxcore.settings import WorkerSettings, load_settings
from mxserver.wire import BY_NAME
from mxserver.wire.credentials.credentials import WORKER_NAMES


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_defaults() -> None:
    settings = load_settings({}, {})
    assert settings == WorkerSettings.model_validate({})
    assert settings.server_address is None
    assert (settings.transport, settings.layout, settings.nixl_backend) == ("auto", "auto", "UCX")
    assert settings.heartbeat_interval_seconds == 30


def test_every_setting_is_in_the_table_of_names() -> None:
    aliases = {field.alias for field in WorkerSettings.model_fields.values()}
    assert aliases <= BY_NAME.keys()
    with_effect = {v.name for v in BY_NAME.values() if v.reader in ("worker", "both")}
    upstream = {"MODEL_EXPRESS_URL", "MX_P2P_TOPOLOGY_ENFORCEMENT"}
    assert with_effect == aliases | {*upstream, *WORKER_NAMES}


def test_everything_comes_from_the_environment() -> None:
    settings = load_settings(
        {},
        {
            "MX_SERVER_ADDRESS": "http://mx:9000",
            "MX_SERVER_TIMEOUT_SECS": "2.5",
            "MX_WORKER_HOST": "10.1.2.3",
            "MX_WORKER_GRPC_PORT": "7000",
            "MX_HEARTBEAT_INTERVAL_SECS": "5",
            "MX_TRANSFER_TIMEOUT": "60",
            "MX_STALL_TIMEOUT_SECS": "3",
            "MX_SOURCE_WAIT_SECS": "7",
            "MX_SOURCE_RATE_LIMIT": "1.5 GB",
            "MX_SOURCE_MAX_READERS": "3",
            "MX_TCP_TRANSFER": "nixl",
            "MX_CHUNK_TLS": "off",
            "MX_WORKER_CHUNK_PORT": "7001",
            "MX_DRAIN_TIMEOUT_SECS": "0",
            "MX_ON_BAD_MEMORY": "end",
            "MX_TRANSPORT": "rdma",
            "MX_P2P_TOPOLOGY": "zone=a",
            "MX_P2P_TOPOLOGY_DOMAIN": "zone",
            "MX_P2P_TOPOLOGY_LEVELS": "zone, host",
            "MX_RDMA_NIC_PIN": "auto",
            "MX_RDMA_NIC_PIN_MIN_RATE_GBPS": "200",
            "MX_LAYOUT": "raw",
            "MX_NIXL_BACKEND": "LIBFABRIC",
            "MX_READ_MODE": "direct",
            "MX_GPUDIRECT_STORAGE": "off",
            "MX_HOST_MEMORY_LIMIT": "8GiB",
            "MX_MODEL_REVISION": "abc",
            "MX_LOAD_PATHS": "engine",
            "MX_MODEL_SIGNATURE": "require",
            "MX_MODEL_SIGNATURE_FILE": "other.sig",
            "MX_MODEL_SIGNATURE_KEY": "/keys/signer.pub",
            "MX_MODEL_SIGNATURE_CA": "/keys/authority.pem",
            "MX_MODEL_SIGNATURE_IDENTITY": "signer@example.com",
            "MX_MODEL_SIGNATURE_ISSUER": "https://issuer.example.com",
            "MX_MODEL_SIGNATURE_TRUST": "/keys/trusted_root.json",
            "MX_MODEL_URI": "s3://models/m",
            "MODEL_EXPRESS_NO_SHARED_STORAGE": "1",
            "MX_CACHE_WEIGHTS": "0",
            "MX_SOURCE_KEEP": "both",
            "MODEL_NAME": "org/model",
            "MX_MODEL_NAME_OVERRIDE": "org/other",
            "MX_EXPECTED_WORKERS": "8",
            "MX_SYNC_PUBLISH": "1",
            "MX_SYNC_START": "true",
            "MX_METRICS_PORT": "9402",
            "POD_NAME": "pod-1",
            "NODE_NAME": "node-1",
            "MX_METRICS_ENABLED": "0",
        },
    )
    assert settings.model_dump() == {
        "server_address": "mx:9000",
        "server_timeout_seconds": 2.5,
        "worker_host": "10.1.2.3",
        "worker_grpc_port": 7000,
        "heartbeat_interval_seconds": 5.0,
        "transfer_timeout_seconds": 60.0,
        "stall_timeout_seconds": 3.0,
        "source_wait_seconds": 7.0,
        "source_rate_limit": 1.5e9,
        "source_max_readers": 3,
        "tcp_transfer": "nixl",
        "chunk_tls": "off",
        "worker_chunk_port": 7001,
        "drain_timeout_seconds": 0.0,
        "on_bad_memory": "end",
        "transport": "rdma",
        "topology": "zone=a",
        "topology_required": "zone",
        "topology_levels": ("zone", "host"),
        "nic_pin": "auto",
        "nic_pin_least_gbps": 200.0,
        "layout": "raw",
        "nixl_backend": "LIBFABRIC",
        "read_mode": "direct",
        "gpudirect_storage": "off",
        "host_memory_limit": "8GiB",
        "model_revision": "abc",
        "load_paths": ("engine",),
        "model_signature": "require",
        "model_signature_file": "other.sig",
        "model_signature_key": "/keys/signer.pub",
        "model_signature_ca": "/keys/authority.pem",
        "model_signature_identity": "signer@example.com",
        "model_signature_issuer": "https://issuer.example.com",
        "model_signature_trust": "/keys/trusted_root.json",
        "model_uri": "s3://models/m",
        "no_shared_storage": True,
        "cache_weights": False,
        "source_keep": "both",
        "model_name": "org/model",
        "model_name_override": "org/other",
        "expected_workers": 8,
        "sync_publish": True,
        "sync_start": True,
        "metrics_port": 9402,
        "pod_name": "pod-1",
        "node_name": "node-1",
        "metrics_enabled": False,
    }


@pytest.mark.parametrize(
    ("overrides", "environ", "address"),
    [
        ({}, {"MX_SERVER_ADDRESS": "a:1"}, "a:1"),
        ({}, {"MX_SERVER_ADDRESS": "a:1", "MODEL_EXPRESS_URL": "http://b"}, "b:8001"),
        ({"MX_SERVER_ADDRESS": "c:1"}, {"MODEL_EXPRESS_URL": "b"}, "c:1"),
        ({"MODEL_EXPRESS_URL": "c:1"}, {"MX_SERVER_ADDRESS": "a:1"}, "c:1"),
        ({"server_address": "c:1"}, {"MX_SERVER_ADDRESS": "a:1"}, "c:1"),
        ({}, {"MODEL_EXPRESS_URL": "tcp://10.0.0.1:8001", "MX_SERVER_ADDRESS": "a:1"}, "a:1"),
        ({}, {"MODEL_EXPRESS_URL": "  "}, None),
    ],
)
def test_which_server(overrides: dict[str, object], environ: dict[str, str], address: str | None) -> None:
    assert load_settings(overrides, environ).server_address == address


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MX_TRANSPORT", "bogus", "'auto', 'same-host', 'tcp' or 'rdma'"),
        ("MX_STALL_TIMEOUT_SECS", "0", "greater than 0"),
        ("MX_TRANSFER_TIMEOUT", "soon", "valid number"),
        ("MX_WORKER_GRPC_PORT", "70000", "less than or equal to 65535"),
        ("MX_SERVER_ADDRESS", "ftp://x", "scheme"),
        ("MX_LAYOUT", "RAW", "'auto', 'processed' or 'raw'"),
    ],
)
def test_a_bad_value_warns_and_the_default_is_taken(
    caplog: pytest.LogCaptureFixture, name: str, value: str, said: str
) -> None:
    settings = load_settings({}, {name: value, "MX_MODEL_REVISION": "kept"})
    assert settings == WorkerSettings.model_validate({"MX_MODEL_REVISION": "kept"})
    [line] = warnings(caplog)
    assert name in line
    assert value in line
    assert said in line
    assert line.endswith(("is used", "it counts as unset"))


@pytest.mark.parametrize("value", ["10.0.0.7:6555", "http://worker-3", "worker 3", "fd00::7:zz", "a/b"])
def test_a_host_that_nobody_could_reach_is_not_advertised(caplog: pytest.LogCaptureFixture, value: str) -> None:
    assert load_settings({}, {"MX_WORKER_HOST": value}).worker_host is None
    [line] = warnings(caplog)
    assert line.startswith(f"MX_WORKER_HOST={value!r} is refused: it must be a name or an address alone")


@pytest.mark.parametrize("value", ["worker-3", "w_3.example.", "10.0.0.7", "fd00::7", "[fd00::7]", "fe80::1%eth0"])
def test_hosts_that_are_advertised(caplog: pytest.LogCaptureFixture, value: str) -> None:
    assert load_settings({}, {"MX_WORKER_HOST": value}).worker_host == value
    assert warnings(caplog) == []


def test_a_refused_server_is_named_as_it_was_set(caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings({}, {"MODEL_EXPRESS_URL": "mx:port", "MX_SERVER_ADDRESS": "mx:1"}).server_address is None
    assert load_settings({"server_address": "mx:port"}, {"MODEL_EXPRESS_URL": "mx:1"}).server_address is None
    in_environment, by_engine = warnings(caplog)
    rule = (
        "it must be host:port, http(s)://host:port or grpc(s)://host:port, such as mx-server:8001 or "
        "http://[fd00::1]:8001"
    )
    refused = f"='mx:port' is refused: server address 'mx:port': 'port' is no port from 1 to 65535; {rule}; "
    assert in_environment == f"MODEL_EXPRESS_URL{refused}it counts as unset"
    assert by_engine == f"MX_SERVER_ADDRESS{refused}it counts as unset"


def test_what_was_refused_is_told_to_who_asks(caplog: pytest.LogCaptureFixture) -> None:
    """So that the summary line of a load says it as well; Kubernetes' values too, where a server was to be named."""
    refused = ["before"]
    environ = {"MODEL_EXPRESS_URL": "tcp://10.0.0.1:8001", "MX_SERVER_ADDRESS": "mx:port", "MX_LAYOUT": "RAW"}
    assert load_settings({}, environ, refused=refused).server_address is None
    assert refused[0] == "before"
    assert refused[1] == (
        "MODEL_EXPRESS_URL='tcp://10.0.0.1:8001' counts as unset, as Kubernetes sets such values: write host:port"
    )
    assert sorted(line.partition("=")[0] for line in refused[2:]) == ["MX_LAYOUT", "MX_SERVER_ADDRESS"]
    assert warnings(caplog) == refused[1:]
    assert load_settings({"server_address": "mx:1"}, environ, refused=refused).server_address == "mx:1"
    assert [line.partition("=")[0] for line in refused[4:]] == ["MX_LAYOUT"]


def test_a_password_in_the_server_address_is_not_repeated(caplog: pytest.LogCaptureFixture) -> None:
    assert load_settings({}, {"MODEL_EXPRESS_URL": "https://fleet:hunter2@mx:8001"}).server_address is None
    [line] = warnings(caplog)
    assert "no user and no password" in line
    assert "hunter2" not in line


def test_names_that_are_not_ours_warn(caplog: pytest.LogCaptureFixture) -> None:
    load_settings({"MX_LAYUOT": "raw"}, {"MX_TRANSPROT": "tcp", "MX_WORKER_GRPC_PORT": "tcp://10.0.0.1:6555"})
    lines = warnings(caplog)
    assert any("MX_TRANSPROT" in line and "MX_TRANSPORT" in line for line in lines)
    assert any("MX_LAYUOT" in line for line in lines)
    assert len(lines) == 2  # Kubernetes' value is neither a setting nor a mistake


@pytest.mark.parametrize(
    ("changes", "host", "only_here"),
    [
        ({}, "127.0.0.1", True),
        ({"MX_SERVER_ADDRESS": "127.0.0.1:8001"}, "127.0.0.1", True),
        ({"MX_SERVER_ADDRESS": "localhost"}, None, True),
        ({"MX_WORKER_HOST": "worker-3"}, "worker-3", False),
        ({"MX_SERVER_ADDRESS": "no-such-host.invalid"}, None, False),
    ],
)
def test_what_is_advertised(changes: dict[str, object], host: str | None, only_here: bool) -> None:
    settings = load_settings(changes, {})
    assert host is None or settings.own_address() == (host, False)
    assert settings.shares_only_this_host is only_here


def test_unknown_key_of_the_engine_names_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    load_settings({"drain_timeout_secs": 3, "MX_TRANSPORTS": "tcp"}, {})
    said = [record.getMessage() for record in caplog.records]
    assert any("drain_timeout_secs" in line and "drain_timeout_seconds" in line for line in said)
    assert any("MX_TRANSPORTS" in line and line.endswith("MX_TRANSPORT") for line in said)
