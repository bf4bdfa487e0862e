"""`mx bench peer` between two processes of this machine: figures, verdict, what is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from mxbench.link.socket_end import Took, counted
from mxbench.link.verbs_end import rate_of
from mxbench.peer.command import _host_and_port, figures_of, verdict
from mxbench.peer.measure import Asked, Found, _possible
from mxcore.cli.main import mx

MX = [sys.executable, "-c", "from mxcore.cli.main import main; main()", "bench", "peer"]
SMALL = ["--mib", "4", "--rounds", "1", "--seconds", "0.05", "--shape", "few"]


@pytest.fixture
def port() -> Iterator[str]:
    """Of a machine that listens."""
    command = [*MX, "--listen", "--address", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield process.stderr.readline().strip().rpartition(":")[2]
        process.kill()


def test_the_link_and_the_product(port: str) -> None:
    words = [*SMALL, "--direction", "take", "--transport", "tcp", "--json"]
    ran = subprocess.run([*MX, "--connect", f"127.0.0.1:{port}", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    figures = told["figures"]
    links = {f"take_link_sockets_{count}_gbps" for count in (1, 2, 4)}
    ours = {"take_tcp_few_gbps", "take_tcp_few_whole_gbps", "take_vs_link"}
    burnt = {"take_tcp_few_giver_cpu_seconds_per_gb", "take_tcp_few_taker_cpu_seconds_per_gb"}
    assert figures.keys() == links | ours | burnt
    assert all(figures[name] > 0 for name in links | ours)
    assert told["details"]["figures"]["take_tcp_few_gbps"]["unit"] == "GB/s"
    assert told["left_out"] == {"device memory": "no GPU on here and 127.0.0.1"}
    assert set(told["hosts"]) == {"127.0.0.1", "here"}
    [line] = told["verdict"]
    assert line.startswith("127.0.0.1 -> here: ")
    assert " % of the link by tcp (" in line


def test_what_a_late_reader_finds_in_its_buffer_is_no_rate() -> None:
    """Two connections of 10 MB/s each: the first read of one of them comes 0.3 s late, and brings 3 MB."""
    in_time = Took(total=10_000_100, first_bytes=100, first=5.0, last=6.0)
    late = Took(total=10_000_000, first_bytes=3_000_000, first=5.3, last=6.0)
    assert counted([in_time, late]) == (17_000_000, 1.0)
    assert counted([late]) == (7_000_000, pytest.approx(0.7))
    assert counted([Took(0, 0, 4.0, 4.0), in_time]) == (10_000_000, 1.0)
    assert counted([]) == (0, 0.0)


def test_what_both_machines_have_is_measured() -> None:
    port = {"name": "mlx5_0:1", "state": "4: ACTIVE", "openable": True}
    with_all, without = {"rdma_ports": [port], "gpus": ["H200"]}, {"rdma_ports": [], "gpus": []}
    asked, found = Asked(1, 1, 1.0, (), (), ()), Found()
    assert _possible({"a": with_all, "b": with_all}, asked, found) == (
        ["tcp", "tcp-by-nixl", "rdma"],
        {"": None, "device_": 0},
    )
    assert found.left_out == {}
    assert _possible({"a": with_all, "b": without}, asked, found) == (["tcp", "tcp-by-nixl"], {"": None})
    assert found.left_out == {"rdma": "no RDMA port can be used on b", "device memory": "no GPU on b"}
    wanted = asked._replace(transports=("rdma",))
    assert _possible({"a": with_all, "b": without}, wanted, found)[0] == ["rdma"]  # it is tried, and says why not


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("node", ("node", 6570)),
        ("node:1", ("node", 1)),
        ("10.0.0.1:7000", ("10.0.0.1", 7000)),
        ("fd00::7", ("fd00::7", 6570)),
        ("[fd00::7]:8", ("fd00::7", 8)),
    ],
)
def test_who_is_connected_to(text: str, meant: tuple[str, int]) -> None:
    assert _host_and_port(text, 6570) == meant


@pytest.mark.parametrize("words", [[], ["--listen", "--connect", "a"], ["--connect", "a:b"], ["--connect", ":5"]])
def test_neither_or_both_is_a_usage_error(words: list[str]) -> None:
    ran = CliRunner().invoke(mx, ["bench", "peer", *words])
    assert (ran.exit_code, len(ran.output.strip().splitlines())) == (2, 1)


def test_nobody_listens() -> None:
    ran = CliRunner().invoke(mx, ["bench", "peer", "--connect", "127.0.0.1:1"])
    assert ran.exit_code == 1
    assert "mx bench peer --listen" in ran.output


def test_the_verdict_takes_the_best_of_both_sides() -> None:
    found = Found(
        {
            "take_link_sockets_1_gbps": [0.8, 1.0, 0.9],
            "take_link_nixl_rdma_gbps": [2.0],
            "take_tcp_few_gbps": [0.7],
            "take_rdma_many_gbps": [1.88],
            "take_rdma_many_whole_gbps": [9.0],
            "take_same_host_few_gbps": [9.0],
            "give_link_sockets_4_gbps": [1.0],
        }
    )
    assert figures_of(found)["take_link_sockets_1_gbps"] == 0.9
    assert figures_of(found)["take_vs_link"] == 0.94
    assert list(verdict(found, "b")) == [
        "b -> here: 94 % of the link by rdma (1.88 of 2 GB/s by nixl rdma)",
        "here -> b: the product moved nothing; the link gives 1 GB/s by sockets 4",
    ]


PERFTEST = """
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      1127800          0.00               98.54              0.187947
---------------------------------------------------------------------------------------
"""


def test_what_ib_write_bw_prints() -> None:
    assert rate_of(PERFTEST) == pytest.approx(98.54 / 8)
    with pytest.raises(ValueError, match="printed no rate: Couldn't connect"):
        rate_of("Couldn't connect to 10.0.0.1:18515\n")
