"""How bytes move between two workers: UCX's settings, and who moves them (READ, WRITE or SEND).

A READ over TCP is emulated by UCX: the holder's process answers it, can die when the receiver vanishes, and its bytes
may still be written after the receiver gave up. So a receiver READs only where that is one-sided for certain: on one
host by cross-memory attach (proven by a real read, `same_host`), or where both sides have an RDMA port, by an agent
without TCP and without shared memory, over which UCX emulates a READ as well. Where that fails before the first byte,
and everywhere else, host memory is sent over TCP connections of our own; the holder WRITEs by UCX what lies on a
device, and where its chunk port is not reached. Between devices of one host it STAGEs chunks in a buffer that the
receiver maps (cuda_ipc, proven by `same_device`): who maps weights could write there.

A WRITE by cross-memory attach could not be fenced: the holder's kernel writes into the receiver's memory without the
receiver's agent. A receiver that wants WRITE therefore makes its agent without these transports.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from mxcore.process import c_getenv, c_setenv
from mxcore.transfer.route.nic_pinning import net_devices
from mxcore.transfer.route.rdma_devices import pins_too_little, usable_ports
from mxcore.transfer.route.same_device import cannot_read
from mxcore.transfer.route.same_host import can_read
from mxserver.wire.proto import mx_pb2

__all__ = ["Operation", "Route", "Transport", "UcxPolicy", "choose_route", "ucx_settings"]

Transport = Literal["auto", "same-host", "tcp", "rdma"]
Operation = Literal["read", "write"]

UCX_DEFAULTS = {  # as NIXL's backend takes them: without UCX_
    # The default of 8 KiB halves the throughput of TCP.
    "TCP_TX_SEG_SIZE": "256k",
    "TCP_RX_SEG_SIZE": "256k",
    # Threads that wait for each other sleep; by default they spin, on a core that the other side needs.
    "USE_MT_MUTEX": "y",
    # A cut link is an error after this long, instead of never.
    "TCP_USER_TIMEOUT": "4s",
    # A dead RDMA peer is an error after 0.3 s, instead of 47.
    "RC_TIMEOUT": "50ms",
    "RC_RETRY_COUNT": "3",
    "RC_VERBS_TIMEOUT": "50ms",
    "RC_VERBS_RETRY_COUNT": "3",
}

_TLS_OF_TRANSPORT: dict[Transport, str] = {"tcp": "tcp,self", "same-host": "tcp,cma,self", "rdma": "^tcp,sysv,posix"}
_ATTACHING = ("cma", "knem", "xpmem")  # they reach into another process without its help
_TWO_SIDED = ("tcp", "sysv", "posix")  # the other process answers a READ
_SHARED_MEMORY = ("sm", "shm")  # UCX's names for several
_GROUPS = {
    **dict.fromkeys(("cma", "knem"), _SHARED_MEMORY),
    **dict.fromkeys(("xpmem", "sysv", "posix"), ("mm", *_SHARED_MEMORY)),
    "rc": ("ib",),
    "cuda_copy": ("cuda",),
    "cuda_ipc": ("cuda",),
}
_CUDA_IPC = "cuda_ipc"
_CUDA_COPY = "cuda_copy"  # stages device memory for TCP
_ALL = "all"
_WITHOUT_RDMA = "^ib"
_OVER_RDMA = ("ib", "rc", "dc", "ud")
_environment_lock = threading.Lock()  # agents are made one at a time


@dataclass(frozen=True)
class Route:
    """How bytes come from one holder: the operation, the transport, and the UCX_TLS of the receiver's agent.

    Within one host there is no agent, nor where the holder sends; `process` is the holder's on this host.
    """

    operation: Literal["read", "write", "send", "stage"]
    transport: Literal["same-host", "cuda-ipc", "tcp", "rdma"]
    tls: str
    process: int = 0
    because: str = ""  # why device memory does not come by cuda_ipc within this host

    @property
    def by_nixl(self) -> bool:
        """Whether it needs an agent on both sides, and a fence when a transfer is abandoned."""
        return self.transport != "same-host" and self.operation not in ("send", "stage")


@dataclass(frozen=True)
class UcxPolicy:
    """The effective UCX_TLS of this process: the user's own, or what MX_TRANSPORT stands for."""

    transport: Transport
    tls: str
    chosen: bool = False  # by the user
    sockets: bool = True  # host memory goes over TCP by our own connections, not by UCX

    @classmethod
    def from_environment(
        cls,
        transport: Transport,
        environ: Mapping[str, str] | None = None,
        *,
        tcp_transfer: Literal["sockets", "nixl"] = "sockets",
    ) -> UcxPolicy:
        """The policy of this process; the user's UCX_TLS wins over `transport`."""
        tls = (os.environ if environ is None else environ).get("UCX_TLS", "")
        everything = _WITHOUT_RDMA if transport == "auto" and pins_too_little() else _ALL
        effective = tls or _TLS_OF_TRANSPORT.get(transport, everything)
        return cls(transport, effective, bool(tls), tcp_transfer == "sockets")

    def allows(self, name: str) -> bool:
        """Whether UCX may use the transport `name` (tcp, cma, rc)."""
        names = [part.strip() for part in self.tls.lstrip("^").split(",")]
        listed = any(part in (name, *_GROUPS.get(name, ())) for part in names)
        if self.tls.startswith("^"):
            return not listed
        return listed or _ALL in names or any(part.startswith(f"{name}_") for part in names)

    @property
    def attaches(self) -> bool:
        """Whether host memory may be read by cross-memory attach."""
        return self.allows("cma") and self.transport in ("auto", "same-host")

    def likely_tls(self, *, same_host: bool, device_memory: bool = False) -> str | None:
        """The UCX_TLS that a receiver's agent will most likely need, before a holder is asked; None: no agent."""
        if device_memory:
            if same_host and self.maps_devices:
                return None
        elif same_host and self.attaches:
            return None
        if self.rdma_only or self.reads_by_rdma:
            return self.one_sided(device_memory=device_memory)
        if device_memory:
            return self.device_fenceable
        return None if self.sends else self.fenceable

    @property
    def sends(self) -> bool:
        """Whether holders send host memory over our own TCP connections where a READ may not be one-sided.

        Those are not UCX's: a UCX_TLS that names others, without TCP, keeps them out only where there is an RDMA port.
        """
        by_rdma = self.transport == "rdma" or self.reads_by_rdma
        return self.sockets and (self.allows("tcp") or not (self.tls.startswith("^") or by_rdma))

    @property
    def rdma_only(self) -> bool:
        """Whether a READ cannot be emulated: rdma mode, and UCX has neither TCP nor shared memory."""
        return self.transport == "rdma" and not any(map(self.allows, _TWO_SIDED))

    @property
    def reads_by_rdma(self) -> bool:
        """Whether UCX may use RDMA here, and there is a port for it."""
        return self.transport in ("auto", "rdma") and self.allows("rc") and bool(usable_ports())

    def one_sided(self, *, device_memory: bool = False) -> str:
        """The UCX_TLS for an agent that READs over RDMA: no transport that emulates it."""
        if self.tls.startswith("^"):
            return ",".join([self.tls, *filter(self.allows, _TWO_SIDED)])
        names = [part.strip() for part in self.tls.split(",")]
        if _ALL in names:
            return "^" + ",".join(_TWO_SIDED)
        left = [name for name in names if name not in (*_TWO_SIDED, "mm", *_SHARED_MEMORY)]
        staging = [_CUDA_COPY] if device_memory and not self.allows(_CUDA_COPY) else []
        return ",".join([*left, *staging])

    def serving(self, device_type: str) -> tuple[str, bool]:
        """The UCX_TLS for an agent that serves such memory, and whether it needs a progress thread all the time.

        It does where receivers READ by NIXL, and connect at any time; else the agent WRITEs, when it is asked to.
        """
        if device_type == "cpu":
            return self.tls, self.rdma_only or self.reads_by_rdma
        return self.serving_device, True

    def needs_agent(self, device_type: str) -> bool:
        """Whether readers need the holder's agent as a rule, so that it is made before the first one comes."""
        return device_type != "cpu" or self.rdma_only or self.reads_by_rdma or not self.sends

    @property
    def fenceable(self) -> str:
        """The UCX_TLS for an agent into whose memory only its own UCX may write."""
        if self.tls.startswith("^"):
            return ",".join([self.tls, *(name for name in _ATTACHING if self.allows(name))])
        names = [part.strip() for part in self.tls.split(",")]
        if _ALL in names:
            return "^" + ",".join(_ATTACHING)
        return ",".join(name for name in names if name not in (*_ATTACHING, "mm", *_SHARED_MEMORY))

    def write_route(self, *, device_memory: bool = False, without_rdma: bool = False) -> Route:
        """The route by UCX where no READ is one-sided; `without_rdma` where RDMA was tried and reaches nobody.

        UCX would choose RDMA again: it does not find out whether a port is reachable.
        """
        tls = self.device_fenceable if device_memory else self.fenceable
        if without_rdma:
            names = tls.split(",")
            left = [name for name in names if name.partition("_")[0] not in _OVER_RDMA]
            tls = ",".join([*names, "ib"] if tls.startswith("^") else left)
        return Route("write", "tcp", tls)

    def fallback_route(
        self, offer: mx_pb2.TransportOffer, *, device_memory: bool, without_rdma: bool, without_sockets: bool
    ) -> Route:
        """The route where no READ is one-sided for certain, or where a READ or the chunk port was tried and failed."""
        if self.sends and offer.chunk_port and not (device_memory or without_sockets):
            return Route("send", "tcp", "")
        return self.write_route(device_memory=device_memory, without_rdma=without_rdma)

    @property
    def serving_device(self) -> str:
        """The UCX_TLS for an agent that serves device memory."""
        if self.tls.startswith("^") or self.tls == _ALL:
            return self.tls
        return self.tls if self.allows(_CUDA_COPY) else f"{self.tls},{_CUDA_COPY}"

    @property
    def maps_devices(self) -> bool:
        """Whether chunks may go by cuda_ipc within this host: the user's list of UCX_TLS, if there is one, has it."""
        allowed = self.allows(_CUDA_IPC) if self.chosen else True
        return allowed and self.transport in ("auto", "same-host")

    @property
    def device_fenceable(self) -> str:
        """The UCX_TLS for an agent with device memory: without cuda_ipc too, by which the holder's GPU would write.

        RDMA reaches device memory directly; for TCP it is staged.
        """
        if self.tls.startswith("^"):
            without = [name for name in (*_ATTACHING, _CUDA_IPC) if self.allows(name)]
            return ",".join([self.tls, *without])
        if self.fenceable.startswith("^"):
            return f"{self.fenceable},{_CUDA_IPC}"
        names = [name for name in self.fenceable.split(",") if name not in (_CUDA_IPC, "cuda")]
        return ",".join([*names, *([_CUDA_COPY] if _CUDA_COPY not in names else [])])

    def to_proto(self, probe: mx_pb2.SameHostProbe) -> mx_pb2.TransportOffer:
        """What a holder tells receivers about how its memory can be reached."""
        return mx_pb2.TransportOffer(
            same_host_read=self.attaches,
            rdma_only=self.rdma_only,
            rdma_device=self.reads_by_rdma,
            probe=probe if self.attaches else None,
        )


@contextmanager
def ucx_settings(tls: str, backend: str = "UCX") -> Iterator[dict[str, str]]:
    """UCX's settings for one agent: yields the parameters of NIXL's backend; make the agent within it.

    What others in this process set for UCX stays, and wins over our defaults. NIXL hands our settings on, unless they
    are lists: it parts them at commas. So UCX_TLS, where it is a list or the user has set one, and UCX_NET_DEVICES,
    where several are pinned, are in the process' environment meanwhile, and restored afterwards; UCX reads them when a
    backend is created. The lock lets one agent at a time be made. `os.environ` does not see the changes.
    """
    if backend != "UCX":
        yield {}
        return
    meant = UCX_DEFAULTS | {"TLS": tls}
    if (pinned := net_devices()) and c_getenv("UCX_NET_DEVICES") is None:
        meant["NET_DEVICES"] = pinned
    by_environment = {
        f"UCX_{name}": value
        for name, value in meant.items()
        if "," in value or (name == "TLS" and c_getenv("UCX_TLS") is not None)
    }
    parameters = [f"{name}={value}" for name, value in meant.items() if f"UCX_{name}" not in by_environment]
    with _environment_lock:
        before = {name: c_getenv(name) for name in by_environment}
        try:
            for name, value in by_environment.items():
                c_setenv(name, value)
            yield {"engine_config": ",".join(parameters)}
        finally:
            for name, was in before.items():
                c_setenv(name, was)


def choose_route(policy: UcxPolicy, offer: mx_pb2.TransportOffer, *, device_index: int | None = None) -> Route:
    """The route to a holder that offers `offer`; reads the holder's probe where that is on this host.

    `device_index`: where the receiver's memory is, None for the host. With device memory on both sides of one host the
    holder STAGEs chunks in a buffer that the receiver maps by cuda_ipc. With it on one side only there is RDMA, or
    WRITEs that pass the receiver's own agent: cross-memory attach does not reach a device, and a WRITE by cuda_ipc
    cannot be fenced by the receiver.
    """
    on_device = device_index is not None or offer.device_memory
    because = ""
    if policy.rdma_only and offer.rdma_only:
        return Route("read", "rdma", policy.one_sided(device_memory=on_device))
    if on_device:
        because = _no_staging(policy, offer, device_index)
        if not because:
            return Route("stage", "cuda-ipc", "")
    elif policy.attaches and offer.same_host_read and can_read(offer.probe):
        return Route("read", "same-host", "", process=offer.probe.pid)
    if policy.reads_by_rdma and offer.rdma_device:
        return Route("read", "rdma", policy.one_sided(device_memory=on_device))
    otherwise = policy.fallback_route(offer, device_memory=on_device, without_rdma=False, without_sockets=False)
    return replace(otherwise, because=because)


def _no_staging(policy: UcxPolicy, offer: mx_pb2.TransportOffer, device_index: int | None) -> str:
    if device_index is None or not offer.device_memory:
        return "only one side's memory is on a device"
    if not policy.maps_devices:
        return "the settings of this worker (MX_TRANSPORT, UCX_TLS) leave cuda_ipc out"
    if not offer.HasField("staging_probe"):
        return offer.no_device_read or "the holder offers none, or is of a release that only lets its weights be mapped"
    return cannot_read(offer.staging_probe, device_index)
