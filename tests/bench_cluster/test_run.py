"""`mx bench cluster` with two machines that are this one: its files, and a run that goes on where it was cut."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner, Result

from mxcore.cli.main import mx

HOSTS = "a here address=127.0.0.2\nb here address=127.0.0.3\n"
SMALL = ["--mib", "2", "--chunk-mib", "0.25", "--seconds", "0.05", "--connections", "1"]


def run(folder: Path, *words: str) -> Result:
    hosts = folder / "hosts"
    hosts.write_text(HOSTS)
    return CliRunner().invoke(
        mx, ["bench", "cluster", "--hosts", str(hosts), "--run", str(folder / "run"), *SMALL, *words]
    )


def test_two_machines_and_a_run_that_was_cut(tmp_path: Path) -> None:
    ran = run(tmp_path, "--limit-seconds", "1e-9")
    assert ran.exit_code == 1, ran.output
    assert not list((tmp_path / "run/steps").iterdir())
    ran = run(tmp_path)
    assert ran.exit_code == 0, ran.output
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["hosts"]) == {"a", "b"}
    assert result["figures"]["storage_readers"] == 1
    assert result["figures"]["t1_seconds"] > 0
    assert [path.stem for path in sorted((tmp_path / "run/steps").iterdir())] == [
        *("00-machines", "01-pairs", "02-fan-out-swarm-1", "03-storage", "04-update"),
    ]
    fan_out = json.loads((tmp_path / "run/steps/02-fan-out-swarm-1.json").read_text())
    assert fan_out["progress"]["b"][-1][1] == 2 << 20
    assert fan_out["figures"]["receivers"] == 1
    (tmp_path / "run/steps/01-pairs.json").unlink()
    again = run(tmp_path)
    assert again.stderr.splitlines() == ["pairs …"]  # the others are kept
    assert again.stdout.splitlines()[-1].startswith(("no slow link: 2 links", "slow link"))
    other = run(tmp_path, "--transport", "tcp")
    assert other.exit_code == 2
    assert "other settings (transport)" in other.output
