"""`mx bench gpu`: page cache to device, digests, copies, NIXL between two processes, on one CUDA device.

Self-contained: a checkout, this package's wheels, no network. Each part runs in a process of its own: what fails, and
what is not there (torch with CUDA, for the other loaders), is told under `left_out`, and the other figures come.
docs/notes/gpu-testing.md says how to run it where nothing else is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mxbench.results import document, json_option, rounds_option

MIB = 1024 * 1024
ROOM = 1.25  # of the checkpoint's size, free where it is put


@click.command("gpu")
@click.option(
    "--size-mib",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Size of the checkpoint, and of device buffers.",
)
@rounds_option(3, "Of each measurement; the fastest counts.")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="As CUDA counts.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Default: /dev/shm if there is room.",
)
@click.option("--stand-in", type=click.Path(dir_okay=False), hidden=True, help="The tests' driver without a GPU.")
@json_option
def command(size_mib: int, rounds: int, device: int, folder: Path | None, stand_in: str | None, as_json: bool) -> None:
    """Storage to a CUDA device, digests there, and NIXL between two processes, against the machine's limits."""
    from mxcore.cuda import driver as cuda_driver
    from mxserver.wire import MxError

    if stand_in is not None:
        cuda_driver._load_stand_in(stand_in)
    place = folder or _roomy(size_mib * MIB)
    try:
        with tempfile.TemporaryDirectory(prefix="mx-bench-gpu-", dir=place) as made:
            document = _measured(Path(made), size_mib * MIB, rounds, device, stand_in)
    except MxError as error:
        raise click.ClickException(str(error)) from error
    document["folder"] = str(place)
    if cuda_driver.is_stand_in():
        document = _without_figures(document)
    if as_json:
        click.echo(json.dumps(document))
        return
    if document["stand_in"]:
        click.echo("the stand-in is no GPU: that the bench runs was checked, its figures are not printed")
    for name, value in document["figures"].items():
        click.echo(f"{name:28} {value:.4g}")
    for name, reason in document["left_out"].items():
        click.echo(f"left out: {name}: {reason}", err=True)


def _roomy(size_bytes: int) -> Path:
    """Shared memory, unless it is too small (containers have 64 MiB): then the temporary folder, by its page cache."""
    memory = Path("/dev/shm")  # noqa: S108 - it is meant
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM * size_bytes
    return memory if roomy else Path(tempfile.gettempdir())


def _measured(place: Path, size_bytes: int, rounds: int, index: int, stand_in: str | None) -> dict[str, Any]:
    from mxbench.gpu import peers, sections
    from mxbench.load import made
    from mxcore.cuda import driver as cuda_driver

    card = cuda_driver.Device(index)
    made.checkpoint(place, size_bytes)
    task = sections.Task(index, size_bytes, rounds, place, stand_in)
    found: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in sections.PARTS:
        try:
            found[name] = sections.run(name, task)
        except ValueError as error:
            left_out[name] = str(error)
    figures = sections.figures(found)
    left_out |= peers.missing()
    taken: dict[str, float] = {}
    for name in [name for name in peers.NEEDS if name not in left_out]:
        try:
            taken[name] = peers.seconds(name, index, rounds, sorted(place.iterdir()))
        except ValueError as error:
            left_out[name] = str(error)
    figures |= {f"{name}_seconds": seconds for name, seconds in taken.items()}
    if taken and "load" in found:
        ours = found["load"]["bytes"] / found["load"]["bytes_per_second"]
        figures |= {f"vs_{name}": seconds / ours for name, seconds in taken.items()}
        figures["vs_best_peer"] = min(taken.values()) / ours
    return document(
        "gpu",
        {name: round(value, 6) for name, value in figures.items()},
        settings={"size_bytes": size_bytes, "rounds": rounds, "device": index, "folder": str(place)},
        stand_in=False,
        device={"name": card.name, "capability": card.capability, "bytes": card.total_bytes},
        driver=cuda_driver.driver_version(),
        size_bytes=size_bytes,
        rounds=rounds,
        cores=len(os.sched_getaffinity(0)),
        load_average=os.getloadavg(),
        left_out=left_out,
    )


def _without_figures(document: dict[str, Any]) -> dict[str, Any]:
    """What ran is told by name; nobody takes the speed of host memory for a GPU's."""
    details = {**document["details"], "figures": {}}
    return {**document, "stand_in": True, "ran": sorted(document["figures"]), "figures": {}, "details": details}


if __name__ == "__main__":
    sys.exit(command())
