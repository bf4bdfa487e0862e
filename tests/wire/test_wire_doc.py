"""docs/reference/wire.md has every call of the protocol, with who answers it and who may call."""

from __future__ import annotations

from mxcore.transfer.move.chunk_greeting import GREETING
from mxserver.wire.calls import canonical_json, source_id
from mxserver.wire.proto import p2p_pb2
from tools import make_wire_doc

PAGE = make_wire_doc.PAGE.read_text()


def test_the_page_has_the_calls_of_now() -> None:
    assert make_wire_doc.with_table(PAGE) == PAGE, "run: python tools/make_wire_doc.py"


def test_the_page_shows_every_proto_file() -> None:
    for proto in (make_wire_doc.ROOT / "mxserver" / "wire" / "proto").glob("*.proto"):
        assert f'--8<-- "mxserver/wire/proto/{proto.name}"' in PAGE, proto.name


def test_ids_and_greeting_are_those_of_the_code() -> None:
    empty = p2p_pb2.SourceIdentity()
    assert f"{canonical_json(empty)}\n" in PAGE
    assert f"`{source_id(empty)}`" in PAGE
    assert f"`{GREETING.decode()}`" in PAGE
