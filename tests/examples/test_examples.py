"""The examples, as docs/reference/api.md has them, between two network namespaces."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mxbench.fleet.fleet import Network
from mxbench.stand_ins.s3_server import S3Server, environment
from tests.examples.conftest import ROOT, Example, Start, line_of, output_of
from tests.object_store.conftest import make_checkpoint

MODEL_BYTES = 8 * 512 * 1024 * 4
MEANS = [f"layers.{number} (512, 1024) {float(number)}" for number in range(8)]


def published(start: Start, script: str, name: str) -> Example:
    process = start(0, script, name, "1")
    assert line_of(process).startswith(f"<Published '{name}' version 1, rank 0: ")
    return process


def test_publish_and_fetch(start: Start) -> None:
    reader = start(1, "fetch.py", "one", "1")  # it waits
    publisher = published(start, "publish.py", "one")
    assert output_of(reader) == [*MEANS, f"<Fetched 'one' version 1: 8 tensors, {MODEL_BYTES} bytes>"]
    assert output_of(publisher) == []


def test_eight_readers_at_once(start: Start) -> None:
    publisher = start(0, "publish.py", "eight", "1", MX_SOURCE_RATE_LIMIT="32 MiB")
    worker = re.search(r" at (\S+)>$", line_of(publisher))
    assert worker is not None
    lines = output_of(start(1, "eight_readers.py", "eight", "1"))
    assert len(lines) == 8
    given: dict[str, int] = {}
    for line in lines:
        assert line.startswith(f"8 tensors, {MODEL_BYTES} bytes from ")
        for source, count in re.findall(r"'(\w+)': (\d+)", line):
            given[source] = given.get(source, 0) + int(count)
    assert sum(given.values()) == 8 * MODEL_BYTES
    assert len(given) > 2, "readers take from each other"
    assert max(given.values()) < 8 * MODEL_BYTES


def test_a_trainer_publishes_each_step_and_a_follower_has_each(start: Start) -> None:
    trainer, follower = start(0, "trainer.py", "steps"), start(1, "follow_trainer.py", "steps", "2")
    assert trainer.stdin is not None
    for step in range(3):
        trainer.stdin.write("\n")
        assert f"'steps' version {step}," in line_of(trainer)
        assert line_of(follower) == f"{step} {step + 1}.0 {step + 1}.0"
    assert output_of(follower) == []
    assert output_of(trainer) == []


def test_slices_of_an_object_store(start: Start, network: Network, tmp_path: Path) -> None:
    tensors = make_checkpoint(tmp_path / "models" / "team" / "tiny")
    with S3Server(tmp_path, host=network.host) as store:
        reader = start(1, "read_slices.py", "s3://models/team/tiny", "1", "2", **environment(store.address))
        said, errors = reader.communicate(timeout=120)
    assert reader.returncode == 0, errors
    *lines, end = said.splitlines()
    assert errors.splitlines()[-1] == f"{4 * 350 * 4096} of {4 * 350 * 4096} bytes"
    halves = {f"layers.{number}.weight": tensors[f"layers.{number}.weight"][350:] for number in range(4)}
    assert [line.rpartition(" ")[0] for line in lines] == [f"{name} (350, 1024)" for name in halves]
    for line, half in zip(lines, halves.values(), strict=True):
        assert float(line.rpartition(" ")[2]) == pytest.approx(float(np.sum(half)), abs=0.5)
    assert end == f"{4 * 350 * 4096} of {sum(tensor.nbytes for tensor in tensors.values())} bytes were read"


def test_a_flipped_byte_is_refused(start: Start) -> None:
    published(start, "flipped_byte.py", "flipped")
    reader = start(1, "fetch.py", "flipped", "1")
    assert reader.stderr is not None
    errors = []
    for line in reader.stderr:
        errors.append(line)
        if "version 1 of 'flipped' was withdrawn by its publisher" in line:
            return  # that was the first to notice, and the reader waits for another one
    assert (reader.communicate()[0], reader.returncode) == ("", 1)
    assert "is not what its digest promises" in "".join(errors)
    assert errors[-1].endswith("[MX_CHUNKS_MISSING]\n")


def test_a_second_engine_takes_processed_weights_from_the_first(start: Start, tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    save_file(
        {f"{number}.weight": generator.standard_normal((256, 256), dtype=np.float32) for number in range(2)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    answers = []
    engines: list[Example] = []
    for place, path in enumerate(("storage", "p2p")):
        engines.append(start(place, "second_engine.py", str(tmp_path)))
        how, _, answer = line_of(engines[-1]).rpartition(", answer ")
        assert how == f"{path}, processed weights"
        answers.append(answer)
    assert answers[0] == answers[1]
    for engine in engines:
        assert output_of(engine) == []


def test_the_second_engine_has_all_that_the_protocol_asks_for() -> None:
    """And nothing that is not in it but `shut_down`."""
    from mxcore.engine import Engine

    spec = importlib.util.spec_from_file_location("second_engine", ROOT / "examples" / "second_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = {name for name in vars(Engine) if not name.startswith("_")}
    engine = module.SecondEngine("model", {})
    assert [name for name in sorted(asked) if not hasattr(engine, name)] == []
    for name in asked:
        if inspect.isfunction(member := vars(Engine)[name]):
            mine = inspect.signature(getattr(module.SecondEngine, name))
            assert list(mine.parameters) == list(inspect.signature(member).parameters), name


def test_the_page_names_each_example() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f"examples/{path.name}" not in page] == []
