"""A worker process with a plain engine: loads, prints a line of JSON, serves until its input ends."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from mxcore.engine import Role, load
from tests.engine.plain_engine import PlainEngine, answer

ROLES = {
    "both": Role("both", pulls=True, reads_storage=True, offers=True),
    "source": Role("source", pulls=False, reads_storage=True, offers=True, is_fixed=True),
    "target": Role("target", pulls=True, reads_storage=False, offers=False, otherwise="Start a source.", is_fixed=True),
}


def main(command: dict[str, Any]) -> None:
    """`command`: folder, role, options, processed, report (a path)."""
    logging.basicConfig(level=logging.INFO)
    options = {**command["options"], "report_path": command["report"]}
    engine = PlainEngine(Path(command["folder"]), options, processed_weights_move=command["processed"])
    model = load(engine, ROLES[command["role"]])
    report = json.loads(Path(command["report"]).read_text())
    sys.stdout.write(json.dumps({"answer": answer(model), "report": report, "events": engine.events}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
