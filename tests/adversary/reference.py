"""`python -m tests.adversary.reference`: a server that answers, until its stdin ends."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc


def main() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("reference", {"Call": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)  # noqa: T201
    server.start()
    sys.stdin.read()
    server.stop(0).wait()


if __name__ == "__main__":
    main()
