"""The engines' arguments in deploy/examples are vLLM's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.deploy.test_worker_examples import FILES, templates

OF_THE_SERVER = ("--port", "--headless")  # `vllm serve`, beside the engine's


def engine_arguments() -> list[tuple[str, list[str]]]:
    found = []
    for file in FILES:
        for template in templates(file):
            for container in template["spec"]["containers"]:
                words = [*container.get("command", []), *container.get("args", [])]
                options = words[next((i for i, w in enumerate(words) if w.startswith("--")), 0) :]
                options = [word for word in options if word.partition("=")[0] not in OF_THE_SERVER]
                if any("mx" in word for word in options):
                    found.append((file, options))
    return found


PROGRAM = """
import json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
formats = [parser.parse_args(options).load_format for options in json.loads(sys.argv[1])]
print(json.dumps(formats))
"""


def test_vllm_takes_them() -> None:
    """In a process of its own: vLLM's imports warn."""
    given = engine_arguments()
    filled = [
        [word.replace("$(LWS_WORKER_INDEX)", "1").replace("$(LWS_LEADER_ADDRESS)", "10.0.0.7") for word in options]
        for _, options in given
    ]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(filled)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, f"{given}: {ran.stderr[-3000:]}"
    assert {file for file, _ in given} == {
        "dynamo.yaml",
        "leader-worker-set.yaml",
        "llm-d-values.yaml",
        "worker-rdma.yaml",
    }
    assert json.loads(ran.stdout.splitlines()[-1]) == ["mx"] * len(given)
