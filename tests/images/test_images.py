"""What deploy/images' Dockerfiles say, done in chroots: the server starts there as a pod would start it, and a worker's
image has vLLM with our load formats, which leave vLLM's own packages as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.test_kubernetes import ROOT
from tests.deploy.test_server_container import RANDOM_UID, in_namespaces
from tests.images.conftest import DEBIAN, VLLM
from tools.image_chroot import Builder, Image

IMAGES = ROOT / "deploy" / "images"
STATUS = ["mx", "status", "--server", "127.0.0.1:8001"]
PROBES = ["/livez", "/readyz"]
pytestmark = pytest.mark.timeout(1800)  # the first test waits for Debian, and for a compiler


@pytest.fixture(scope="session")
def server(place: Path, base: Path) -> Image:
    folder = place / "server"
    folder.mkdir()
    return Builder(IMAGES / "server" / "Dockerfile", ROOT, folder, {"REVISION": "abc"}).build({DEBIAN: base})


def started(image: Image, uid: int, gid: int, beside: list[list[str]]) -> dict[str, Any]:
    return in_namespaces(
        {
            "image": str(image.root),
            "uid": uid,
            "gid": gid,
            "group": gid,
            "environment": image.environ,
            "program": image.entrypoint,
            "arguments": [],
            "mounts": [*image.volumes, "/tmp"],
            "probes": PROBES,
            "beside": beside,
        }
    )


def test_the_server_answers_as_a_random_user_with_a_read_only_root(server: Image) -> None:
    assert server.user == "65532:65532"
    doctor = ["mx", "doctor", "--server", "127.0.0.1:8001", "--json"]
    found = started(server, RANDOM_UID, 0, [doctor, STATUS, ["touch", "/x"], ["python", "-c", ""]])
    assert found["answers"] == dict.fromkeys(PROBES, 200), found["said"]
    assert found["code"] == 0
    assert "/var/lib/mxserver/state.sqlite3" in "".join(found["written"])
    doctor_said, status_said, touched, python_said = found["beside"]
    assert python_said["code"] == 0, "what `helm test` starts there"
    assert touched["code"] != 0
    assert "Read-only file system" in touched["err"]
    findings = {one["name"]: one["state"] for one in json.loads(doctor_said["out"])["findings"]}
    assert (findings["server"], findings["compiled core"]) == ("ok", "ok"), doctor_said["out"]
    assert doctor_said["code"] == 0, doctor_said["out"]
    assert status_said["code"] == 0, status_said


def test_the_servers_own_user_writes_its_folders(server: Image) -> None:
    found = started(server, 65532, 65532, [])
    assert found["answers"] == dict.fromkeys(PROBES, 200), found["said"]
    for volume in server.volumes:
        made = server.root / volume.lstrip("/")
        assert (made.stat().st_uid, made.stat().st_gid) == (65532, 65532), "what a volume takes over"


def test_nothing_in_the_servers_image_builds(server: Image) -> None:
    for name in ("gcc", "cc", "g++", "make", "ld", "pip", "pip3", "cython", "python3-config"):
        for folder in ("usr/bin", "usr/local/bin", "bin", "opt/mx/bin"):
            assert not (server.root / folder / name).exists(), name
    assert list((server.root / "opt").iterdir()) == [server.root / "opt" / "mx"]
    [packages] = server.root.glob("opt/mx/lib/python3*/site-packages")
    assert not {"torch", "vllm", "pip", "setuptools", "Cython"} & {path.name for path in packages.iterdir()}
    assert len(list(packages.glob("mxcore/**/*.so"))) > 5, "the core is compiled"


VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.name.lower(): d.version for d in importlib.metadata.distributions()}))
"""
FORMATS = """
import vllm.plugins
vllm.plugins.load_general_plugins()
from vllm.model_executor.model_loader import get_model_loader
from vllm.config import LoadConfig
print(type(get_model_loader(LoadConfig(load_format="mx"))).__module__)
"""


def test_a_workers_image_is_the_vllm_image_with_this_package(
    place: Path, vllm_image: Path, packages: dict[Path, str]
) -> None:
    folder = place / "worker"
    folder.mkdir()
    arguments = {"VLLM_IMAGE": VLLM, "PYTHON": "/opt/venv/bin/python"}
    image = Builder(IMAGES / "worker" / "Dockerfile", ROOT, folder, arguments).build({VLLM: vllm_image}, packages)
    assert image.user == "65532:0"
    home = image.root / "home/mx"
    assert (home.stat().st_uid, home.stat().st_gid, home.stat().st_mode & 0o7777) == (65532, 0, 0o2775)
    assert not (image.root / "wheels").exists()
    python = arguments["PYTHON"]

    def asked(root: Path, code: str, environ: dict[str, str]) -> str:
        command = {"image": str(root), "uid": 65532, "gid": 0, "group": 0, "environment": environ, "binds": binds}
        command |= {"program": ["/bin/sleep"], "arguments": ["infinity"], "mounts": ["/tmp", "/home"], "probes": []}
        [said] = in_namespaces({**command, "beside": [[python, "-c", code]]})["beside"]
        assert said["code"] == 0, said["err"]
        return str(said["out"]).splitlines()[-1]

    binds = {str(source): at for source, at in packages.items()}
    (vllm_image / "home").mkdir(exist_ok=True)
    before, after = (json.loads(asked(root, VERSIONS, {})) for root in (vllm_image, image.root))
    assert after.keys() - before.keys() == {"grpcio-health-checking", "mx-modelexpress", "xxhash"}
    assert {name: version for name, version in after.items() if name in before} == before, "vLLM's own stay"
    assert asked(image.root, FORMATS, {"HOME": "/tmp", "VLLM_PLUGINS": "modelexpress_mx"}).startswith("vllm_plugin")
