"""deploy/images: what their Dockerfiles say, and that their lock files are what pyproject.toml asks for. That images
built so start is in tests/images (`make test-images`)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mxserver.wire import BY_NAME
from tests.deploy.test_kubernetes import ROOT
from tools.image_chroot import Ignored, ImageError, Instruction, Stage, context_files, filled, pairs, parsed
from tools.lock_images import build_requirements, server_requirements, versions_beside, worker_requirements

IMAGES = ROOT / "deploy" / "images"
NAMES = ["server", "worker"]
BUILD_TOOLS = re.compile(r"\b(gcc|cc|make|cython|setuptools|[\w.-]+-dev)\b")


def stages(name: str) -> list[Stage]:
    return parsed((IMAGES / name / "Dockerfile").read_text())[1]


def all_of(stage: Stage, name: str) -> list[str]:
    return [one.rest for one in stage.instructions if one.name == name]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_known_to_what_tries_them(name: str) -> None:
    text = (IMAGES / name / "Dockerfile").read_text()
    assert [stage.name for stage in stages(name)] == ["build", ""]
    assert "HEALTHCHECK" not in re.sub(r"^#.*", "", text, flags=re.MULTILINE), "Kubernetes ignores it"
    for path in re.findall(r"deploy/images/[\w./-]+\w", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_from_an_index_comes_by_hash(name: str) -> None:
    runs = [command for stage in stages(name) for command in all_of(stage, "RUN")]
    steps = [step for command in runs for step in command.split("&&") if re.search(r"pip (install|wheel)", step)]
    assert len(steps) >= 4
    for step in steps:
        assert "--no-index" in step or {"--require-hashes", "--only-binary", "-r"} <= set(step.split()), step


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage_runs_as_a_number_has_labels_and_builds_nothing(name: str) -> None:
    last = stages(name)[-1]
    assert re.fullmatch(r"65532:(0|65532)", all_of(last, "USER")[-1])
    assert last.instructions[-1].name in ("USER", "ENTRYPOINT"), "nothing becomes root again"
    assert not [command for command in all_of(last, "RUN") if BUILD_TOOLS.search(command)]
    labels = pairs(" ".join(all_of(last, "LABEL")), {"REVISION": "abc"})
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    beginning = "org.opencontainers.image."
    assert labels.keys() == {beginning + key for key in ("title", "description", "version", "revision", "licenses")}
    assert labels[f"{beginning}version"] == project["version"]
    assert labels[f"{beginning}licenses"] == project["license"]
    assert labels[f"{beginning}revision"] == "abc"


def test_the_servers_image_starts_the_server_with_settings_that_exist() -> None:
    build, last = stages("server")
    assert all_of(last, "ENTRYPOINT") == ['["mxserver"]']
    environ = pairs(" ".join(all_of(last, "ENV")), {})
    names = {name for name in environ if name.startswith(("MX_", "MODEL_EXPRESS_"))}
    assert names == {"MX_STORE_PATH", "MODEL_EXPRESS_CACHE_DIRECTORY"} <= BY_NAME.keys()
    volumes = re.findall(r'"([^"]+)"', all_of(last, "VOLUME")[0])
    assert [Path(environ["MX_STORE_PATH"]).parent, Path(environ["MODEL_EXPRESS_CACHE_DIRECTORY"])] == [
        *map(Path, volumes)
    ]
    assert build.base == last.base == "${BASE}", "Python is where the build has it"


def test_the_workers_image_is_the_users_vllm_image_with_this_package() -> None:
    arguments, (build, last) = parsed((IMAGES / "worker" / "Dockerfile").read_text())
    assert arguments == {"VLLM_IMAGE": ""}
    assert build.base == last.base == "${VLLM_IMAGE}"
    [install] = all_of(last, "RUN")
    assert all("--no-deps" in step for step in install.split("&&") if "pip install" in step), "vLLM's own stay"


@pytest.mark.parametrize("name", NAMES)
def test_the_context_has_what_the_package_is_built_from_and_nothing_else(name: str) -> None:
    ignored = Ignored((IMAGES / name / "Dockerfile.dockerignore").read_text())
    files = set(context_files(ROOT, ignored))
    assert {"setup.py", "pyproject.toml", "mxcore/settings.py", "mxserver/web/assets/icon.svg"} - files == set()
    assert {f"deploy/images/{name}/requirements.lock", "deploy/images/build.lock"} <= files
    places = ("tests/", ".venv/", ".git/", "build/", "docs/", "bench/micro/", "deploy/helm/")
    assert [path for path in files if path.startswith(places) or path.endswith((".so", ".pyc"))] == []


def packages(lock: Path) -> dict[str, tuple[str, int, set[str]]]:
    """Each package of a lock file: its version, how many hashes, and who needs it."""
    found: dict[str, tuple[str, int, set[str]]] = {}
    text = re.sub(r"^# .*\n", "", lock.read_text(), count=1)
    for block in re.findall(r"^\S+==.*\n(?:[ #].*\n)+", text, re.MULTILINE):
        name, version = block.split()[0].split("==")
        notes = re.findall(r"^    # (.*)$", block, re.MULTILINE)
        because = {note.removeprefix("via").strip() for note in notes} - {""}
        found[name] = version, block.count("--hash=sha256:"), because
    assert len(found) == len(re.findall(r"^\S+==", text, re.MULTILINE))
    return found


@pytest.mark.parametrize(
    ("lock", "requirements"),
    [
        ("server/requirements.lock", server_requirements()),
        ("worker/requirements.lock", worker_requirements()),
        ("build.lock", build_requirements()),
    ],
)
def test_a_lock_has_what_is_asked_for_and_what_that_needs(lock: str, requirements: list[str]) -> None:
    found = packages(IMAGES / lock)
    wanted = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, requirements)}
    asked_for = {name for name, (_, _, because) in found.items() if any("pyproject.in" in line for line in because)}
    assert asked_for == wanted.keys(), "python tools/lock_images.py"
    for name, specifier in wanted.items():
        assert specifier.contains(found[name][0], prereleases=True), (name, found[name][0])
    for name, (_, hashes, because) in found.items():
        assert hashes > 0, name
        assert because, name
        assert {line for line in because if "pyproject.in" not in line} <= found.keys(), name
    assert not re.search(r"https?://|--index|--find-links", (IMAGES / lock).read_text())


def test_the_server_has_no_torch_and_the_worker_what_vllm_has_not() -> None:
    server = packages(IMAGES / "server" / "requirements.lock")
    assert {"torch", "vllm", "numpy", "nixl-cu12"} & server.keys() == set()
    assert {"redis", "hiredis", "obstore", "opentelemetry-sdk"} <= server.keys()
    beside = ", ".join(versions_beside())
    first = (IMAGES / "worker" / "requirements.lock").read_text().splitlines()[0]
    assert f"A vLLM image with {beside}" in first or f"a vLLM image with {beside}" in first


def test_what_a_dockerfile_may_say_is_read() -> None:
    arguments, found = parsed(
        "ARG BASE=debian\n# a comment\nFROM ${BASE} AS one\nRUN a \\\n    # between\n    && b\n\nFROM one\nUSER 7\n"
    )
    assert arguments == {"BASE": "debian"}
    assert found[0] == Stage("${BASE}", "one", [Instruction("RUN", "a && b")])
    assert (found[1].base, found[1].instructions) == ("one", [Instruction("USER", "7")])
    assert filled("${BASE}:${TAG}", {"BASE": "debian", "TAG": "x"}) == "debian:x"
    assert pairs('a="b c" d=${E}', {"E": "f"}) == {"a": "b c", "d": "f"}


@pytest.mark.parametrize("text", ["FROM a\nHEALTHCHECK NONE\n", "RUN early\n", "FROM a\nrun small\n"])
def test_what_is_not_known_is_an_error(text: str) -> None:
    with pytest.raises(ImageError, match="no instruction that is known here"):
        parsed(text)


def test_a_name_without_a_value_is_an_error() -> None:
    with pytest.raises(ImageError, match="VLLM_IMAGE has no value"):
        filled("${VLLM_IMAGE}", {"VLLM_IMAGE": ""})


def test_the_last_pattern_that_fits_decides() -> None:
    ignored = Ignored("*\n!kept\n!a/deep\n**/__pycache__\n# a comment\n*.txt\n")
    assert [ignored(path) for path in ("b", "kept", "kept/x/y", "kept/x/__pycache__/y", "a/deep/z", "a/z")] == [
        *(True, False, False, True, False, True)
    ]
    assert (ignored.may_hold("a"), ignored.may_hold("b")) == (True, False)
