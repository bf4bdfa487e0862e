"""What is being made has a name of its own, over threads and over containers in which everybody is process 1."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mxcore.storage.remote import place_in_hub_cache
from mxserver.models.cache_layout import CacheLayout
from mxserver.models.names import ModelName
from mxserver.wire import remove_leftovers, unique_beside
from mxserver.wire.proto import model_pb2

ROOT = Path(__file__).parents[2]
SOURCES = ("mxserver", "mxcore", "vllm_plugin", "bench", "tools")
NAMED_BY_PROCESS = re.compile(r"(with_name|with_suffix|/) *\(?f[\"'][^\"']*getpid\(\)")


def test_no_path_is_named_by_a_process_id() -> None:
    sources = [path for package in SOURCES for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 100
    assert [str(path) for path in sources if NAMED_BY_PROCESS.search(path.read_text())] == []


def test_names_are_short_and_never_the_same(tmp_path: Path) -> None:
    named = tmp_path / ("n" * 255)
    names = {unique_beside(named) for _ in range(1_000)}
    assert len(names) == 1_000
    for name in list(names)[:2]:
        name.touch()  # a name of 255 bytes is the longest one


def test_references_of_two_models_that_are_written_at_once(tmp_path: Path) -> None:
    layout = CacheLayout(tmp_path)
    layout.staging.mkdir(parents=True)
    models = [ModelName(model_pb2.HUGGING_FACE, f"org/m{number}") for number in range(2)]
    start = threading.Barrier(2)
    errors: list[BaseException] = []

    def write(model: ModelName, commit: str) -> None:
        try:
            for _ in range(100):
                start.wait(60)
                layout.write_ref(model, "main", commit, layout.staging)
                assert layout.read_ref(model, "main") == commit
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=write, args=(model, f"{at}" * 40)) for at, model in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


CONTAINER = """
import os, pathlib, sys
from mxcore.storage.remote import place_in_hub_cache
assert os.getpid() == 1
def fill(folder):
    (folder / "config.json").write_text("{}")
    print("filling", flush=True)
    sys.stdin.readline()
    (folder / "tokenizer.json").write_text("{}")
print(place_in_hub_cache(pathlib.Path(sys.argv[1]), "org/m", "a" * 40, fill))
"""
UNSHARE = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]


def _may_unshare() -> bool:
    return (
        shutil.which("unshare") is not None and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
    )


@pytest.mark.skipif(not _may_unshare(), reason="this machine allows no namespaces of processes")
def test_two_containers_that_fill_one_cache(tmp_path: Path) -> None:
    """The second begins while the first fills; both are process 1. Nothing incomplete gets the snapshot's name."""
    command = [*UNSHARE, sys.executable, "-c", CONTAINER, str(tmp_path)]
    snapshot = tmp_path / "models--org--m" / "snapshots" / ("a" * 40)
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "filling\n"
    assert not snapshot.exists()
    for one in both:
        assert one.communicate("\n", 60)[0].strip() == str(snapshot)
        assert one.returncode == 0
        assert {path.name for path in snapshot.iterdir()} == {"config.json", "tokenizer.json"}
    assert sorted(path.name for path in snapshot.parent.parent.iterdir()) == [".mx-commits", "refs", "snapshots"]


def test_threads_that_fill_one_cache(tmp_path: Path) -> None:
    filling = threading.Barrier(4)

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        filling.wait(60)
        (folder / "tokenizer.json").write_text("{}")

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(place_in_hub_cache(tmp_path, "org/m", "a" * 40, fill)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {path.name for path in found[0].iterdir()} == {"config.json", "tokenizer.json"}


def test_what_killed_processes_left_goes_after_a_day(tmp_path: Path) -> None:
    old_file, old_folder, young = (unique_beside(tmp_path / "x") for _ in range(3))
    old_folder.mkdir()
    for path in (old_folder / "part", old_file, young, tmp_path / ".mx-partial", tmp_path / ".mx-uri"):
        path.touch()
    for path in (old_file, old_folder, tmp_path / ".mx-partial", tmp_path / ".mx-uri"):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {young.name, ".mx-partial", ".mx-uri"}


def test_a_process_that_cannot_see_its_machine_is_a_host_of_its_own(tmp_path: Path) -> None:
    """Without /proc it shares nothing that is being made, with other processes of the machine either."""
    code = (
        "import pathlib; from mxserver.wire import file_locks\n"
        f"file_locks._BOOT_ID = pathlib.Path({str(tmp_path / 'none')!r})\n"
        "print(file_locks.host_id(), file_locks.host_id())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    (one, again), (other, _) = (run.stdout.split() for run in runs)
    assert one == again
    assert one != other
    assert len(one) == 32
