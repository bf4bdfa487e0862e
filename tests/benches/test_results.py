"""Results of benches: what is in them, how two are compared, and the page that shows them."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mxbench.results import document, quantile
from mxbench.results.machine import machine
from mxbench.results.units import better, unit_of
from mxcore.cli.bench import bench_modules
from mxcore.cli.main import mx
from tests.web.browser import Browser

ROUNDS = {
    "take_tcp_gbps": [1.02, 1.0, 0.98, 1.01, 0.99],
    "load_seconds": [10.1, 10.0, 9.9],
    "scattered_gbps": [1.0, 0.5, 1.5, 0.6, 1.4],
}
FIGURES = {"take_tcp_gbps": 1.0, "load_seconds": 10.0, "scattered_gbps": 1.0, "lost_records": 0, "runs": 20}


def result(figures: dict[str, float] = FIGURES, rounds: dict[str, list[float]] = ROUNDS) -> dict[str, Any]:
    return document("test", figures, settings={"rounds": 5}, samples=rounds)


def slowed(factor: float) -> dict[str, Any]:
    """Every rate and duration of another run, worse by this factor."""
    rounds = {
        name: [value * factor if name.endswith("seconds") else value / factor for value in values]
        for name, values in ROUNDS.items()
    }
    return result({**FIGURES, **{name: sorted(values)[len(values) // 2] for name, values in rounds.items()}}, rounds)


def mx_bench(*arguments: object) -> Result:
    return CliRunner().invoke(mx, ["bench", *map(str, arguments)])


def written(folder: Path, **documents: dict[str, Any]) -> list[Path]:
    for name, made in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(made))
    return [folder / f"{name}.json" for name in documents]


def test_a_document_has_units_spread_and_machine() -> None:
    made = result()
    assert made["figures"] == FIGURES
    spread = made["details"]["figures"]["take_tcp_gbps"]
    assert (spread["unit"], spread["rounds"], spread["median"]) == ("GB/s", 5, 1.0)
    assert spread["p10"] == pytest.approx(0.984)
    assert spread["p90"] == pytest.approx(1.016)
    assert made["details"]["figures"]["runs"] == {"unit": "count", "rounds": 1, "median": 20, "p10": 20, "p90": 20}
    assert made["details"]["settings"] == {"rounds": 5}
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("name", sorted(bench_modules().keys() - {"compare", "report"}))
def test_every_bench_tells_its_results_as_a_document(name: str) -> None:
    """Its module calls `document`, whatever it measured."""
    module = importlib.import_module(bench_modules()[name])
    called = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
    assert any(isinstance(call.func, ast.Name) and call.func.id == "document" for call in called)


def test_the_machine_is_told() -> None:
    told = machine()
    assert told["cores"] >= 1
    assert told["memory_bytes"] > 1 << 28
    assert told["kernel"]
    assert told["cpu"]
    assert len(told["load_average"]) == 3
    assert {"python", "mx-modelexpress", "grpcio"} <= told["versions"].keys()


def test_a_machine_with_cards_and_one_with_nothing(tmp_path: Path) -> None:
    assert machine(tmp_path)["gpus"] == machine(tmp_path)["nics"] == machine(tmp_path)["rdma_ports"] == []
    for place, text in {
        "proc/driver/nvidia/gpus/0000:1a:00.0/information": "Model: \t\t NVIDIA H200\nIRQ: 5\n",
        "sys/class/net/eth0/operstate": "up\n",
        "sys/class/net/eth0/speed": "400000\n",
        "sys/class/net/eth0/mtu": "9000\n",
        "sys/class/net/eth1/operstate": "down\n",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
    told = machine(tmp_path)
    assert told["gpus"] == ["NVIDIA H200"]
    assert told["nics"] == [{"name": "eth0", "mtu": 9000, "megabits": 400000, "driver": ""}]
    assert told["rdma_ports"] == [{"name": "mlx5_0:1", "state": "4: ACTIVE", "openable": False}]


@pytest.mark.parametrize(
    ("name", "unit", "way"),
    [
        ("tcp_few_gbps", "GB/s", "higher"),
        ("vs_sendfile_files_4", "ratio", "higher"),
        ("cpu_vs_sendfile_files_1", "ratio", "higher"),
        ("t8_over_t1", "ratio", "lower"),
        ("verify_overhead_ratio", "ratio", "lower"),
        ("tls_cpu_seconds_per_gb", "s/GB", "lower"),
        ("files_cpu_s_a_gb_4", "s/GB", "lower"),
        ("digest_tb_per_second", "TB/s", "higher"),
        ("storm_calls_per_second", "1/s", "higher"),
        ("small_files_a_second", "1/s", "higher"),
        ("idle_core_share", "cores", "lower"),
        ("storm_p99_seconds", "s", "lower"),
        ("self_check_seconds_limit", "s", ""),
        ("header_us_per_tensor", "µs", "lower"),
        ("ring_bytes", "B", "lower"),
        ("client_peak_mib", "MiB", "lower"),
        ("lost_records", "count", "lower"),
        ("runs", "count", ""),
    ],
)
def test_what_a_name_says(name: str, unit: str, way: str) -> None:
    assert (unit_of(name), better(name)) == (unit, way)


def test_quantiles_lie_between_values() -> None:
    assert quantile([3.0], 0.9) == 3.0
    assert quantile([2.0, 1.0], 0.5) == 1.5
    assert quantile([float(value) for value in range(11)], 0.9) == 9.0


def test_a_run_against_itself_has_no_change(tmp_path: Path) -> None:
    [file] = written(tmp_path, a=result())
    ran = mx_bench("compare", file, file)
    assert (ran.exit_code, ran.output) == (0, "no change in 5 figures\n")


def test_a_slowdown_of_a_fifth_is_named(tmp_path: Path) -> None:
    ran = mx_bench("compare", *written(tmp_path, a=result(), b=slowed(1.25)))
    assert ran.exit_code == 1
    lines = ran.output.splitlines()
    assert "take_tcp_gbps: 1 -> 0.8 GB/s (-20 %), worse" in lines
    assert "load_seconds: 10 -> 12.5 s (+25 %), worse" in lines
    assert "scattered_gbps: 1 -> 0.8 GB/s (-20 %), unclear, the rounds scatter" in lines
    assert lines[-1] == "of 5 figures: 2 worse, 1 unclear, the rounds scatter"


def test_what_got_better_is_no_failure_and_the_threshold_counts(tmp_path: Path) -> None:
    a, b, c = written(tmp_path, a=result(), b=slowed(0.8), c=slowed(1.05))
    assert mx_bench("compare", a, b).exit_code == 0
    assert "take_tcp_gbps: 1 -> 1.25 GB/s (+25 %), better" in mx_bench("compare", a, b).output
    assert mx_bench("compare", a, c).output == "no change in 5 figures\n"
    assert mx_bench("compare", a, c, "--threshold", 0.03).exit_code == 1


def test_the_first_lost_record_is_worse(tmp_path: Path) -> None:
    ran = mx_bench("compare", *written(tmp_path, a=result(), b=result({**FIGURES, "lost_records": 1, "runs": 30})))
    assert ran.exit_code == 1
    assert "lost_records: 0 -> 1 (was 0), worse" in ran.output
    assert "runs: 20 -> 30 (+50 %), changed" in ran.output


def test_other_machines_settings_and_figures_are_noted(tmp_path: Path) -> None:
    other = copy.deepcopy(result())
    other["details"]["machine"]["cpu"] = "abacus"
    other["details"]["settings"] = {"rounds": 9}
    del other["figures"]["runs"]
    output = mx_bench("compare", *written(tmp_path, a=result(), b=other)).output
    for note in ("cpu differs", "'abacus'", "the settings differ", "only one has runs"):
        assert note in output


def test_folders_are_compared_file_by_file_and_as_json(tmp_path: Path) -> None:
    for name, made in (("a", result()), ("b", slowed(1.25))):
        (tmp_path / name / "steps").mkdir(parents=True)
        written(tmp_path / name / "steps", fan=made, same=result())
    ran = mx_bench("compare", tmp_path / "a", tmp_path / "b", "--json")
    told = json.loads(ran.output)
    assert told["figures"]["slower_figures"] == 2
    assert {change["name"] for change in told["changes"] if change["verdict"] == "slower"} == {
        "steps/fan: take_tcp_gbps",
        "steps/fan: load_seconds",
    }


@pytest.mark.parametrize("text", ["", "[]", '{"figures": 3}', '{"figures": {"a": "fast"}}'])
def test_what_is_no_result_is_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    for words in (["compare", file, file], ["compare", tmp_path, tmp_path], ["report", tmp_path]):
        ran = mx_bench(*words)
        assert (ran.exit_code, len(ran.output.strip().splitlines())) == (2, 1), ran.output


class Page(HTMLParser):
    """Everything that a browser would fetch, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


VERDICT = "slowest link: b -> a <&>"


def of_a_cluster(folder: Path) -> None:
    """Four results of which every kind of picture is made."""
    progress = {"a <b>": [[0.0, 0], [1.0, 50], [2.0, 100]]}
    steps = [
        document(
            "cluster",
            {"seconds": seconds, "cpu_seconds_per_gb": 0.5},
            settings={},
            fan_out={"strategy": strategy, "receivers": count, "seconds": seconds},
            progress=progress,
            model_bytes=100,
        )
        for strategy, count, seconds in (("swarm", 1, 2.0), ("swarm", 2, 2.1), ("star", 2, 4.0))
    ]
    pairs = [{"from": "a", "to": "b", "gbps": 1.0}, {"from": "b", "to": "a", "gbps": 0.1}]
    first = document("cluster", {"pairs": 2}, settings={}, pairs=pairs, verdict=[VERDICT], hosts={"a": machine()})
    written(folder, pairs=first, one=steps[0], two=steps[1], three=steps[2])


def test_the_page_has_everything_in_it(tmp_path: Path) -> None:
    of_a_cluster(tmp_path)
    ran = mx_bench("report", tmp_path)
    assert ran.exit_code == 0, ran.output
    page = Page((tmp_path / "report.html").read_text())
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        *("cpu.png", "fan-out.png", "pairs-pairs.png"),
        *("progress-one.png", "progress-three.png", "progress-two.png"),
    ]
    assert len(page.fetched) == len(pictures)
    assert all(place.startswith("data:image/png;base64,") for place in page.fetched)
    assert VERDICT in page.text
    assert machine()["cpu"] in page.text
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    of_a_cluster(tmp_path)
    assert mx_bench("report", tmp_path).exit_code == 0
    with closing(Browser(tmp_path / "profile")) as browser:
        browser.size(1280, 900)
        browser.open((tmp_path / "report.html").as_uri())
        assert VERDICT in browser.text()
        widths = browser.run("return [...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        assert len(widths) == 6
        assert min(widths) > 100
        assert browser.run("return document.documentElement.scrollWidth") <= 1280
        fetched = browser.run("return performance.getEntriesByType('resource').map(entry => entry.name.slice(0, 5))")
        assert set(fetched) <= {"data:"}
        assert browser.console() == []


def test_a_page_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    written(tmp_path, a=result())
    ran = mx_bench("report", tmp_path, "--into", tmp_path / "out")
    assert ran.exit_code == 0, ran.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "take_tcp_gbps" in (tmp_path / "out" / "report.html").read_text()
