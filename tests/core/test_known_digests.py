"""The samples of a checkpoint are read once a node: by one of the processes that ask, and again once a file changed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from mxcore.storage.checkpoint import checkpoint_digest, content_digest, known_by_versions, known_digests
from tests.core.test_checkpoint_digest import DATA_BYTES, make_checkpoint

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from mxcore.storage.checkpoint import checkpoint_digest, content_digest, known_digests

known_digests.NODE_FOLDER, known_digests.SETTLED_SECONDS = Path(sys.argv[1]), 0
read = content_digest.read_header
def counted(path):
    print("read", flush=True)
    return read(path)
content_digest.read_header = counted
sys.stdin.readline()
print(checkpoint_digest(sorted(Path(sys.argv[2]).glob("*.safetensors")), None), flush=True)
"""


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A node on which nothing is known, and times that tell every change."""
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setattr(known_digests, "NODE_FOLDER", folder)
    monkeypatch.setattr(known_digests, "SETTLED_SECONDS", 0)
    content_digest._digest.cache_clear()
    yield folder
    content_digest._digest.cache_clear()


class Reads:
    """Counts files whose samples are read here; `digest` is what a new process of this node would get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        groups_of_file = content_digest._groups

        def counted(file: known_digests.SampledFile) -> list[list[tuple[int, int]]]:
            self.count += 1
            return groups_of_file(file)

        monkeypatch.setattr(content_digest, "_groups", counted)

    def digest(self, files: list[Path], index: Path | None = None) -> tuple[str, int]:
        content_digest._digest.cache_clear()
        before = self.count
        return checkpoint_digest(files, index), self.count - before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def entries(node: Path) -> list[Path]:
    """What is known there."""
    return [path for path in next(node.iterdir()).iterdir() if "." not in path.name]


def test_of_four_processes_that_ask_at_once_one_reads(tmp_path: Path, node: Path) -> None:
    """As the ranks of an engine do. Two more that start later read nothing either."""
    files, _ = make_checkpoint(tmp_path / "model")
    command = [sys.executable, "-c", PROGRAM, str(node), str(tmp_path / "model")]
    outputs = []
    for count in (4, 2):
        ranks = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("\n")
            rank.stdin.flush()
        outputs += [rank.communicate()[0].split() for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * count
    assert sum(output.count("read") for output in outputs) == len(files)
    assert {output[-1] for output in outputs} == {checkpoint_digest(files, None)}
    left = [path.name for path in next(node.iterdir()).iterdir() if "." in path.name]
    assert [name[1:] for name in left] == [".lock"], "one of sixteen"


def test_what_changes_is_read_again(tmp_path: Path, reads: Reads) -> None:
    files, index = make_checkpoint(tmp_path / "model")
    first = reads.digest(files, index)
    assert reads.digest(files, index) == (first[0], 0)
    index.write_text('{"weight_map": {"a": "b"}}')
    second = reads.digest(files, index)
    assert second[0] != first[0]
    os.utime(files[0], ns=(1, 1))
    assert reads.digest(files, index) == (second[0], 2)


def test_files_that_changed_just_now_are_not_known(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within one tick of the file system's clock would not be seen."""
    monkeypatch.setattr(known_digests, "SETTLED_SECONDS", 10_000)
    files, _ = make_checkpoint(tmp_path / "model")
    assert [reads.digest(files)[1] for _ in range(2)] == [2, 2]


def test_a_second_change_within_one_tick_is_seen_by_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load looks before it reads and after it: what this process remembers must not answer for it."""
    monkeypatch.setattr(known_digests, "SETTLED_SECONDS", 10**6)
    as_it_is = known_digests.SampledFile.of

    def by_the_day(name: str, path: Path) -> known_digests.SampledFile:
        return as_it_is(name, path)._replace(mtime_ns=time.time_ns() // 10**14 * 10**14, ctime_ns=0)

    monkeypatch.setattr(known_digests.SampledFile, "of", by_the_day)
    files, _ = make_checkpoint(tmp_path / "model")
    first = checkpoint_digest(files, None)
    with files[0].open("r+b") as file:
        file.seek(-DATA_BYTES, os.SEEK_END)
        file.write(bytes(DATA_BYTES))
    assert checkpoint_digest(files, None) != first


def test_files_that_change_while_they_are_read_are_not_known(
    tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = make_checkpoint(tmp_path / "model")
    made = content_digest._made

    def changed(*args: object) -> str:
        digest = made(*args)  # type: ignore[arg-type]
        os.utime(files[0], ns=(1, 1))
        return digest

    monkeypatch.setattr(content_digest, "_made", changed)
    assert [reads.digest(files)[1] for _ in range(2)] == [2, 2]


def in_hub_cache(folder: Path, source: Path) -> list[Path]:
    """The checkpoint as the hub's library keeps it: names that are links to blobs, named by the hub's hashes."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{number:x}".rjust(64 if path.suffix == ".safetensors" else 40, "0")
        shutil.copy2(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return sorted(snapshot.glob("*.safetensors"))


def test_by_the_hubs_hashes_it_is_known_to_every_node_that_has_the_cache(
    tmp_path: Path, reads: Reads, node: Path
) -> None:
    """Read by nobody a second time, from whatever mount, machine or copy. It is what a plain folder's digest is."""
    plain, index = make_checkpoint(tmp_path / "model")
    hub = tmp_path / "models--org--name"
    files = in_hub_cache(hub, tmp_path / "model")
    cached_index = files[0].with_name(index.name)
    first = reads.digest(files, cached_index)
    assert first == (reads.digest(plain, index)[0], 2)
    shutil.rmtree(next(node.iterdir()))  # another node
    assert reads.digest(files, cached_index) == (first[0], 0)
    copy = tmp_path / "elsewhere" / hub.name
    shutil.copytree(hub, copy, symlinks=True)
    shutil.rmtree(next(node.iterdir()))
    there = [copy / file.relative_to(hub) for file in files]
    assert reads.digest(there, copy / cached_index.relative_to(hub)) == (first[0], 0)
    blob = files[0].resolve()
    blob.write_bytes(blob.read_bytes()[:-DATA_BYTES] + bytes(DATA_BYTES))  # in place: its name is a lie now
    edited = reads.digest(files, cached_index)
    assert edited[0] != first[0]
    assert edited[1] == 2


def test_nobody_elses_folder_is_believed(tmp_path: Path, reads: Reads, node: Path) -> None:
    files, _ = make_checkpoint(tmp_path / "model")
    place = node / f"mx-digests-{os.getuid()}"
    place.mkdir()
    place.chmod(0o777)
    assert [reads.digest(files)[1] for _ in range(2)] == [2, 2]
    place.rmdir()
    place.symlink_to(tmp_path, target_is_directory=True)
    assert reads.digest(files)[1] == 2


def test_a_damaged_entry_and_a_process_that_hangs_or_died_cost_a_reading(
    tmp_path: Path, reads: Reads, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _ = make_checkpoint(tmp_path / "model")
    digest = reads.digest(files)[0]
    [entry] = entries(node)
    entry.write_text("nothing")
    assert reads.digest(files) == (digest, 2)
    entry.unlink()
    monkeypatch.setattr(known_digests, "WAIT_SECONDS", 0.1)
    lock = entry.with_name(f"{entry.name[0]}.lock")
    with FileLock(lock):
        assert reads.digest(files) == (digest, 2)
    entry.unlink()
    monkeypatch.setattr(known_digests, "WAIT_SECONDS", 60)
    dies = f"import os; from filelock import FileLock; FileLock({str(lock)!r}).acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", dies], check=True)
    assert reads.digest(files) == (digest, 2)


def test_what_is_kept_is_bounded(tmp_path: Path, reads: Reads, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_digests, "KEPT", 3)
    files, _ = make_checkpoint(tmp_path / "model")
    for number in range(6):
        os.utime(files[0], ns=(number, number))
        reads.digest(files)
    assert len(entries(node)) == 3


def test_what_lies_elsewhere_is_known_by_its_versions(node: Path) -> None:
    made: list[str] = []

    def digest(place: str, *files: tuple[str, int, str]) -> tuple[str, int]:
        known = known_by_versions(place, files, lambda: made.append("") or f"{len(made):016x}")
        return known, len(made)

    assert digest("s3://a", ("m", 1, "e1")) == digest("s3://a", ("m", 1, "e1")) == (f"{1:016x}", 1)
    assert digest("s3://a", ("m", 1, "e2"))[1] == 2
    assert digest("s3://b", ("m", 1, "e1"))[1] == 3
    assert [digest("s3://a", ("m", 1, "e1"), ("n", 1, ""))[1] for _ in range(2)] == [4, 5], "one has no version"


def test_a_folder_that_does_not_lock_costs_a_reading(
    tmp_path: Path, reads: Reads, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    files, _ = make_checkpoint(tmp_path / "model")
    assert [reads.digest(files)[1] for _ in range(2)] == [2, 0], "it is kept all the same"
