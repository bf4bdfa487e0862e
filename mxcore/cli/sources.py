"""`mx sources`: the workers that the server knows."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from mxcore.cli.connection import Connection, connection_options
from mxcore.cli.server_calls import json_option, server_client, wide_option
from mxcore.cli.status import STATE_NAMES, instances_by_state
from mxcore.cli.tables import duration, refusal_lines, short_id, table, terminal_width

if TYPE_CHECKING:
    from mxserver.wire.calls import ServerClient
    from mxserver.wire.proto import p2p_pb2

EPILOG = """
\b
Exit codes: 0 the server answered (also with none), 2 usage, 3 it does not answer, 5 it refused.
\b
Examples:
  mx sources
  mx sources --model meta-llama/Llama-3.1-8B-Instruct --state ready
  mx sources --json --identities | jq '.sources[].worker_id'
"""


@click.command(epilog=EPILOG)
@connection_options
@click.option("--model", metavar="NAME", help="Only this model, in any case of letters.")
@click.option("--state", type=click.Choice(STATE_NAMES), help="Only workers in this state.")
@click.option("--rank", type=click.IntRange(min=0), help="Only this worker rank.")
@click.option("--identities", is_flag=True, help="Also print what each source id stands for.")
@wide_option
@json_option
def sources(
    connection: Connection,
    model: str | None,
    state: str | None,
    rank: int | None,
    identities: bool,
    wide: bool,
    as_json: bool,
) -> None:
    """The workers that the server knows, newest sign of life first."""
    with server_client(connection) as client:
        now_ms = client.health().now_unix_ms or time.time_ns() // 1_000_000
        found = instances_by_state(client, model_name=model, worker_rank=rank)
        rows = [
            _source(instance, name, now_ms)
            for name, instances in found.items()
            if state in (None, name)
            for instance in instances
        ]
        rows.sort(key=lambda row: float(row["silent_seconds"]))
        known = _identities(client, rows) if identities else None
        told = _told(client)
    facts: dict[str, Any] = {"server": client.address, "sources": rows, **told}
    if known is not None:
        facts["identities"] = known
    click.echo(json.dumps(facts) if as_json else as_text(facts, whole=wide))


def _source(instance: p2p_pb2.SourceInstanceRef, state: str, now_ms: int) -> dict[str, Any]:
    return {
        "model_name": instance.model_name,
        "source_id": instance.mx_source_id,
        "worker_id": instance.worker_id,
        "worker_rank": instance.worker_rank,
        "state": state,
        "accelerator": instance.accelerator,
        "topology": dict(instance.topology),
        "source_load": instance.source_load if instance.HasField("source_load") else None,
        "silent_seconds": max(0.0, (now_ms - instance.updated_at) / 1000),
    }


def _told(client: ServerClient) -> dict[str, Any]:
    """Doubts about weights, and weights that are not shared, newest first; none from a server that keeps none."""
    from mxserver.wire import ServerRefused
    from mxserver.wire.proto import load_pb2, mx_pb2

    try:
        doubted, refused = client.doubts(), client.refusals()
    except ServerRefused:
        doubted, refused = [], []
    doubts = [
        {
            "kind": mx_pb2.DoubtKind.Name(doubt.kind).removeprefix("DOUBT_KIND_").lower(),
            "source_id": doubt.mx_source_id,
            "told_by": doubt.worker_id,
            "worker_rank": doubt.worker_rank,
            "holders": list(doubt.holders),
            "chunks": doubt.chunks,
            "text": doubt.text,
            "at_ms": doubt.at_unix_ms,
        }
        for doubt in doubted
    ]
    refusals = [
        {
            "model_name": count.model_name,
            "source_id": count.mx_source_id,
            "side": _label(load_pb2.RefusalSide, count.side, "REFUSAL_SIDE_"),
            "reason": _label(load_pb2.RefusalReason, count.reason, "REFUSAL_REASON_"),
            "count": count.count,
            "text": count.text,
            "worker_id": count.worker_id,
            "at_ms": count.at_unix_ms,
        }
        for count in refused
    ]
    return {"doubts": doubts, "refusals": refusals}


def _label(names: Any, number: int, prefix: str) -> str:
    """Of a value that a newer server may have, its number."""
    return str(names.Name(number)).removeprefix(prefix).lower() if number in names.values() else str(number)


def _identities(client: ServerClient, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Source id → identity. A worker that has left since it was listed is skipped."""
    from google.protobuf.json_format import MessageToDict

    known: dict[str, Any] = {}
    for row in rows:
        if row["source_id"] not in known and (answer := client.get_metadata(row["source_id"], row["worker_id"])):
            known[row["source_id"]] = MessageToDict(answer.identity, preserving_proto_field_name=True)
    return known


def as_text(facts: dict[str, Any], *, whole: bool = False) -> str:
    if not facts["sources"]:
        return f"no worker at {facts['server']} fits{_told_lines(facts)}"
    head = ("MODEL", "SOURCE ID", "WORKER", "RANK", "STATE", "ACCELERATOR", "LOAD", "HEARD")
    rows = [
        (
            row["model_name"],
            row["source_id"],
            short_id(row["worker_id"], whole=whole),
            str(row["worker_rank"]),
            row["state"],
            row["accelerator"],
            "" if row["source_load"] is None else f"{row['source_load']:.2f}",
            f"{duration(row['silent_seconds'])} ago",
        )
        for row in facts["sources"]
    ]
    text = table(head, rows, width=None if whole else terminal_width(), may_shrink={"MODEL", "ACCELERATOR"})
    for source, identity in facts.get("identities", {}).items():
        text += f"\n\n{source}\n" + "\n".join(f"  {name}: {value}" for name, value in identity.items())
    return text + _told_lines(facts)


def _told_lines(facts: dict[str, Any]) -> str:
    lines = [f"\n  {each['kind']}, told by {each['told_by']}: {each['text']}" for each in facts["doubts"]]
    doubts = "".join(["\n\nWeights that were doubted, newest first:", *lines]) if lines else ""
    return doubts + refusal_lines(facts["refusals"])
