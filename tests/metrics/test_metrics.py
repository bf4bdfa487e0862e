"""Metrics of workers: real ranks that count, a real exporter that adds up, a rank that is killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxbench.fleet.free_ports import free_port
from mxcore.metrics import EXPORTED, FAMILIES, LEASES_NOW, STRAGGLERS, exporter
from mxcore.metrics.recording import FILE_BYTES, Recorder, record
from tests.web.conftest import wait_for

RANK = """
import sys, mxcore.metrics as metrics
metrics.start(int(sys.argv[1]), linger_seconds=float(sys.argv[2]))
print("counting", flush=True)
for line in sys.stdin:
    name, labels, amount = eval(line)
    family = getattr(metrics, name)
    family.observe(amount, *labels) if family.kind == "histogram" else family.add(*labels, amount=amount)
    print("counted", flush=True)
"""


class Rank:
    def __init__(self, port: int, folder: Path, linger_seconds: float = 30.0, **environ: str) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(port), str(linger_seconds)],
            env={**os.environ, "TMPDIR": str(folder), **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said("counting")

    def count(self, name: str, *labels: str, amount: float = 1.0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{(name, labels, amount)!r}\n")
        self.process.stdin.flush()
        self._said("counted")

    def _said(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def end(self, *, kill: bool = False) -> None:
        if kill:
            self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def exposition(port: int) -> str:
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def metric(port: int, series: str) -> float | None:
    """One series' value; None while nobody answers, or not to the end."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        for line in exposition(port).splitlines():
            if line.startswith(series + " "):
                return float(line.rpartition(" ")[2])
    return None


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def ranks(port: int, tmp_path: Path) -> Iterator[list[Rank]]:
    """Two ranks of one engine, whose exporter ends soon after them."""
    started = [Rank(port, tmp_path, 0.0) for _ in range(2)]
    yield started
    for rank in started:
        rank.end(kill=True)
    wait_for(lambda: metric(port, "mxworker_ranks") is None)


def test_one_endpoint_has_the_sums_of_all_ranks(ranks: list[Rank], port: int, tmp_path: Path) -> None:
    wait_for(lambda: metric(port, "mxworker_ranks") == 2)
    for rank in ranks:
        rank.count("RECEIVED_BYTES", "p2p", "rdma", amount=1e9)
        rank.count("LOAD_SECONDS", "p2p", "success", amount=0.3)
        rank.count("SERVING")
    text = exposition(port)
    assert 'mxworker_received_bytes_total{path="p2p",transport="rdma"} 2e+09' in text
    assert 'mx_load_seconds_bucket{le="0.25",outcome="success",path="p2p"} 0.0' in text
    assert 'mx_load_seconds_bucket{le="0.5",outcome="success",path="p2p"} 2.0' in text
    assert 'mx_load_seconds_sum{outcome="success",path="p2p"} 0.6' in text
    assert metric(port, "mxworker_serving") == 2
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {family.name.removesuffix("_total") for family in (*FAMILIES, *EXPORTED)}
    for family in (*FAMILIES, *EXPORTED):
        assert families[family.name.removesuffix("_total")].documentation == family.meaning
    if promtool := shutil.which("promtool"):
        ran = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://localhost:{port}/", timeout=60)


def test_a_killed_rank_is_told_and_its_counts_stay(ranks: list[Rank], port: int) -> None:
    for rank in ranks:
        rank.count("GIVEN_BYTES", "tcp", amount=5.0)
        rank.count("LEASES_NOW")
    wait_for(lambda: metric(port, "mxworker_ranks") == 2)
    ranks[0].end(kill=True)
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    assert metric(port, "mxworker_ranks_lost_total") == 1
    assert metric(port, 'mxworker_given_bytes_total{transport="tcp"}') == 10
    assert metric(port, "mxworker_readers") == 1
    ranks[1].count("GIVEN_BYTES", "tcp", amount=1.0)
    assert metric(port, 'mxworker_given_bytes_total{transport="tcp"}') == 11


def test_a_rank_that_ends_by_itself_is_not_missed(ranks: list[Rank], port: int) -> None:
    ranks[0].count("STRAGGLERS")
    wait_for(lambda: metric(port, "mxworker_ranks") == 2)
    ranks[0].end()
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    assert metric(port, "mxworker_ranks_lost_total") == 0
    assert metric(port, "mxworker_stragglers_total") == 1


def test_a_restart_goes_on_with_what_was_counted_and_another_engine_begins_anew(port: int, tmp_path: Path) -> None:
    first = Rank(port, tmp_path)
    first.count("STRAGGLERS")
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    first.end(kill=True)
    wait_for(lambda: metric(port, "mxworker_ranks") == 0)
    second = Rank(port, tmp_path)
    second.count("STRAGGLERS")
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    assert metric(port, "mxworker_stragglers_total") == 2
    wait_for(lambda: exporters(tmp_path) == 1)  # the second rank's has found that the first one's serves
    [serving] = exporters_of(tmp_path)
    second.end()
    os.kill(serving, signal.SIGKILL)
    wait_for(lambda: metric(port, "mxworker_ranks") is None)
    third = Rank(port, tmp_path, 0.0)
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    third.end()
    wait_for(lambda: exporters(tmp_path) == 0)
    fourth = Rank(port, tmp_path, 0.0)
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    assert metric(port, "mxworker_stragglers_total") == 0
    fourth.end()
    wait_for(lambda: exporters(tmp_path) == 0)


def processes() -> list[tuple[int, str]]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((int(path.name), (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return found


def exporters(folder: Path) -> int:
    return len(exporters_of(folder))


def exporters_of(folder: Path) -> list[int]:
    return [pid for pid, command in processes() if "exporter.py" in command and str(folder) in command]


def end_exporters(folder: Path) -> None:
    """Those that linger after a test's ranks."""
    for pid in exporters_of(folder):
        os.kill(pid, signal.SIGKILL)


def test_the_engines_own_metrics_stay_where_they_are(port: int, tmp_path: Path) -> None:
    """vLLM sets this variable for its API servers: its counts are not served here, nor ours there."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    rank = Rank(port, tmp_path, 0.0, PROMETHEUS_MULTIPROC_DIR=str(theirs))
    wait_for(lambda: metric(port, "mxworker_ranks") == 1)
    assert list(theirs.iterdir()) == []
    rank.end()
    wait_for(lambda: exporters(tmp_path) == 0)


def test_all_series_fit_into_files_that_are_there(tmp_path: Path) -> None:
    """A write beyond what the disk has given would end the engine (SIGBUS)."""
    recorder = Recorder(tmp_path, FAMILIES)
    for file in recorder._files.values():
        assert file._used <= file._capacity == FILE_BYTES
    for path in tmp_path.glob("*.db"):
        assert path.stat().st_blocks * 512 >= FILE_BYTES
    before = {prefix: file._used for prefix, file in recorder._files.items()}
    for family in FAMILIES:
        for labels in [*family.series(), ("another",) * len(family.labels)]:
            recorder.observe(family, labels, 1e9) if family.kind == "histogram" else recorder.add(family, labels, 1.0)
    assert {prefix: file._used for prefix, file in recorder._files.items()} == before
    recorder.leave()
    recorder.leave()
    recorder.close()


def test_where_there_is_no_room_nothing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Recorder(tmp_path, FAMILIES)


def test_a_child_that_is_forked_counts_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, FAMILIES)
    record(recorder)
    try:
        child = os.fork()
        if not child:
            STRAGGLERS.add()
            LEASES_NOW.add()
            os._exit(0)
        os.waitpid(child, 0)
    finally:
        record(None)
        recorder.close()
    [counters] = tmp_path.glob("counter_*.db")
    from prometheus_client.mmap_dict import MmapedDict

    counted = MmapedDict.read_all_values_from_file(str(counters))
    assert not any(value for _, value, _, _ in counted)


def test_a_port_in_use_is_a_line_of_the_log(port: int, tmp_path: Path) -> None:
    code = (
        "import logging, sys, threading, socket, mxcore.metrics as m; logging.basicConfig(); "
        "s = socket.create_server(('', int(sys.argv[1]))); m.start(int(sys.argv[1])); "
        "[t.join() for t in threading.enumerate() if t.name == 'mx-metrics']"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(port)], capture_output=True, text=True, env=environ, check=True
    )
    assert f"no metrics of this engine's workers at port {port} (MX_METRICS_PORT): Address already in use" in ran.stderr


def test_who_stood_by_says_that_the_port_has_gone_meanwhile(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exporter before it ended, and something else took its port."""
    answers = iter([False, False, True])
    monkeypatch.setattr(exporter, "_owns", lambda _: next(answers))
    monkeypatch.setattr(sys, "argv", ["exporter.py", str(tmp_path), str(port), "0"])
    with socket.create_server(("", port)):
        assert exporter.main() == 1
    assert capsys.readouterr().out.startswith("Address already in use")


def test_a_folder_of_somebody_else_is_not_taken(port: int, tmp_path: Path) -> None:
    code = (
        "import os, sys, mxcore.metrics.starting as s; f = s.folder_of(int(sys.argv[1])); f.chmod(0o777)\n"
        "try: s.folder_of(int(sys.argv[1]))\n"
        "except PermissionError as e: print(e)"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(port)], capture_output=True, text=True, env=environ, check=True
    )
    assert re.search(r"mx-metrics-\d+-\d+-\d+ is not this user's alone", ran.stdout)


def test_without_a_port_no_library_of_metrics_is_imported() -> None:
    code = (
        "import json, sys, mxcore.transfer.member, mxcore.metrics; "
        "print(json.dumps([name for name in sys.modules if 'prometheus' in name or name == 'http.server']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
