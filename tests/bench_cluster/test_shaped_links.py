"""Between namespaces with shaped links: rates within 5 % of the links' own, and the slow link is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench_cluster.conftest import SLOW
from tests.bench_cluster.mesh import Mesh

MX = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "bench"]
SMALL = ["--mib", "24", "--chunk-mib", "1", "--seconds", "2", "--connections", "2"]
WITHIN = 0.05


def mx_bench(*words: object, prefix: list[str] | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [*(prefix or []), *MX, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**settings))


def environment(**settings: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "UCX_", "MODEL_"))}
    return {**own, **settings}


def peer(mesh: Mesh, *words: object) -> dict[str, Any]:
    """What the second machine measures with the first; three rounds, whose medians count."""
    listen = [*mesh.prefix(0), *MX, "peer", "--listen", "--address", mesh.address(0), "--once"]
    names = environment(UCX_NET_DEVICES="to1")  # else UCX would go over the network of ssh as well
    with subprocess.Popen(listen, stderr=subprocess.PIPE, text=True, env=names) as listener:
        assert listener.stderr is not None
        assert "listening on" in listener.stderr.readline()
        connect = ("peer", "--connect", mesh.address(0), "--rounds", 3, "--seconds", 1, "--json")
        ran = mx_bench(*connect, *words, prefix=mesh.prefix(1), UCX_NET_DEVICES="to0")
        listener.kill()
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout)
    return told


def test_a_peer_tells_the_true_rate_both_ways(mesh: Mesh) -> None:
    told = peer(mesh, "--mib", 24)
    true = mesh.gbps(0, 1)
    for direction in ("take", "give"):
        for name in ("link_sockets_1", "link_sockets_2", "link_sockets_4", "link_nixl_tcp", "tcp_few", "tcp_many"):
            assert told["figures"][f"{direction}_{name}_gbps"] == pytest.approx(true, rel=WITHIN), name
        assert told["figures"][f"{direction}_vs_link"] == pytest.approx(1, rel=WITHIN)
    assert [line.partition(": ")[0] for line in told["verdict"]] == [
        f"{mesh.address(0)} -> here",
        f"here -> {mesh.address(0)}",
    ]
    assert all(" % of the link by tcp" in line for line in told["verdict"])


def test_a_link_that_got_slower_by_a_fifth_is_named(mesh: Mesh, tmp_path: Path) -> None:
    """By the link's own figures and by the product's; the same link again has not changed."""
    words = ("--mib", 16, "--direction", "take", "--transport", "tcp", "--shape", "few")
    files = [tmp_path / name for name in ("before", "again", "after")]
    for file in files[:2]:
        file.write_text(json.dumps(peer(mesh, *words)))
    with mesh.slower(0, 1, 0.8):
        files[2].write_text(json.dumps(peer(mesh, *words)))

    def changed(after: Path) -> dict[str, str]:
        ran = mx_bench("compare", files[0], after, "--json")
        told = json.loads(ran.stdout)
        assert ran.returncode == (1 if told["figures"]["slower_figures"] else 0), ran.stderr
        return {row["name"]: row["verdict"] for row in told["changes"] if row["unit"] == "GB/s"}

    rates = {
        *(f"take_link_sockets_{count}_gbps" for count in (1, 2, 4)),
        "take_tcp_few_gbps",
        "take_tcp_few_whole_gbps",
    }
    assert changed(files[0]) == dict.fromkeys(rates, "no change")
    assert changed(files[1]) == dict.fromkeys(rates, "no change")
    assert changed(files[2]) == dict.fromkeys(rates, "slower")


def test_a_cluster_over_ssh_names_the_slow_link(mesh: Mesh, ssh_config: Path, hosts_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("cluster", "--hosts", hosts_file, "--run", run, "--ssh-config", ssh_config, *SMALL)
    words = (*words, "--transport", "tcp")  # all share this machine's memory
    ran = mx_bench(*words)
    assert ran.returncode == 0, ran.stderr
    one, other = (f"n{number}" for number in SLOW)
    last = ran.stdout.splitlines()[-1]
    assert last.startswith("slow links: ")
    assert {f"{one} -> {other}", f"{other} -> {one}"} == {
        word.strip().partition(" at ")[0] for word in last.removeprefix("slow links: ").partition(";")[0].split(",")
    }
    assert "10 % of the median" in last
    pairs = json.loads((run / "steps/01-pairs.json").read_text())["pairs"]
    assert len(pairs) == 12
    for pair in pairs:
        true = mesh.gbps(int(pair["from"][1:]), int(pair["to"][1:]))
        assert pair["gbps"] == pytest.approx(true, rel=WITHIN), pair
    result = json.loads((run / "result.json").read_text())
    assert (result["failed"], result["not_begun"]) == ([], [])
    assert result["figures"]["storage_readers"] == 1
    assert {
        "t2_over_t1",
        "t3_over_t1",
        "star_t3_over_t1",
        "doubling_t3_over_t1",
        "killed_seconds",
        "update_seconds",
    } <= set(result["figures"])
    assert json.loads(next((run / "steps").glob("*-killed.json")).read_text())["killed"] == "n1"
    reported = mx_bench("report", run)
    assert reported.returncode == 0, reported.stderr
    assert last in (run / "report.html").read_text().replace("&gt;", ">")
    assert (run / "pairs-steps-01-pairs.png").read_bytes().startswith(b"\x89PNG")
    assert mx_bench("compare", run, run).stdout.splitlines()[-1].startswith("no change in ")
    next((run / "steps").glob("*-storage.json")).unlink()
    again = mx_bench(*words)
    assert (again.returncode, again.stderr.splitlines()) == (0, ["storage …"])


def test_a_machine_that_ssh_does_not_reach_is_named(ssh_config: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(f"n0 python={sys.executable}\nn9 ssh=nobody@10.214.0.99\n")
    words = ("--hosts", tmp_path / "hosts", "--run", tmp_path / "run", "--ssh-config", ssh_config)
    ran = mx_bench("cluster", *words, "--limit-seconds", "0.001")
    assert ran.returncode == 1
    assert "n9: no agent answers there: " in ran.stderr


def test_the_pods_of_the_manifest_find_each_other_and_end(tmp_path: Path) -> None:
    """Each pod's address is one of this machine's; a name in a cluster's DNS."""
    pod = [sys.executable, "-m", "mxbench.cluster.pod", "--count", "3", "--named", "127.0.1.1{index}", "--"]
    words = [*pod, "--mib", "2", "--chunk-mib", "0.25", "--seconds", "0.1", "--strategy", "swarm", "--json"]
    pods = [
        subprocess.Popen(
            words,
            env={**os.environ, "JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for index in range(3)
    ]
    told = [pod.communicate(timeout=300) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0, 0], told
    result = json.loads(told[0][0])
    assert set(result["hosts"]) == {f"127.0.1.1{index}" for index in range(3)}
    assert result["figures"]["storage_readers"] == 1
