"""grpc.health.v1's Watch: callers who come and leave, more than there is room for, and the server behind them."""

from __future__ import annotations

import threading

import grpc
from grpc_health.v1 import health_pb2 as standard_pb2
from grpc_health.v1 import health_pb2_grpc as standard_pb2_grpc

from mxserver.server import Server
from mxserver.services.standard_health import MOST_WATCHERS
from mxserver.wire.calls import ServerClient

SERVING = standard_pb2.HealthCheckResponse.SERVING
NOT_SERVING = standard_pb2.HealthCheckResponse.NOT_SERVING
ALL = standard_pb2.HealthCheckRequest()


def test_watchers_who_leave_stop_nobody(server: Server, client: ServerClient) -> None:
    """The finding C1: 150 watches that begin and end froze every call for good."""

    def come_and_leave() -> None:
        with grpc.insecure_channel(client.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            health = standard_pb2_grpc.HealthStub(channel)
            for _ in range(30):
                watches = [health.Watch(ALL) for _ in range(10)]
                for watch in watches:
                    watch.cancel()

    threads = [threading.Thread(target=come_and_leave) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        server._health.show_store(works=False)
        server._health.show_store(works=True)
        client.list_sources()
    with grpc.insecure_channel(client.address) as channel:
        assert next(standard_pb2_grpc.HealthStub(channel).Watch(ALL, timeout=60)).status == SERVING
    stopped = server.drain()
    assert stopped.wait(60)


def test_watchers_who_leave_give_their_threads_back(server: Server, client: ServerClient) -> None:
    """Also where no state changes meanwhile, which would wake those that missed their caller's end."""
    with grpc.insecure_channel(client.address) as channel:
        health = standard_pb2_grpc.HealthStub(channel)
        for _ in range(100):
            watches = [health.Watch(ALL) for _ in range(10)]
            for watch in watches:
                watch.cancel()
        while server._health._watchers:  # none is left for ever: the test's time-out
            client.list_sources()


def test_more_watchers_than_there_is_room_for(server: Server, client: ServerClient) -> None:
    with grpc.insecure_channel(client.address) as channel:
        health = standard_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(ALL, timeout=120) for _ in range(MOST_WATCHERS)]
        assert [next(watch).status for watch in watches] == [SERVING] * MOST_WATCHERS
        refused = health.Watch(ALL, timeout=120)
        assert refused.code() is grpc.StatusCode.UNIMPLEMENTED
        assert health.Check(ALL).status == SERVING
        watches.pop().cancel()
        server._health.show_store(works=False)
        assert [next(watch).status for watch in watches] == [NOT_SERVING] * len(watches)


def test_unknown_services_are_told_as_unknown(server: Server, client: ServerClient) -> None:
    with grpc.insecure_channel(client.address) as channel:
        watch = standard_pb2_grpc.HealthStub(channel).Watch(
            standard_pb2.HealthCheckRequest(service="other"), timeout=60
        )
        assert next(watch).status == standard_pb2.HealthCheckResponse.SERVICE_UNKNOWN
