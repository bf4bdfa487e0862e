"""Where workers are: what is understood as a place, and which sources are taken because of it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mxcore.errors import SourceUnreachable
from mxcore.settings import load_settings
from mxcore.transfer.member.place import Place, current_place
from mxserver.wire.calls import Near, ServerClient
from mxserver.wire.proto import mx_pb2
from tests.transfer.conftest import RunningServer
from tests.transfer.fleet_member import SEED, Member
from tests.transfer.memory import identity

HERE = {"zone": "a", "rack": "r7", "host": "n3"}


def place(told: str | Path, environ: dict[str, str] | None = None, **names: str) -> Place:
    overrides = {"MX_P2P_TOPOLOGY": str(told)} if told else {}
    return current_place(load_settings({**overrides, **names}, environ or {}))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


LABELS = """app="vllm"
topology.kubernetes.io/zone="a"
cloud.example.com/gce-topology-rack="r7"
kubernetes.io/hostname="n3"
note="a \\"quoted\\" one, with = and \\\\"
"""


@pytest.mark.parametrize("told", ["zone=a,rack=r7,host=n3", " zone = a , rack=r7,hostname=n3", json.dumps(HERE)])
def test_a_place_as_text(told: str) -> None:
    assert place(told).topology == HERE


def test_a_place_of_the_downward_api(tmp_path: Path) -> None:
    """The kubelet writes a folder of links, and changes what they show by one rename."""
    (tmp_path / "..2026").mkdir()
    write(tmp_path / "..2026", labels=LABELS, annotations='kubernetes.io/config.seen="now"\n')
    (tmp_path / "..data").symlink_to("..2026")
    for name in ("labels", "annotations"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert place(tmp_path).topology == HERE
    assert place(tmp_path / "labels").topology == HERE
    (tmp_path / "..2027").mkdir()
    write(tmp_path / "..2027", labels='zone="b"', annotations="")
    (tmp_path / "..new").symlink_to("..2027")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert place(tmp_path).topology["zone"] == "b"


def test_a_folder_with_a_file_for_each_level(tmp_path: Path) -> None:
    assert place(write(tmp_path, zone="a\n", rack="r7", host="n3")).topology == HERE


def test_the_host_is_known_without_being_told() -> None:
    assert set(place("").topology) == {"host"}
    assert place("").distance(place("zone=a").topology) == 0


def test_names_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the downward API; else of the place that was told, the pod's host name, or the machine's name."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    machine = socket.gethostname()
    assert place("").names == ("", machine)
    assert place("host=n3").names == ("", "n3")
    assert place("host=n3", {"POD_NAME": "p", "NODE_NAME": "n4"}).names == ("p", "n4")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert place("").names == (machine, "")
    assert place("", {"NODE_NAME": "n" * 1000}).names == (machine, "n" * 253)


@pytest.mark.parametrize("told", ["/no/such/file", "{not json", "zone a", "{}"])
def test_what_cannot_be_read_is_no_place(told: str, caplog: pytest.LogCaptureFixture) -> None:
    assert set(place(told).topology) == {"host"}
    assert ("says no place" in caplog.text) == (told != "{}")
    assert place(told, MX_P2P_TOPOLOGY_DOMAIN="zone").problem


def test_names_of_modelexpress() -> None:
    """MX_P2P_TOPOLOGY* as its docs have them; a domain is required unless it is said to be preferred."""
    environ = {"MX_P2P_TOPOLOGY": '{"pod": "p", "cell": "c"}', "MX_P2P_TOPOLOGY_LEVELS": "cell, pod"}
    found = place("", environ)
    assert (found.topology, found.levels, found.required) == ({"pod": "p", "cell": "c"}, ("cell", "pod"), "")
    environ["MX_P2P_TOPOLOGY_DOMAIN"] = "cell"
    for enforcement, required in (("", "cell"), ("required", "cell"), ("requird", "cell"), ("preferred", "")):
        environ["MX_P2P_TOPOLOGY_ENFORCEMENT"] = enforcement
        assert place("", environ).required == required
    assert place("pod=ours", environ, MX_P2P_TOPOLOGY_DOMAIN="pod").required == "pod"
    assert place("pod=ours", environ).topology == {"pod": "ours"}


def test_distances() -> None:
    here = place("zone=a,rack=r7,host=n3")
    others = [HERE, {**HERE, "host": "n4"}, {"zone": "a", "rack": "r8"}, {"zone": "b", "rack": ""}, {}]
    assert [here.distance(other) for other in others] == [0, 1, 4, 6, 6]
    assert Place({}, ("zone",)).distance({"zone": ""}) == 1  # unknown is not the same
    assert place("zone=a", MX_P2P_TOPOLOGY_DOMAIN="zone").allows({"zone": "a"})
    assert not place("zone=a", MX_P2P_TOPOLOGY_DOMAIN="zone").allows({})
    assert not place("rack=r", MX_P2P_TOPOLOGY_DOMAIN="zone").allows({"zone": ""})


@pytest.fixture
def member(server: RunningServer) -> Iterator[Callable[..., Member]]:
    """In memory of this process, with `seed` None: to be received."""
    made: list[Member] = []

    def make(told: str, seed: int | None = None, **changes: Any) -> Member:
        made.append(Member(server.address, seed, 4, MX_P2P_TOPOLOGY=told, **changes))
        return made[-1]

    yield make
    for each in made:
        each.membership.close()


def test_near_sources_are_taken_first(member: Callable[..., Member]) -> None:
    """The far ones are slow here: what they give is what they gave before the near one had answered."""
    slow = {"MX_SOURCE_RATE_LIMIT": "200 KB"}
    far, zone = member("zone=b,host=n8", SEED, **slow), member("zone=a,host=n4", SEED, **slow)
    rack = member("zone=a,host=n5,rack=r7", SEED)
    for source in (far, zone, rack):
        source.serve()
    target = member("zone=a,host=n3,rack=r7")
    found = target.membership.find_sources()
    assert [source.distance for source in found] == [1, 4, 6]
    assert [source.worker_id for source in found] == [s.membership.worker_id for s in (rack, zone, far)]
    report = target.receive(found)
    assert target.is_right
    assert report.bytes_from[rack.membership.worker_id] > report.bytes / 2


def test_required_fails_closed(member: Callable[..., Member], caplog: pytest.LogCaptureFixture) -> None:
    member("zone=b", SEED).serve()
    member("", SEED).serve()  # it does not say where it is
    required = {"MX_P2P_TOPOLOGY_DOMAIN": "zone", "MX_SOURCE_WAIT_SECS": 20}
    target = member("zone=a", **required)
    assert target.membership.find_sources(receiving=True) == []
    assert member("zone=a").membership.find_sources() != []
    with pytest.raises(SourceUnreachable):
        target.receive([])
    lost = member("rack=r7", **required)  # it does not know its own zone
    assert lost.membership.find_sources() == []
    with caplog.at_level(logging.WARNING):
        assert lost.membership.wait_for_source() == []
    assert "does not know its own zone" in caplog.text
    near = member("zone=a", SEED)
    near.serve()
    assert [source.worker_id for source in target.membership.find_sources()] == [near.membership.worker_id]


def test_one_reads_storage_in_each_domain(server: RunningServer) -> None:
    """Who may take nothing from zone a does not wait for the one that reads there."""
    with ServerClient(server.address, timeout_seconds=60) as client:
        turns = [client.take_storage_turn("s", 0, f"w{n}", domain=domain).turn for n, domain in enumerate("aabb")]
        assert turns == 2 * [mx_pb2.STORAGE_TURN_YOURS, mx_pb2.STORAGE_TURN_WAIT]


def test_those_who_ask_are_told_of_near_ones_and_not_all_of_the_same(
    server: RunningServer, member: Callable[..., Member]
) -> None:
    for n in range(12):
        member(f"zone={'ab'[n % 2]},host=n{n}", SEED).serve()
    with ServerClient(server.address, timeout_seconds=60) as client:

        def listed(asker: str) -> list[str]:
            near = Near(asker, {"zone": "a"}, ("zone", "host"))
            refs = client.list_sources(identity(), limit=3, near=near)
            assert all(ref.worker_grpc_endpoint for ref in refs)
            assert {ref.topology["zone"] for ref in refs} == {"a"}
            return [ref.worker_id for ref in refs]

        assert listed("x") == listed("x")
        assert len({worker for asker in range(20) for worker in listed(f"asker {asker}")}) == 6
