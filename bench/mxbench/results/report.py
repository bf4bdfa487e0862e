"""`mx bench report DIR`: one HTML page of a folder's results, without outside assets, and PNGs beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import click

from mxbench.results.files import Documents, read_documents
from mxbench.results.pictures import Picture, draw

PAGE = "report.html"
_LONG = 30  # characters
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #1f2937 }
table { border-collapse: collapse; margin: 0 0 1.5em } td, th { padding: .2em .8em; text-align: left }
th { border-bottom: 2px solid #cbd5e1 } td { border-bottom: 1px solid #e2e8f0 }
td.n { text-align: right; font-variant-numeric: tabular-nums } figure { margin: 0 0 1.5em } img { max-width: 100% }
.wide { overflow-x: auto } .wide td { min-width: 3em } td.long { min-width: 14em }
.verdict { font-size: 1.15em; font-weight: 600 } h2 { margin-top: 2em }
"""


def page(documents: Documents, pictures: Iterable[Picture], title: str) -> str:
    """The page's HTML; pictures are in it."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p class=verdict>{escape(line)}</p>" for line in _verdicts(documents)),
        "<h2>Machines</h2>",
        _table(
            ("machine", "kernel", "processor", "network", "GPUs", "versions", "commit", "load"), _machines(documents)
        ),
        *(_figure(picture) for picture in pictures),
        *(part for name, document in documents.items() for part in _section(name, document)),
    ]
    return "\n".join(parts) + "\n"


def _verdicts(documents: Documents) -> Iterator[str]:
    for name, document in documents.items():
        for line in document.get("verdict", ()):
            yield f"{name}: {line}" if len(documents) > 1 and name else line


def _machines(documents: Documents) -> list[list[str]]:
    """One row a machine, as it was when it was first asked."""
    found: dict[str, dict[str, Any]] = {}
    for document in documents.values():
        for host, told in document.get("hosts", {}).items():
            found.setdefault(host, told)
    if not found:
        for document in documents.values():
            told = document.get("details", {}).get("machine", {})
            if told:
                found.setdefault(told.get("host", ""), told)
    return [[host, *_about(told)] for host, told in found.items()]


def _about(told: dict[str, Any]) -> list[str]:
    nics = [f"{nic['name']} {nic['megabits'] or '?'} Mbit/s, MTU {nic['mtu']}" for nic in told.get("nics", ())]
    ports = [f"{port['name']} {port['state']}" for port in told.get("rdma_ports", ())]
    return [
        told.get("kernel", ""),
        f"{told.get('cpu', '')}, {told.get('cores', '?')} cores, {told.get('memory_bytes', 0) / 2**30:.0f} GiB",
        "; ".join([*nics, *ports]),
        ", ".join(told.get("gpus", ())) or "none",
        ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items()),
        told.get("commit", ""),
        " ".join(str(value) for value in told.get("load_average", ())),
    ]


def _section(name: str, document: dict[str, Any]) -> Iterator[str]:
    details = document.get("details", {})
    yield f"<h2>{escape(name or document.get('bench', 'result'))}</h2>"
    if settings := details.get("settings"):
        yield f"<p>{escape(', '.join(f'{key} {value}' for key, value in settings.items()))}</p>"
    for left, reason in document.get("left_out", {}).items():
        yield f"<p>left out: {escape(left)}: {escape(str(reason))}</p>"
    rows = []
    for figure, value in document["figures"].items():
        spread = details.get("figures", {}).get(figure, {})
        told = [_number(spread.get(key)) for key in ("median", "p10", "p90")]
        rows.append([figure, _number(value), spread.get("unit", ""), str(spread.get("rounds", "")), *told])
    yield _table(("figure", "value", "unit", "rounds", "median", "p10", "p90"), rows, numbers={1, 3, 4, 5, 6})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    lines = ["".join(f"<th>{escape(cell)}" for cell in head)]
    for row in rows:
        cells = (f"<td{_class(cell, at in right)}>{escape(cell)}" for at, cell in enumerate(row))
        lines.append("".join(cells))
    return "<div class=wide><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _class(cell: str, is_number: bool) -> str:
    if is_number:
        return " class=n"
    return " class=long" if len(cell) > _LONG else ""  # else a narrow page has a word a line


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.file.read_bytes()).decode()
    caption = escape(picture.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


@click.command("report")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--into",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the page and the PNGs (default: FOLDER).",
)
def command(folder: Path, into: Path | None) -> None:
    """A page (report.html) and PNGs of the results in FOLDER: those of `mx bench cluster`, or any --json documents."""
    documents = read_documents(folder)
    place = into or folder
    pictures = draw(documents, place)
    (place / PAGE).write_text(page(documents, pictures, f"mx bench: {folder.resolve().name}"), encoding="utf-8")
    click.echo(f"{place / PAGE} and {len(pictures)} pictures of {len(documents)} results")
