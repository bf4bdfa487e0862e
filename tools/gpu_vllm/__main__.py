"""python -m tools.gpu_vllm pack | run | dry-run: docs/notes/gpu-testing.md, "A model in vLLM".

`pack` makes the kit where there is a network; `run` runs it on the GPU machine, with that machine's Python and torch;
`dry-run` runs the same steps here, with vLLM's CPU build.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KIT = Path("build/gpu-kit")
SECONDS = 540.0  # the machine's longest command is 600 s
DRY_SECONDS = 1800.0


def _pack(arguments: argparse.Namespace) -> int:
    from tools.gpu_vllm.pack import pack
    from tools.gpu_vllm.wheels import KitError

    try:
        manifest = pack(arguments.kit, nixl=not arguments.without_nixl)
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    for name, size in manifest["bytes"].items():
        print(f"{name:20} {size / 2**20:6.1f} MiB")
    return 0


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    left = arguments.seconds - (time.monotonic() - arguments.began)
    return {"seconds": left, **({"steps": arguments.steps.split(",")} if arguments.steps else {})}


def _run(arguments: argparse.Namespace) -> int:
    from tools.gpu_vllm import unpack

    with tempfile.TemporaryDirectory(prefix="mx-gpu-vllm-") as work:
        began = arguments.began
        folder = Path(work)
        unpacked = unpack.unpack(arguments.kit, folder)
        print(f"unpacked after {time.monotonic() - began:.0f} s", flush=True)
        return unpack.run(arguments.kit, unpacked, folder / "run", arguments.out, _settings(arguments))


def _dry_run(arguments: argparse.Namespace) -> int:
    from tests.cuda.stand_in import build
    from tools.gpu_vllm.pack import tiny_model
    from tools.gpu_vllm.runner import Settings, run_all

    with tempfile.TemporaryDirectory(prefix="mx-gpu-vllm-") as work:
        folder = Path(work)
        settings = {
            "gpu": False,
            "folder": str(folder),
            "out": str(arguments.out),
            "tiny": str(tiny_model(folder / "models" / "tiny")),
            "stand_in": str(build(folder)),
            **_settings(arguments),
        }
        return run_all(Settings(**settings))


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_vllm", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    pack = commands.add_parser("pack", help="make the kit, where there is a network")
    pack.add_argument("--kit", type=Path, default=KIT)
    pack.add_argument("--without-nixl", action="store_true", help="25 MiB less; nothing moves between workers then")
    pack.set_defaults(call=_pack)
    for name, call, seconds, says in (
        ("run", _run, SECONDS, "run the kit's steps, on the GPU machine"),
        ("dry-run", _dry_run, DRY_SECONDS, "run the same steps here, with vLLM's CPU build"),
    ):
        command = commands.add_parser(name, help=says)
        command.add_argument("--out", type=Path, required=True, help="results.jsonl and logs.txt come here")
        command.add_argument(
            "--seconds", type=float, default=seconds, help="steps for which no time is left are skipped"
        )
        command.add_argument("--steps", default="", help="names with commas between them; all, if not given")
        command.add_argument("--kit", type=Path, default=KIT)
        command.set_defaults(call=call)
    arguments = parser.parse_args()
    arguments.began = time.monotonic()
    code: int = arguments.call(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
