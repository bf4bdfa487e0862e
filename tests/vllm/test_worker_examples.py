"""The engines' arguments in deploy/examples are vLLM's own."""

from __future__ import annotations

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

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


@pytest.mark.parametrize(("file", "options"), engine_arguments())
def test_vllm_takes_them(file: str, options: list[str]) -> None:
    filled = [word.replace("$(LWS_WORKER_INDEX)", "1").replace("$(LWS_LEADER_ADDRESS)", "10.0.0.7") for word in options]
    parsed = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(filled)
    assert parsed.load_format == "mx"
