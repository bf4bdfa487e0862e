"""`mx bench cluster` on this machine, and its parts; `make test-cluster` runs it between namespaces over ssh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from mxbench.cluster.hosts_file import parse_hosts
from mxbench.cluster.pod import lines
from mxbench.cluster.run_folder import RunFolder
from mxbench.cluster.steps import steps_of, tournament
from mxbench.cluster.verdict import figures_of, verdict
from mxcore.cli.main import mx

SMALL = ["--mib", "2", "--chunk-mib", "0.25", "--seconds", "0.05", "--connections", "1"]


def test_a_machine_that_is_not_there_fails_its_steps(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a here\nb agent=127.0.0.1:1\n")
    words = ["--hosts", str(tmp_path / "hosts"), "--run", str(tmp_path / "run"), *SMALL]
    ran = CliRunner().invoke(mx, ["bench", "cluster", *words])
    assert ran.exit_code == 1
    assert "b: nobody listens at 127.0.0.1:1" in (tmp_path / "run/steps/00-machines.failed").read_text()
    assert "failed: machines, pairs, fan-out-swarm-1, storage, update" in ran.output


@pytest.mark.parametrize("count", range(2, 12))
def test_everybody_meets_everybody_once(count: int) -> None:
    rounds = tournament(count)
    met = [tuple(sorted(pair)) for each in rounds for pair in each]
    assert sorted(met) == [(one, other) for one in range(count) for other in range(one + 1, count)]
    assert all(len({place for pair in each for place in pair}) == 2 * len(each) for each in rounds)


def test_the_steps_of_a_cluster() -> None:
    names = [step.name for step in steps_of(6, ("swarm", "star"))]
    assert names == [
        *("machines", "pairs", "fan-out-swarm-1", "fan-out-swarm-2", "fan-out-star-2", "fan-out-swarm-4"),
        *("fan-out-star-4", "fan-out-swarm-5", "fan-out-star-5", "storage", "update", "killed"),
    ]
    assert "killed" not in [step.name for step in steps_of(2, ("swarm",))]


def links(**slow: float) -> list[dict[str, Any]]:
    """All links of four machines at 1 GB/s but some, named a_b."""
    names = "abcd"
    return [
        {"from": one, "to": other, "gbps": slow.get(f"{one}_{other}", 1.0)}
        for one in names
        for other in names
        if one != other
    ]


def steps(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [("swarm", 1, 10.0), ("swarm", 3, 11.0), ("star", 3, 30.0), ("doubling", 3, 20.0)]
    return {
        "pairs": {"figures": {"link_median_gbps": 1.0}, "pairs": pairs},
        **{
            f"fan-out-{strategy}-{count}": {"fan_out": {"strategy": strategy, "receivers": count, "seconds": seconds}}
            for strategy, count, seconds in rows
        },
        "storage": {"figures": {"storage_readers": 1, "seconds": 12.0}},
        "killed": {"figures": {"seconds": 13.2}},
    }


def test_the_verdict_names_the_slow_pair_last() -> None:
    found = steps(links(b_d=0.1, d_b=0.11))
    assert list(verdict(found, [])) == [
        "3 receivers take 1.10 times as long as one (doubling 2.00, star 3.00)",
        "storage was read by 1 of all that started at once",
        "with a worker killed at half, the others took 1.20 times as long",
        "slow links: b -> d at 0.1 GB/s, d -> b at 0.11 GB/s; the slowest has 10 % of the median 1 GB/s",
    ]
    assert figures_of(found)["slow_links"] == 2
    assert figures_of(found)["star_t3_over_t1"] == 3.0


@pytest.mark.parametrize(("gbps", "is_told"), [(1.2, False), (3.0, True)])
def test_receivers_that_did_not_go_over_the_links_are_told(gbps: float, is_told: bool) -> None:
    """A swarm has several links at once, a star's receivers one each."""
    found = steps(links())
    found["pairs"]["figures"]["link_fastest_gbps"] = 1.0
    for name, rate in (("swarm-1", 0.5), ("swarm-3", 9.0), ("star-3", gbps), ("doubling-3", 9.0)):
        found[f"fan-out-{name}"]["figures"] = {"slowest_receiver_gbps": rate}
    told = "receivers had 3 GB/s, the fastest link 1: they took another way than the links (one machine's memory, RDMA)"
    assert (told in verdict(found, [])) is is_told
    assert any("another way" in line for line in verdict(found, [])) is is_told


def test_a_machine_with_a_slow_card_is_named_and_none_where_all_are_alike() -> None:
    slow = {f"{one}_{other}": 0.2 for one in "abcd" for other in "abcd" if "c" in (one, other)}
    assert (
        list(verdict(steps(links(**slow)), []))[-1] == "slow machine: every link of c, at 0.2 GB/s, 33 % of the median"
    )
    assert list(verdict(steps(links(a_b=0.9)), ["killed"]))[-2:] == [
        "failed: killed",
        "no slow link: 12 links, the slowest has 90 % of the median 1 GB/s",
    ]


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(click.UsageError, match=r"not empty, and has no run\.json"):
        RunFolder(tmp_path, {})


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_manifest_is_what_kubernetes_takes(version: str) -> None:
    words = ["--manifest", "--count", "6", "--image", "registry/mx:1", "--mib", "4096", "--strategy", "swarm"]
    ran = CliRunner().invoke(mx, ["bench", "cluster", *words])
    assert ran.exit_code == 0, ran.output
    service, job = yaml.safe_load_all(ran.output)
    for made in (service, job):
        kubernetes_validate.validate(made, version, strict=True)
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 6, 6)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    command = pod["containers"][0]["command"]
    assert command[:3] == ["python3", "-m", "mxbench.cluster.pod"]
    assert command[command.index("--mib") + 1] == "4096"
    assert pod["containers"][0]["image"] == "registry/mx:1"
    named = command[command.index("--named") + 1]
    assert [line.address for line in parse_hosts("\n".join(lines(named, 2, 6570)))] == [
        "mx-bench-0.mx-bench",
        "mx-bench-1.mx-bench",
    ]
