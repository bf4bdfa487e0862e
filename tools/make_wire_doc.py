"""Writes the table of calls in docs/reference/wire.md out of the protocol's stubs and the roles.

tests/wire/test_wire_doc.py holds it to them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxserver.security.roles import ROLE_OF_METHOD, required_role  # noqa: E402 - of this checkout
from mxserver.wire.proto import (  # noqa: E402
    api_pb2,
    cache_pb2,
    health_pb2,
    model_pb2,
    mx_pb2,
    p2p_pb2,
    watch_pb2,
)

PAGE = ROOT / "docs" / "reference" / "wire.md"
BEGIN = "<!-- calls:"
END = "<!-- end -->"
FILES = (p2p_pb2, mx_pb2, watch_pb2, model_pb2, cache_pb2, health_pb2, api_pb2)
WORKER = "a worker"


def services() -> list[ServiceDescriptor]:
    """All services, file by file."""
    return [service for file in FILES for service in file.DESCRIPTOR.services_by_name.values()]


def who_may(method: str, answers: str) -> str:
    """Whom the one that answers lets call: a role at the server, a certificate at a worker."""
    if answers == WORKER:
        return "the fleet's certificate, where workers have one"
    role = required_role(method)
    return "all" if role is None else f"`{role.name.lower()}`"


def row(method: MethodDescriptor) -> str:
    """One call: its full name, who answers, who may call, what goes and comes."""
    service = method.containing_service
    path = f"/{service.full_name}/"
    at_server = any(name.startswith(path) for name in ROLE_OF_METHOD) or required_role(path) is None
    answers = "the server" if at_server else WORKER
    asked = f"`{method.input_type.name}` → {'stream of ' if method.server_streaming else ''}`{method.output_type.name}`"
    return f"| `{service.full_name}` | `{method.name}` | {answers} | {who_may(path + method.name, answers)} | {asked} |"


def with_table(page: str) -> str:
    """The page with the table of now between its two marks."""
    head = ["| service | call | who answers | who may call | request → answer |", "|---|---|---|---|---|"]
    lines = [*head, *(row(method) for service in services() for method in service.methods)]
    begin = page.index("\n", page.index(BEGIN)) + 1
    return page[:begin] + "\n".join(lines) + "\n" + page[page.index(END, begin) :]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
