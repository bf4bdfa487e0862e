"""`mx doctor`: the settings in the environment, the server, and how far the clocks are apart."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mxcore import __version__
from mxcore.cli.connection import SERVER_NAMES, Connection
from mxcore.cli.doctor.findings import Finding
from mxserver.wire import ServerRefused, SettingError, WireError, is_kubernetes_value, misspelt, setting, without_effect
from mxserver.wire.calls import ServerClient

CALL_SECONDS = 5.0
SKEW_SECONDS = 2.0


def is_named(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a server."""
    return any(setting(environ, name) for name in SERVER_NAMES)


def environment(environ: Mapping[str, str]) -> list[Finding]:
    """Names that are set and will not have the expected effect."""
    findings = [
        Finding("setting", "warn", f"{name} is no setting", f"did you mean {near}?" if near else "unset it")
        for name, near in misspelt(environ)
    ]
    if unused := without_effect(environ, "worker"):
        fact = f"without effect on a worker: {', '.join(unused)}"
        findings.append(Finding("setting", "note", fact, "docs/reference/settings.md says why, and what does it here"))
    for name in SERVER_NAMES:
        if is_kubernetes_value(environ.get(name, "")):
            do = "enableServiceLinks: false in the pod, or another name for the service"
            findings.append(Finding("setting", "warn", f"{name} was set by Kubernetes for a service", do))
    if not is_named(environ):
        do = "set MODEL_EXPRESS_URL=HOST:8001 for the workers"
        findings.append(Finding("setting", "warn", "no server is named: a worker would load from storage", do))
    return findings or [Finding("setting", "ok", "every name that is set is known")]


def server(connection: Connection) -> list[Finding]:
    """Whether the server answers and lets us in, its version, whether it is well, and what time it is there."""
    try:
        address, credentials = connection.address, connection.credentials
    except SettingError as error:
        return [Finding("server", "fail", str(error), "correct --server, MODEL_EXPRESS_URL or MX_SERVER_ADDRESS")]
    try:
        with ServerClient(address, timeout_seconds=CALL_SECONDS, credentials=credentials) as client:
            client.health()  # connects, so that the next call measures only the round trip
            sent_ms, started = time.time() * 1000, time.monotonic()
            health = client.health()
            took_seconds = time.monotonic() - started
            admitted = access(client)
    except WireError as error:
        do = "is it running and is the address right? A NetworkPolicy or firewall may keep port 8001 closed"
        if address.startswith("https://"):
            do += "; with https://, does the server take TLS, and is its CA in MX_TLS_CA_FILE (--tls-ca)?"
        else:
            do += "; a server with TLS needs https:// before its address"
        return [Finding("server", "fail", str(error), do)]
    fact = f"{address} answers in {took_seconds * 1000:.1f} ms, version {health.version}"
    findings = [Finding("server", "ok", fact)]
    if health.status != "ok":
        findings = [
            Finding("server", "fail", f"{fact}, but: {health.status}", "look at the server's log and its store")
        ]
    if health.version != __version__:
        do = "releases with the same protocol work together; update one side when something is missing"
        findings.append(Finding("server version", "note", f"server {health.version}, here {__version__}", do))
    findings.append(admitted)
    findings.append(clock(health.now_unix_ms, sent_ms, took_seconds))
    return findings


def access(client: ServerClient) -> Finding:
    """Whether this client may see who has what: a worker needs that, and more."""
    try:
        client.list_sources(limit=1)
    except ServerRefused as error:
        do = "give a token that the server knows: MX_AUTH_TOKEN_PATH (--token-file), over https:// or to loopback"
        return Finding("access", "fail", str(error), do)
    except WireError as error:
        return Finding("access", "fail", str(error), "look at the server's log and its store")
    return Finding("access", "ok", "the server lets this client list its workers")


def clock(server_ms: int, sent_ms: float, took_seconds: float) -> Finding:
    """How far this machine's clock is from the server's. Only times shown to people depend on it."""
    if not server_ms:
        return Finding("clock", "note", "this server does not tell its time")
    skew_seconds = (sent_ms + took_seconds * 500 - server_ms) / 1000
    fact = f"{skew_seconds:+.2f} s against the server (± {took_seconds / 2:.2f} s)"
    if abs(skew_seconds) > SKEW_SECONDS + took_seconds / 2:
        return Finding(
            "clock", "warn", fact, "start chrony or systemd-timesyncd; leases do not need it, TLS and logs do"
        )
    return Finding("clock", "ok", fact)
