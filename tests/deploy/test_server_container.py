"""The chart's defaults start the real server as its securityContext says: another user, a read-only root, no home."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_kubernetes import ROOT, container, environment, of_kind

UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc"]
RANDOM_UID = 48_123  # as OpenShift gives each namespace one; nobody's in /etc/passwd


def _may_unshare() -> bool:
    programs = all(map(shutil.which, ("unshare", "setpriv", "mount")))
    return programs and not subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode


pytestmark = pytest.mark.skipif(not _may_unshare(), reason="needs root, and namespaces of mounts and networks")


def in_namespaces(command: dict[str, Any]) -> dict[str, Any]:
    """What container.py answers. The command is as it is there."""
    program = str(Path(__file__).with_name("container.py"))
    ran = subprocess.run(
        [*UNSHARE, sys.executable, program], input=json.dumps(command), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def started(uid: int, gid: int, environ: dict[str, str], *arguments: str) -> dict[str, Any]:
    pod = of_kind("server.yaml", "Deployment")["spec"]["template"]["spec"]
    one = container("server.yaml")
    return in_namespaces(
        {
            "root": str(ROOT),
            "python": sys.base_prefix,
            "uid": uid,
            "gid": gid,
            "group": pod["securityContext"]["fsGroup"],
            "environment": environ,
            "arguments": [*map(str, one.get("args", [])), *arguments],
            "mounts": [mount["mountPath"] for mount in one["volumeMounts"]],
            "probes": sorted({one[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}),
        }
    )


def chart_environment() -> dict[str, str]:
    assert {entry["name"] for entry in container("server.yaml")["env"]} == environment("server.yaml").keys()
    return environment("server.yaml")


def test_the_charts_own_user() -> None:
    context = of_kind("server.yaml", "Deployment")["spec"]["template"]["spec"]["securityContext"]
    found = started(context["runAsUser"], context["runAsGroup"], chart_environment())
    assert found["answers"] == {"/livez": 200, "/readyz": 200}, found["said"]
    assert found["code"] == 0
    assert "/var/lib/mxserver/state.sqlite3" in found["written"]


def test_a_random_user_without_a_home() -> None:
    environ = {name: value for name, value in chart_environment().items() if name != "HOME"}
    found = started(RANDOM_UID, 0, environ)
    assert found["answers"] == {"/livez": 200, "/readyz": 200}, found["said"]
    assert found["code"] == 0
    assert re.search(rf"^Uid:\s+{RANDOM_UID}\s+{RANDOM_UID}\s", found["status"], re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", found["status"], re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", found["status"], re.MULTILINE)


def test_without_any_setting_one_line_says_what_is_missing() -> None:
    """There is no place for the state: neither a home nor a volume that a setting names."""
    found = started(RANDOM_UID, 0, {})
    assert found["answers"] == {}
    assert found["code"] == 1
    [line] = found["said"].splitlines()
    assert line.startswith("mxserver: ")
    assert "--store-path" in line or "MX_STORE_PATH" in line
