"""The worker's side of the server's services: calls with a deadline, errors as exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import grpc

from mxserver.wire.calls.channels import NO_ANSWER, ServerChannel, call_failure
from mxserver.wire.calls.closing import Closing
from mxserver.wire.credentials import ClientCredentials
from mxserver.wire.errors import (
    MethodMissing,
    ServerRefused,
    ServerUnreachable,
    SettingError,
    StaleEpoch,
    WireError,
)
from mxserver.wire.proto import (
    health_pb2,
    health_pb2_grpc,
    load_pb2,
    mx_pb2,
    mx_pb2_grpc,
    p2p_pb2,
    p2p_pb2_grpc,
    watch_pb2,
    watch_pb2_grpc,
)


class Near(NamedTuple):
    """Who asks for sources, and where it is: `levels` names those of `topology` that count, from broad to narrow."""

    worker_id: str
    topology: Mapping[str, str]
    levels: Sequence[str]


def shared_levels(one: Mapping[str, str], other: Mapping[str, str], levels: Sequence[str]) -> int:
    """How narrow the narrowest of `levels` is at which two places are the same; 0: at none. Unknown is never the same.

    The one rule for the server, which lists the nearest, and for workers, which take from them.
    """
    for depth in range(len(levels), 0, -1):  # a server does this for each pair of hundreds
        level = levels[depth - 1]
        value = one.get(level)
        if value and value == other.get(level):
            return depth
    return 0


Request = TypeVar("Request")
Response = TypeVar("Response")

ERROR_CODE_METADATA = "mx-error-code"
"""Trailing metadata of our server's errors: the stable code of the error (`StaleEpoch.code`)."""


class OpenWatch:
    """A stream that the server tells news on: iterate in one thread, `cancel` in any."""

    def __init__(self, call: Any, as_wire_error: Callable[[grpc.RpcError], WireError]) -> None:
        self._call, self._as_wire_error = call, as_wire_error

    def __iter__(self) -> Iterator[watch_pb2.SourcesNow]:
        """Raises WireError when the stream breaks, or is cancelled."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise self._as_wire_error(error) from error

    def cancel(self) -> None:
        """Ends it. Idempotent."""
        self._call.cancel()


class ServerClient(Closing):
    """Calls to one server over one channel, which connects at the first call and again after an outage.

    Thread-safe. Create it after a fork, never before. Works against a server that knows only the protocol's
    original fields: epochs are 0 there.

    All calls raise ServerUnreachable when there is no answer within the deadline (also when the server says that
    its store is down), and ServerRefused when the answer is no.
    """

    def __init__(
        self, address: str, *, timeout_seconds: float = 30.0, credentials: ClientCredentials | None = None
    ) -> None:
        """`address` is host:port or https://host:port, as `parse_server_address` returns it.

        Without `credentials`, certificates and token are those of the environment (MX_TLS_*, MX_AUTH_TOKEN_PATH).
        Both are read again when they change.
        """
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._server = ServerChannel(address, credentials)
        self._stubs: tuple[grpc.Channel, p2p_pb2_grpc.P2pServiceStub, health_pb2_grpc.HealthServiceStub] | None = None

    def publish(
        self,
        identity: p2p_pb2.SourceIdentity,
        worker: p2p_pb2.WorkerMetadata,
        worker_id: str,
        epoch: int = 0,
        *,
        load_report: load_pb2.LoadReport | None = None,
    ) -> p2p_pb2.PublishMetadataResponse:
        """Writes this worker's record, as often as wanted; the answer carries mx_source_id, epoch and lease_ms.

        `epoch` is what an earlier publish of this process returned, 0 for the first one. `load_report` tells how the
        weights came; the server counts each load once.

        Raises:
            StaleEpoch: a newer process of this worker has published.
        """
        response = self._call(
            "PublishMetadata",
            self._p2p.PublishMetadata,
            p2p_pb2.PublishMetadataRequest(
                identity=identity, worker=worker, worker_id=worker_id, epoch=epoch, load_report=load_report
            ),
        )
        if not response.success:
            raise self._refused("PublishMetadata", response.message)
        return response

    def list_sources(
        self,
        identity: p2p_pb2.SourceIdentity | None = None,
        *,
        status: p2p_pb2.SourceStatus.ValueType | None = None,
        model_name: str | None = None,
        worker_rank: int | None = None,
        limit: int | None = None,
        near: Near | None = None,
    ) -> list[p2p_pb2.SourceInstanceRef]:
        """The workers that fit all filters, newest sign of life first; None leaves a filter out.

        With `near`, a `limit` leaves the nearest, least loaded ones, and they come in this order; from servers that do
        not know it, as without.
        """
        request = p2p_pb2.ListSourcesRequest(
            identity=identity,
            status_filter=status,
            model_name_filter=model_name,
            worker_rank_filter=worker_rank,
            limit=limit,
            near_worker_id=near.worker_id if near else "",
            near_topology=near.topology if near else None,
            near_levels=near.levels if near else (),
        )
        return list(self._call("ListSources", self._p2p.ListSources, request).instances)

    def get_metadata(self, source_id: str, worker_id: str) -> p2p_pb2.GetMetadataResponse | None:
        """One worker's record with its identity; None when the server does not know it."""
        request = p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id)
        response = self._call("GetMetadata", self._p2p.GetMetadata, request)
        return response if response.found else None

    def update_status(
        self,
        source_id: str,
        worker_id: str,
        worker_rank: int,
        status: p2p_pb2.SourceStatus.ValueType,
        *,
        epoch: int = 0,
        source_load: float | None = None,
        load_progress: load_pb2.LoadProgress | None = None,
        load_report: load_pb2.LoadReport | None = None,
        refusals: Iterable[load_pb2.Refusal] = (),
    ) -> p2p_pb2.UpdateStatusResponse:
        """Sets the status and renews the lease: the heartbeat.

        `load_progress` also tells how far a load is, `load_report` how one has ended, `refusals` what of the weights is
        not shared. They are shown to people; servers that do not know them ignore them.

        Raises:
            StaleEpoch: a newer process of this worker has published.
            ServerRefused: the server does not know the record (any more); publish again.
        """
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=source_id,
            worker_rank=worker_rank,
            status=status,
            worker_id=worker_id,
            source_load=source_load,
            epoch=epoch,
            load_progress=load_progress,
            load_report=load_report,
            refusals=refusals,
        )
        response = self._call("UpdateStatus", self._p2p.UpdateStatus, request)
        if not response.success:
            raise self._refused("UpdateStatus", response.message)
        return response

    def tell_progress(
        self,
        source_id: str,
        worker_id: str,
        worker_rank: int,
        progress: load_pb2.LoadProgress,
        *,
        epoch: int = 0,
    ) -> float:
        """Tells how far a load is and changes nothing else: the record's status and lease stay as they are.

        Returns after how many seconds the server wants to hear again; 0 where it does not say.

        Raises:
            StaleEpoch: a newer process of this worker has published.
            ServerRefused: the worker is not loading by its record, or the server does not know such messages.
        """
        answer = self.update_status(
            source_id, worker_id, worker_rank, p2p_pb2.SOURCE_STATUS_UNKNOWN, epoch=epoch, load_progress=progress
        )
        return answer.next_progress_ms / 1000

    def take_storage_turn(
        self, source_id: str, worker_rank: int, worker_id: str, epoch: int = 0, *, domain: str = ""
    ) -> mx_pb2.TakeStorageTurnResponse:
        """Storage reader election: asks whether this worker reads storage for all with its weights, rank and domain.

        With `epoch`, the elected reader extends its lease. Servers without elections raise ServerRefused.
        """
        request = mx_pb2.TakeStorageTurnRequest(
            mx_source_id=source_id, worker_rank=worker_rank, worker_id=worker_id, epoch=epoch, domain=domain
        )
        return self._call("TakeStorageTurn", self._fleet.TakeStorageTurn, request)

    def end_storage_turn(
        self, source_id: str, worker_rank: int, worker_id: str, epoch: int, *, shared: bool, domain: str = ""
    ) -> None:
        """Ends an elected reader's lease. Without `shared`, the others are told to read for themselves."""
        request = mx_pb2.EndStorageTurnRequest(
            mx_source_id=source_id,
            worker_rank=worker_rank,
            worker_id=worker_id,
            epoch=epoch,
            shared=shared,
            domain=domain,
        )
        self._call("EndStorageTurn", self._fleet.EndStorageTurn, request)

    def tell_doubt(self, doubt: mx_pb2.Doubt) -> None:
        """Tells whose bytes are doubted, for people to see. Servers that keep no doubts raise ServerRefused."""
        self._call("TellDoubt", self._fleet.TellDoubt, mx_pb2.TellDoubtRequest(doubt=doubt))

    def doubts(self, source_id: str = "") -> list[mx_pb2.Doubt]:
        """What doubts about weights workers told lately, newest first. Servers that keep none raise ServerRefused."""
        return list(self._told(source_id).doubts)

    def refusals(self, source_id: str = "") -> list[load_pb2.RefusalCount]:
        """Weights that workers do not share, by reason, newest first. Servers that keep none raise ServerRefused."""
        return list(self._told(source_id).refusals)

    def _told(self, source_id: str) -> mx_pb2.ListDoubtsResponse:
        return self._call("ListDoubts", self._fleet.ListDoubts, mx_pb2.ListDoubtsRequest(mx_source_id=source_id))

    def watch_sources(self, request: watch_pb2.WatchSourcesRequest) -> OpenWatch:
        """Opens the stream that tells what changes of weights and a rank. Its iteration raises as other calls do,
        and MethodMissing at a server that has no such streams.
        """
        try:
            stub = watch_pb2_grpc.WatchServiceStub(self._current_stubs()[0])
            return OpenWatch(stub.WatchSources(request), partial(self._as_wire_error, "WatchSources"))
        except (SettingError, ValueError) as error:  # an unusable token; a channel that was closed meanwhile
            raise ServerUnreachable(f"WatchSources at {self.address}: {error}") from error

    def health(self) -> health_pb2.HealthResponse:
        """The server's version, status and uptime in seconds."""
        return self._call("GetHealth", self._health.GetHealth, health_pb2.HealthRequest())

    def close(self) -> None:
        """Closes the channel; calls that run end with ServerUnreachable. Idempotent."""
        self._server.close()

    @property
    def _p2p(self) -> p2p_pb2_grpc.P2pServiceStub:
        return self._current_stubs()[1]

    @property
    def _fleet(self) -> mx_pb2_grpc.FleetServiceStub:
        return mx_pb2_grpc.FleetServiceStub(self._current_stubs()[0])

    @property
    def _health(self) -> health_pb2_grpc.HealthServiceStub:
        return self._current_stubs()[2]

    def _current_stubs(self) -> tuple[grpc.Channel, p2p_pb2_grpc.P2pServiceStub, health_pb2_grpc.HealthServiceStub]:
        try:
            channel = self._server.channel()
        except (SettingError, ValueError) as error:
            raise ServerUnreachable(f"{self.address} cannot be called: {error}") from error
        stubs = self._stubs
        if stubs is None or stubs[0] is not channel:
            stubs = (channel, p2p_pb2_grpc.P2pServiceStub(channel), health_pb2_grpc.HealthServiceStub(channel))
            self._stubs = stubs
        return stubs

    def _call(self, name: str, method: Callable[..., Response], request: Request) -> Response:
        try:
            return method(request, timeout=self.timeout_seconds)
        except grpc.RpcError as error:
            raise self._as_wire_error(name, error) from error
        except (SettingError, ValueError) as error:  # an unusable token; a channel that was closed meanwhile
            raise ServerUnreachable(f"{name} at {self.address}: {error}") from error

    def _refused(self, name: str, message: str) -> ServerRefused:
        return ServerRefused(f"{name} at {self.address} was refused: {message}")

    def _as_wire_error(self, name: str, error: grpc.RpcError) -> WireError:
        status, text = call_failure(name, self.address, error)
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            text = f"{name} at {self.address} had no answer within {self.timeout_seconds:g} s"
        if status in NO_ANSWER:
            unreachable = ServerUnreachable(text)
            unreachable.late = status is grpc.StatusCode.DEADLINE_EXCEEDED
            return unreachable
        if dict(cast(grpc.Call, error).trailing_metadata() or ()).get(ERROR_CODE_METADATA) == StaleEpoch.code:
            return StaleEpoch(text)
        if status is grpc.StatusCode.UNIMPLEMENTED:
            return MethodMissing(text)
        return ServerRefused(text)
