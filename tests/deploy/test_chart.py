"""The chart, by the real Helm: what it renders is valid, each value does something, and what cannot be is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.web.conftest import WebServer, start_web
from tools.render_manifests import CHART, FOLDER, MANIFESTS, VALUES, helm, manifest, rendered

__all__ = ["start_web"]  # a fixture
pytestmark = pytest.mark.skipif(not helm().exists(), reason="no helm: tools/get_helm.py had no network, or no x86-64")

SETUPS = sorted(path.name for path in VALUES.glob("*.yaml"))
VERSIONS = ["1.29", "1.33", "1.37"]
OWN_KINDS = ("cert-manager.io/v1", "monitoring.coreos.com/v1")  # their schemas come with their operators

# What has to be set beside a value for it to count, and another value that it may have.
BESIDE = {
    "redis": ["store.kind=redis"],
    "redis.existingSecret": ["store.kind=redis", "redis.bundled=false"],
    "auth.accounts": ["auth.mode=kubernetes", "auth.accessSecret=s"],
    "replicas": ["store.kind=redis"],
    "cache.accessMode": ["cache.claim=true"],
    "cache.storageClass": ["cache.claim=true"],
    "tls.clientCertificates": ["tls.secret=s"],
    "tls.certManager.issuerKind": ["tls.certManager.issuer=i"],
    "auth.mode": ["auth.accessSecret=s"],
    "auth.audience": ["auth.mode=kubernetes", "auth.accounts={a:b}"],
    "networkPolicy.apiServerPorts": ["auth.mode=kubernetes", "auth.accounts={a:b}"],
    "monitoring.interval": ["monitoring.serviceMonitor=true"],
    "monitoring.labels": ["monitoring.serviceMonitor=true"],
    "monitoring.tokenSecret": ["monitoring.serviceMonitor=true", "auth.mode=file", "auth.accessSecret=s"],
    "monitoring.workerNamespaces": ["monitoring.podMonitor=true"],
}
OTHER = {
    "auth.accounts": '["a:b"]',
    "auth.mode": '"file"',
    "cache.accessMode": '"ReadWriteMany"',
    "cache.maxBytes": '"5GiB"',
    "image.pullPolicy": '"Always"',
    "image.pullSecrets": '[{"name": "x"}]',
    "monitoring.interval": '"15s"',
    "networkPolicy.apiServerPorts": "[16443]",
    "networkPolicy.extraEgress": '[{"ports": [{"port": 4317}]}]',
    "redis.maxMemory": '"128mb"',
    "redis.memoryLimit": '"1Gi"',
    "server.env": '{"MX_TRACES": "otlp"}',
    "server.affinity": '{"nodeAffinity": {}}',
    "server.logFormat": '"text"',
    "server.tolerations": '[{"key": "x"}]',
    "service.ipFamilies": '["IPv6"]',
    "service.ipFamilyPolicy": '"PreferDualStack"',
    "service.type": '"NodePort"',
    "store.kind": '"redis"',
    "tls.certManager.issuerKind": '"ClusterIssuer"',
}


def leaves(values: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        path = f"{above}.{name}".lstrip(".")
        found += leaves(value, path) if isinstance(value, dict) and value else [(path, value)]
    return found


LEAVES = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))


def another(path: str, value: object) -> str:
    """Another value of the same kind, as JSON."""
    if path in OTHER:
        return OTHER[path]
    if path.endswith(".size"):
        return '"7Gi"'
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, dict):
        return '{"other": "x"}'
    return '["other"]' if isinstance(value, list) else '"other"'


def refusal(*arguments: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        rendered(*arguments)
    return str(caught.value.stderr)


def assert_valid(text: str) -> None:
    """By the schemas of three versions."""
    for document in yaml.safe_load_all(text):
        for version in VERSIONS if document["apiVersion"] not in OWN_KINDS else ():
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("setup", [None, *SETUPS])
def test_lint_finds_nothing(setup: str | None) -> None:
    given = ["-f", str(VALUES / setup)] if setup else []
    subprocess.run([str(helm()), "lint", "--strict", str(CHART), *given], check=True, capture_output=True)


@pytest.mark.parametrize("setup", [None, *SETUPS])
def test_setups_fit_the_schemas(setup: str | None) -> None:
    assert_valid(rendered(*(["-f", str(VALUES / setup)] if setup else [])))


@pytest.mark.parametrize(("path", "value"), LEAVES, ids=[path for path, _ in LEAVES])
def test_each_value_does_something(path: str, value: object) -> None:
    beside = BESIDE.get(path, BESIDE.get(path.split(".")[0], []))
    given = [part for one in beside for part in ("--set", one)]
    if any("redis" in one for one in beside):
        given += ["--set-json", 'redis.existingSecret="s"']  # else each rendering makes another password
    changed = rendered(*given, "--set-json", f"{path}={another(path, value)}")
    assert rendered(*given) != changed
    assert_valid(changed)


TEXTS = [path for path, value in LEAVES if isinstance(value, str) and path not in OTHER and not path.endswith(".size")]
TEXTS.remove("name")  # of all objects: refused by the schema where it is none


@pytest.mark.parametrize("path", TEXTS)
@pytest.mark.parametrize("text", ["true", "0123"])
def test_a_text_that_looks_like_something_else_stays_a_text(path: str, text: str) -> None:
    """Without quotes YAML has a boolean and a number there, which Kubernetes refuses."""
    beside = BESIDE.get(path, BESIDE.get(path.split(".")[0], []))
    given = [part for one in beside for part in ("--set", one)]
    assert_valid(rendered(*given, "--set-json", f'{path}="{text}"'))


def test_further_settings_reach_the_server() -> None:
    text = rendered("--set", "server.env.MX_TRACES=otlp")
    assert '{name: MX_TRACES, value: "otlp"}' in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("replicas=2", "need store.kind=redis"),
        ("store.kind=redis,redis.bundled=false", "needs redis.existingSecret"),
        ("store.kind=redis,replicas=2,cache.claim=true", "ReadWriteMany"),
        ("auth.mode=file", "needs auth.accessSecret"),
        ("auth.mode=kubernetes", "who may call"),
        ("tls.clientCertificates=true", "needs tls.secret"),
        ("store.kind=mysql", "must be one of"),
        ("store.knd=redis", "additional properties 'knd' not allowed"),
        ("cache.size=big", "does not match pattern"),
        ("name=0x", "does not match pattern"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given: str, said: str) -> None:
    assert said in refusal("--set", given)


def test_a_name_that_yaml_takes_for_a_boolean_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        rendered("--set-json", 'name="true"')
    assert "'name': 'not' failed" in str(caught.value.stderr) or "/name" in str(caught.value.stderr)


def test_the_dashboard_and_the_rules_are_those_of_deploy() -> None:
    documents = list(yaml.safe_load_all(rendered("-f", str(VALUES / "monitoring.yaml"))))
    [rules] = [one for one in documents if one["kind"] == "PrometheusRule"]
    assert rules["spec"] == yaml.safe_load((CHART.parents[1] / "prometheus-rules.yaml").read_text())
    [board] = [one for one in documents if one["kind"] == "ConfigMap"]
    assert json.loads(board["data"]["modelexpress.json"]) == json.loads(
        (CHART.parents[1] / "grafana-dashboard.json").read_text()
    )
    [server] = [one["spec"]["endpoints"] for one in documents if one["kind"] == "ServiceMonitor"]
    [workers] = [one["spec"]["podMetricsEndpoints"] for one in documents if one["kind"] == "PodMonitor"]
    assert [(one["port"], one.get("path")) for one in (*server, *workers)] == [
        ("http", None),
        ("http", "/metrics/models"),
        ("mx-metrics", None),
    ]
    jobs = [one["relabelings"] for one in (*server, *workers)]
    assert jobs == [[{"targetLabel": "job", "replacement": job}] for job in ("mxserver", "mxserver-models", "mxworker")]
    looked_for = {
        job
        for group in rules["spec"]["groups"]
        for rule in group["rules"]
        for job in re.findall('job="(.+?)"', rule["expr"])
    }
    assert looked_for == {"mxserver", "mxworker"}


def test_notes_have_the_url_for_workers() -> None:
    command = [str(helm()), "install", "mx", str(CHART), "-n", "models", "--dry-run=client", "--set", "tls.secret=s"]
    environ = {**os.environ, "KUBECONFIG": os.devnull}
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
    assert "MODEL_EXPRESS_URL=https://mx.models.svc:8001" in text
    assert "NOT PROTECTED" in text


@pytest.mark.parametrize("file", sorted(MANIFESTS))
def test_deploy_kubernetes_is_what_the_chart_makes(file: str) -> None:
    assert (FOLDER / file).read_text() == manifest(file), "run tools/render_manifests.py"


def pod_of_helm_test(*arguments: str) -> dict[str, Any]:
    """What `helm test` starts."""
    command = [str(helm()), "template", "mx", str(CHART), "--show-only", "templates/tests/health.yaml", *arguments]
    pod: dict[str, Any] = yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return pod


@pytest.mark.parametrize("arguments", [(), ("--set", "tls.secret=s")])
def test_the_pod_of_helm_test_fits_the_schemas(arguments: tuple[str, ...]) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(pod_of_helm_test(*arguments), version, strict=True)


def test_the_pod_of_helm_test_tells_a_server_that_is_ready_from_one_that_is_not(
    start_web: Callable[..., WebServer],
) -> None:
    [one] = pod_of_helm_test()["spec"]["containers"]
    web = start_web()

    def asked() -> int:
        [program] = one["args"]
        here = program.replace("http://mx:9401", web.url)
        assert here != program
        return subprocess.run([sys.executable, *one["command"][1:], here], capture_output=True, check=False).returncode

    assert one["command"][0] == "python", "in the image, tests/images asks for it"
    assert asked() == 0
    web.close()
    assert asked() != 0


def test_an_archive_has_everything_in_it(tmp_path: Path) -> None:
    """The chart's rules and dashboard are links into deploy/: an archive has their contents."""
    subprocess.run([str(helm()), "package", str(CHART), "-d", str(tmp_path)], check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tgz")
    command = [
        str(helm()),
        "template",
        "mx-server",
        str(archive),
        "--skip-tests",
        "-f",
        str(VALUES / "monitoring.yaml"),
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text == rendered("-f", str(VALUES / "monitoring.yaml"))


@pytest.mark.parametrize(("values", "scheme"), [((), "http"), (("--set", "tls.secret=s"), "https")])
def test_notes_give_dynamo_a_url(values: tuple[str, ...], scheme: str) -> None:
    """Its operator refuses an address without a scheme."""
    command = [str(helm()), "install", "rel", str(CHART), "-n", "models", "--dry-run=client", *values]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"--set dynamo-operator.modelExpressURL={scheme}://rel.models.svc:8001\n" in printed
