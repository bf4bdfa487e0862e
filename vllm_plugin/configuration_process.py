"""Brings configuration and tokenizer here by a process of its own: see `vllm_plugin.config_and_tokenizer`.

vLLM may fork its workers from this process (`LLM`, `AsyncLLM`, Dynamo's worker do). The threads of an object store's or
of gRPC's client do not come along, and the worker that uses such a client then waits for ever. So nothing of the kind
is imported here.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["prepare", "prepare_offline"]

_log = logging.getLogger("vllm.modelexpress")

_FIELDS = (
    "model",
    "load_format",
    "tokenizer",
    "revision",
    "download_dir",
    "served_model_name",
    "model_loader_extra_config",
)  # of vLLM's EngineArgs: what is looked at, and may be changed


def prepare(arguments: Any) -> None:
    """Changes `arguments`, vLLM's EngineArgs with one of our load formats, where weights come from elsewhere."""
    if isinstance(arguments.model, str) and _comes_from_elsewhere(arguments):
        given = {field: getattr(arguments, field, None) for field in _FIELDS}
        answer = _ask("prepare", {**given, "draft": _draft_of(arguments)})
        for field in given.keys() & answer.keys():
            if given[field] != answer[field]:
                setattr(arguments, field, answer[field])


def prepare_offline(model: Any, revision: Any) -> None:
    """Before vLLM looks for a model in the hub's cache alone."""
    if isinstance(model, str):
        _ask("prepare_offline", {"model": model, "revision": revision})


def _comes_from_elsewhere(arguments: Any) -> bool:
    named = [key.lower() for key in getattr(arguments, "model_loader_extra_config", None) or {}]
    named += [name.lower() for name in ("MX_MODEL_URI", "MODEL_EXPRESS_NO_SHARED_STORAGE") if os.environ.get(name)]
    return "://" in arguments.model or any("model_uri" in name or "no_shared_storage" in name for name in named)


def _draft_of(arguments: Any) -> dict[str, Any] | None:
    """Name and revision of a draft in files of its own; None without one."""
    given = getattr(arguments, "speculative_config", None)
    options: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    name = options.get("model")
    if not isinstance(name, str) or name in (arguments.model, options.get("method")):
        return None
    return {"model": name, "revision": options.get("revision")}


def _ask(call: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The changed arguments; none where that process failed, which is a line in the log."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps({"call": call, "arguments": arguments}, default=str).encode(),
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        _log.warning("configuration and tokenizer of %s could not be brought here: %s", arguments["model"], error)
        return {}
    return answer


def _main() -> None:
    answer, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asked = json.load(sys.stdin)
    from vllm_plugin import config_and_tokenizer

    arguments = asked["arguments"]
    if asked["call"] == "prepare":
        found = SimpleNamespace(**arguments)
        config_and_tokenizer.prepare(found)
        arguments = vars(found)
    else:
        config_and_tokenizer.prepare_offline(arguments["model"], arguments["revision"])
    json.dump(arguments, answer)


if __name__ == "__main__":
    _main()
