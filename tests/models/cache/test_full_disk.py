"""A worker whose disk is full: an error with the numbers, nothing half left behind, and room is all that it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mxbench.stand_ins.hub import HubStandIn
from mxbench.stand_ins.tcp_proxy import TcpProxy
from mxcore.cli.models import models
from mxserver.wire import DiskFull
from mxserver.wire.files import ModelClient
from tests.models.conftest import FILE_DIGESTS, REPOSITORY, StartServer, digests_of, files_below, pattern
from tests.small_disk import SmallDisk

LARGE = "org/large"
LARGE_FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": pattern(9_000_000, 5),
    "model-00002-of-00002.safetensors": pattern(3_000_000, 6),
}
TOLD = re.compile(r"(?P<place>/\S+): (?P<wanted>\d+) bytes are to be written, and (?P<free>\d+) are free")


def told(error: DiskFull) -> tuple[Path, int, int]:
    found = TOLD.search(str(error))
    assert found is not None, str(error)
    return Path(found["place"]), int(found["wanted"]), int(found["free"])


def weights_below(folder: Path) -> list[Path]:
    """Weight files, and whatever is large under another name."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


@pytest.fixture
def server_address(start_server: StartServer, hub: HubStandIn) -> str:
    hub.add(LARGE, LARGE_FILES)
    address = start_server().address
    with ModelClient(address) as client:
        client.ensure(LARGE)
        client.ensure(REPOSITORY)
    return address


def test_what_cannot_fit_is_told_before_the_first_byte(server_address: str, small_disk: SmallDisk) -> None:
    with TcpProxy(server_address) as proxy, ModelClient(proxy.address, patience_seconds=60, files_port=0) as client:
        first = client.fetch_to_hub_cache(LARGE, small_disk.folder, ignore_weights=True)
        free_bytes, before = small_disk.free_bytes, proxy.answered_bytes
        with pytest.raises(DiskFull) as caught:
            client.fetch_to_hub_cache(LARGE, small_disk.folder)
        assert told(caught.value) == (first, 12_000_000, free_bytes)
        assert proxy.answered_bytes - before < 100_000
        assert files_below(first) == digests_of({"config.json": b"{}"}), "what was there stays"
        assert not weights_below(small_disk.folder)

        small_disk.resize("32m")
        assert client.fetch_to_hub_cache(LARGE, small_disk.folder) == first
        assert files_below(first) == digests_of(LARGE_FILES)


def test_a_disk_that_others_fill_meanwhile(server_address: str, small_disk: SmallDisk) -> None:
    """Some of the files are whole by then: they go as well, and the room is there for others."""
    foreign: list[Path] = []
    with TcpProxy(server_address) as proxy, ModelClient(proxy.address, patience_seconds=60, files_port=0) as client:
        free_bytes = small_disk.free_bytes
        proxy.cut_after(2_000_000, meanwhile=lambda: foreign.append(small_disk.fill(200_000)))
        with pytest.raises(DiskFull, match="No space left on device") as caught:
            client.fetch_to_hub_cache(REPOSITORY, small_disk.folder)
        assert proxy.cuts == 1
        place, wanted_bytes, free = told(caught.value)
        assert small_disk.folder in place.parents
        assert wanted_bytes == sum(found.size_bytes for found in FILE_DIGESTS.values())
        assert free < wanted_bytes
        assert weights_below(small_disk.folder) == foreign
        assert not list(small_disk.folder.rglob("snapshots"))
        foreign[0].unlink()
        assert small_disk.free_bytes > free_bytes - 100_000

        snapshot = client.fetch_to_hub_cache(REPOSITORY, small_disk.folder)
        assert files_below(snapshot) == FILE_DIGESTS


def test_a_folder_of_ones_own_on_a_full_disk(server_address: str, small_disk: SmallDisk) -> None:
    small_disk.fill(0)
    with ModelClient(server_address) as client, pytest.raises(DiskFull) as caught:
        client.fetch(REPOSITORY, small_disk.folder / "model")
    assert told(caught.value)[2] < 100_000
    assert [path.name for path in weights_below(small_disk.folder)] == ["foreign"]


def test_the_command_says_it_in_one_line(server_address: str, small_disk: SmallDisk) -> None:
    folder = small_disk.folder / "model"
    ran = CliRunner().invoke(models, ["--server", server_address, "get", LARGE, "--to", str(folder)])
    assert ran.exit_code == 1, ran.output
    (line,) = [line for line in ran.stderr.splitlines() if "bytes are to be written" in line]
    assert str(folder) in line
    assert "Traceback" not in ran.output
