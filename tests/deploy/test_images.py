"""The images' Dockerfiles as texts; what their RUN lines do is done by `make test-images` (tools/image_chroot.py)."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from deploy.images.missing_requirements import missing
from mxserver.wire import BY_NAME
from tests.deploy.test_kubernetes import ROOT
from tools.image_chroot import context_files, instructions
from tools.lock_images import FOLDER, MACHINES, wanted

DOCKERFILES = sorted(path.name for path in FOLDER.glob("*.Dockerfile"))
LOCKED = sorted(path.name for path in FOLDER.glob("*-requirements.txt"))


def test_there_is_an_image_for_the_server_and_one_for_workers() -> None:
    assert DOCKERFILES == ["server.Dockerfile", "worker.Dockerfile"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_it_ends_as_a_user_with_labels_and_without_what_built_it(name: str) -> None:
    steps = instructions(FOLDER / name)
    last = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    final = steps[last:]
    assert [rest for word, rest in final if word == "USER"][-1] == "65532:65532"
    [labels] = [rest for word, rest in final if word == "LABEL"]
    for label in ("title", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert not any("gcc" in rest for word, rest in final)
    for word, rest in steps:
        if word == "RUN" and "pip install" in rest:
            assert "--require-hashes" in rest or "--no-index" in rest
    for word, rest in final:
        if word == "ENV":
            names = set(re.findall(r"((?:MX|MODEL_EXPRESS)_[A-Z_]+)=", rest))
            assert names <= BY_NAME.keys()


def test_a_workers_image_is_made_of_any_vllm_image() -> None:
    steps = instructions(FOLDER / "worker.Dockerfile")
    assert ("ARG", "VLLM_IMAGE") in steps
    assert [rest for word, rest in steps if word == "FROM"][-1] == "${VLLM_IMAGE}"


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_context_has_the_sources_and_nothing_else(name: str) -> None:
    files = context_files(FOLDER / name)
    assert {"setup.py", "pyproject.toml", "mxserver/cli.py", "mxcore/digest/digest.pyx", "LICENSE"} <= set(files)
    tops = {file.partition("/")[0] for file in files}
    assert not tops & {"tests", "docs", ".git", ".venv", "build"}


def entries(name: str) -> dict[str, tuple[str, int]]:
    """Package -> version, and how many hashes it has."""
    text = (FOLDER / name).read_text()
    return {
        found[1]: (found[2], entry.count("--hash=sha256:"))
        for entry in re.split(r"(?<!\\)\n", text)
        if (found := re.match(r"([\w.-]+)==([\w.!+-]+)", entry))
    }


@pytest.mark.parametrize("name", LOCKED)
def test_every_dependency_is_locked_within_its_bounds_with_hashes(name: str) -> None:
    locked = entries(name)
    for text in wanted()[name]:
        requirement = Requirement(text)
        version, _ = locked[requirement.name.lower()]
        assert requirement.specifier.contains(version, prereleases=True), text
    assert all(1 <= hashes <= len(MACHINES) for _, hashes in locked.values())
    assert not locked.keys() & {"torch", "nixl-cu12", "vllm"}


def test_what_an_image_has_is_left_alone() -> None:
    text = "# made\nclick==0.0.1 \\\n    --hash=sha256:aa\nno-such-package-here==1 \\\n    --hash=sha256:bb\n"
    assert importlib.metadata.version("click") != "0.0.1"
    assert missing(text) == "no-such-package-here==1 \\\n    --hash=sha256:bb\n"


def test_extras_of_the_server_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"redis", "otel"} <= project["optional-dependencies"].keys()
    assert {"redis", "obstore", "opentelemetry-sdk"} <= entries("server-requirements.txt").keys()
