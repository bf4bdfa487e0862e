"""Examples of workers: their pods fit Kubernetes' schemas, the rest the fields that their kinds publish."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mxcore.settings import WorkerSettings
from mxserver.wire import BY_NAME
from mxserver.wire.environment import PREFIXES
from tests.deploy.test_kubernetes import VERSIONS

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "examples"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))

Manifest = dict[str, Any]

# As leaderworkerset.x-k8s.io/v1 (LWS 0.7), nvidia.com/v1beta1 (Dynamo 1.4) and llm-d-modelservice's values.schema.json
# publish them; pods inside of them are Kubernetes' own.
FIELDS = {
    "LeaderWorkerSet": {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"},
    "leaderWorkerTemplate": {
        *("leaderTemplate", "workerTemplate", "size", "restartPolicy", "subGroupPolicy", "volumeClaimTemplates"),
    },
    "DynamoGraphDeployment": {
        *("annotations", "labels", "priorityClassName", "components", "env", "backendFramework", "restart"),
        *("topologyConstraint", "experimental", "providerOverride"),
    },
    "component": {
        *("name", "type", "runtimeVersionOverride", "globalDynamoNamespace", "podTemplate", "replicas", "minAvailable"),
        *("multinode", "roles", "sharedMemorySize", "modelRef", "scalingAdapter", "eppConfig", "frontendSidecar"),
        *("dynamoSidecar", "compilationCache", "topologyConstraint", "experimental", "providerOverride"),
    },
    "llm-d": {
        *("common", "enabled", "fullnameOverride", "serviceAccountOverride", "schedulerName", "modelArtifacts"),
        *("multinode", "accelerator", "requester", "routing", "decode", "prefill", "dra", "extraObjects"),
    },
    "llm-d decode": {
        *("create", "autoscaling", "replicas", "nodeSelector", "schedulerName", "parallelism", "resourceClaims"),
        *("containers", "volumes", "initContainers", "terminationGracePeriodSeconds", "enableServiceLinks"),
        *("acceleratorTypes", "monitoring", "hostIPC", "hostPID"),
    },
}
LLMD_CONTAINER = {"modelCommand", "mountModelVolume"}  # of its own, beside Kubernetes' fields


def documents(file: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all((FOLDER / file).read_text()) if document]


def templates(file: str) -> Iterator[Manifest]:
    """The pods of a file, as pod templates."""
    for document in documents(file):
        match document.get("kind"):
            case "Deployment":
                yield document["spec"]["template"]
            case "LeaderWorkerSet":
                group = document["spec"]["leaderWorkerTemplate"]
                yield from (group["leaderTemplate"], group["workerTemplate"])
            case "DynamoGraphDeployment":
                for component in document["spec"]["components"]:
                    yield component["podTemplate"]
            case None:
                decode = document["decode"]
                containers = [
                    {key: value for key, value in each.items() if key not in LLMD_CONTAINER}
                    for each in decode["containers"]
                ]
                yield {"spec": {"containers": containers, "volumes": decode["volumes"]}}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES)
def test_pods_fit_the_schemas(file: str, version: str) -> None:
    labels = {"app": "a"}
    for template in templates(file):
        spec = {"selector": {"matchLabels": labels}, "template": {**template, "metadata": {"labels": labels}}}
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(deployment, version, strict=True)
    for document in documents(file):
        if document.get("apiVersion") in ("v1", "apps/v1"):
            kubernetes_validate.validate(document, version, strict=True)


def test_outer_fields_are_those_of_their_kinds() -> None:
    seen = set()
    for file in FILES:
        for document in documents(file):
            kind = document.get("kind", "llm-d")
            seen.add(kind)
            spec = document.get("spec", document)
            if kind in FIELDS:
                assert set(spec) <= FIELDS[kind]
            for component in spec.get("components", []):
                assert set(component) <= FIELDS["component"]
                assert [each["name"] for each in component["podTemplate"]["spec"]["containers"]] == ["main"]
            if "leaderWorkerTemplate" in spec:
                assert set(spec["leaderWorkerTemplate"]) <= FIELDS["leaderWorkerTemplate"]
            if kind == "llm-d":
                assert set(spec["decode"]) <= FIELDS["llm-d decode"]
    assert seen >= {"LeaderWorkerSet", "DynamoGraphDeployment", "llm-d", "Deployment"}


@pytest.mark.parametrize("file", FILES)
def test_our_settings_exist_and_each_worker_says_where_it_is(file: str) -> None:
    for template in templates(file):
        for container in template["spec"]["containers"]:
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            environ = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
            unknown = {name for name in environ if name.startswith(PREFIXES) and name not in BY_NAME}
            assert not unknown
            WorkerSettings.model_validate({name: value for name, value in environ.items() if value})
            if "mx" not in words:
                continue
            assert "MX_WORKER_HOST" in environ
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports["mx-worker"] == 6555
            assert str(ports["mx-chunks"]) == environ["MX_WORKER_CHUNK_PORT"]
            assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
            assert container["securityContext"]["runAsUser"] == 0, "to another user the capability is not given"
            assert any(name.startswith("rdma/") for name in container["resources"]["limits"])
