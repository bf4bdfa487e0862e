"""The Kubernetes manifests: valid for old and new clusters, consistent, and a server starts with what they say."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mxbench.fleet.free_ports import free_port
from mxserver.limits import DEFAULT
from mxserver.settings import FLAGS, ServerSettings
from mxserver.wire import BY_NAME
from mxserver.wire.environment import PREFIXES
from tests.web.conftest import WebServer, ask

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SERVERS = ["server.yaml", "server-redis.yaml", "server-secured.yaml"]
VERSIONS = ["1.29", "1.33", "1.37"]

Manifest = dict[str, Any]


def documents(file: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all((FOLDER / file).read_text()) if document]


def of_kind(file: str, kind: str, name: str = "mx-server") -> Manifest:
    [found] = [d for d in documents(file) if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pods(file: str) -> Iterator[tuple[str, Manifest]]:
    for document in documents(file):
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def container(file: str) -> Manifest:
    [one] = of_kind(file, "Deployment")["spec"]["template"]["spec"]["containers"]
    found: Manifest = one
    return found


def environment(file: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(file)["env"] if "value" in entry}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_fits_the_schemas(file: str, version: str) -> None:
    for document in documents(file):
        if document["apiVersion"] != "cert-manager.io/v1":
            kubernetes_validate.validate(document, version, strict=True)


def test_schemas_do_refuse() -> None:
    broken = of_kind("server.yaml", "Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.33", strict=True)


@pytest.mark.parametrize("file", FILES)
def test_selectors_find_their_pods(file: str) -> None:
    labels = {
        tuple(d["spec"]["template"]["metadata"]["labels"].items()) for d in documents(file) if d["kind"] == "Deployment"
    }
    for document in documents(file):
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert tuple(spec["selector"].items()) in labels
        if document["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert tuple(spec["selector"]["matchLabels"].items()) in labels
        if document["kind"] == "NetworkPolicy":
            assert tuple(spec["podSelector"]["matchLabels"].items()) in labels


@pytest.mark.parametrize("file", FILES)
def test_mounts_and_claims_are_there(file: str) -> None:
    claims = {d["metadata"]["name"] for d in documents(file) if d["kind"] == "PersistentVolumeClaim"}
    for _, pod in pods(file):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for one in pod["containers"]:
            assert {mount["name"] for mount in one["volumeMounts"]} == set(volumes)
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claim in claims


@pytest.mark.parametrize("file", SERVERS)
def test_nothing_runs_as_root_or_writes_to_its_image(file: str) -> None:
    for _, pod in pods(file):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is (environment(file).get("MX_AUTH") == "kubernetes")
        for one in pod["containers"]:
            context = one["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["limits"]["memory"]


@pytest.mark.parametrize("file", FILES)
def test_images_are_pinned_and_links_are_off(file: str) -> None:
    """With service links, Kubernetes puts addresses under the very names of settings."""
    for _, pod in pods(file):
        assert pod["enableServiceLinks"] is False
        for one in pod["containers"]:
            assert re.fullmatch(r"[a-z0-9./-]+:\d[\w.-]*", one["image"])


@pytest.mark.parametrize("file", [*SERVERS, "worker-example.yaml"])
def test_every_setting_of_ours_is_known_and_works(file: str) -> None:
    for _, pod in pods(file):
        for one in pod["containers"]:
            for entry in one.get("env", []):
                if entry["name"].startswith(PREFIXES):
                    assert entry["name"] in BY_NAME, entry["name"]


@pytest.mark.parametrize("file", SERVERS)
def test_pod_is_given_the_time_that_draining_takes(file: str) -> None:
    spec = of_kind(file, "Deployment")["spec"]["template"]["spec"]
    fields = ServerSettings.model_fields
    taken = sum(
        float(environment(file).get(str(fields[name].alias), fields[name].default))
        for name in ("not_ready_seconds", "drain_seconds")
    )
    assert spec["terminationGracePeriodSeconds"] > taken + 5


@pytest.mark.parametrize("file", SERVERS)
def test_network_policy_lets_ports_and_nothing_else_in(file: str) -> None:
    ports = {port["containerPort"] for port in container(file)["ports"]}
    ingress = of_kind(file, "NetworkPolicy")["spec"]["ingress"]
    assert {entry["port"] for rule in ingress for entry in rule["ports"]} == ports


def test_single_replica_does_not_block_draining_a_node() -> None:
    assert of_kind("server.yaml", "Deployment")["spec"]["replicas"] == 1
    assert of_kind("server.yaml", "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert of_kind("server.yaml", "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    replicas = of_kind("server-redis.yaml", "Deployment")["spec"]["replicas"]
    assert replicas > of_kind("server-redis.yaml", "PodDisruptionBudget")["spec"]["minAvailable"]


def start_as_in(file: str, folder: Path, **changed: str) -> WebServer:
    """The server with the manifest's environment; volumes are folders, ports are free ones."""
    values = environment(file) | changed
    for mount in container(file)["volumeMounts"]:
        target = folder / mount["name"]
        target.mkdir()
        for name, value in environment(file).items():
            if value.startswith(mount["mountPath"]):
                values[name] = value.replace(mount["mountPath"], str(target), 1)
    command = [str(part) for part in container(file).get("args", [])]
    return WebServer("--port", "0", *command, environ=values)


def probe_as_in(file: str, server: WebServer) -> None:
    one = container(file)
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert ports == {"grpc": 8001, "files": 8002, "http": 9401}, "the defaults of the server"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        get = one[probe]["httpGet"]  # where the server has a certificate, `scheme: HTTPS` is all that changes
        assert get["port"] == "http"
        assert ask(server.url + get["path"]).status == 200


@pytest.mark.parametrize("file", ["server.yaml", "server-secured.yaml"])
def test_a_full_state_file_on_a_slow_volume_is_no_reason_to_kill(file: str) -> None:
    """It is checked and read before the port opens, at 4 MiB/s in the worst case; then the pod would start for ever."""
    probe = container(file)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 2 * DEFAULT.stored_bytes / (4 * 1024 * 1024)


def grpc_probe(server: WebServer) -> None:
    """What the kubelet calls for a gRPC probe."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=120)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_sqlite_server_starts_with_its_defaults(tmp_path: Path) -> None:
    server = start_as_in("server.yaml", tmp_path)
    try:
        probe_as_in("server.yaml", server)
        grpc_probe(server)
        assert (tmp_path / "state" / "state.sqlite3").is_file()
        assert server.lines[0].startswith("{"), "the log is JSON"
    finally:
        server.close()


def test_redis_servers_start_with_their_defaults(tmp_path: Path) -> None:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no Redis: tools/install_test_packages.sh installs redis-server")
    [one] = [one for name, pod in pods("server-redis.yaml") if name == "mx-server-redis" for one in pod["containers"]]
    shell, option, script = one["args"]
    port = free_port()
    password = secrets.token_hex(8)
    redis = subprocess.Popen(
        [shell, option, script.replace("/data", f"{tmp_path} --port {port} --bind 127.0.0.1")],
        env={**os.environ, "REDIS_PASSWORD": password},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert redis.stdout is not None
    assert any("eady to accept connections" in line for line in redis.stdout)
    try:
        url = environment("server-redis.yaml")["REDIS_URL"]
        url = url.replace("$(REDIS_PASSWORD)", password).replace("mx-server-redis:6379", f"127.0.0.1:{port}")
        server = start_as_in("server-redis.yaml", tmp_path, REDIS_URL=url)
        try:
            probe_as_in("server-redis.yaml", server)
            grpc_probe(server)
        finally:
            server.close()
    finally:
        redis.terminate()
        redis.communicate()


def test_image_runs_what_the_package_installs() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(stages) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", stage) for stage in stages)
    final = text[text.rindex("\nFROM ") :]
    assert "gcc" not in final
    assert re.search(r"^USER 65532:65532$", final, re.MULTILINE)
    assert final.index("USER 65532") < final.index("ENTRYPOINT"), "not root when it starts"
    assert 'ENTRYPOINT ["mxserver"]' in final
    names = re.findall(r"((?:MX|MODEL_EXPRESS)_[A-Z_]+)=", final)
    assert names
    assert set(names) <= BY_NAME.keys()
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras is not None
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras[1].split(","))


def test_flags_in_manifests_exist() -> None:
    for file in SERVERS:
        assert all(
            argument in FLAGS.values() for argument in container(file).get("args", []) if argument.startswith("--")
        )
