"""A process that holds device memory of the stand-in, for one in another process to read: one JSON object as argument.

`mode` probe: a line with a DeviceProbe in hex. `mode` serve: a line with where its weights can be had. Both until stdin
ends. The stand-in's memory is host memory to UCX: `tls` are the transports by which that is reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mxcore.cuda import context_of
from mxcore.settings import load_settings
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.route import DeviceProbeTarget, UcxPolicy, release_devices
from tests.cuda.device_tensors import DeviceTensors
from tests.cuda.stand_in import StandIn
from tests.transfer.memory import HostTensors, identity, model_specs

CHUNK_BYTES = 65_536
SEED = 5


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def use_host_transports(tls: str) -> None:
    """What UCX is told on the stand-in, in this process: no CUDA."""
    for name in ("device_fenceable", "serving_device"):
        setattr(UcxPolicy, name, tls)


def member() -> Membership:
    settings = load_settings({"MX_WORKER_GRPC_PORT": 0, "MX_WORKER_HOST": "127.0.0.1"}, {})
    return Membership(settings, identity(), 0, "cuda", chunk_bytes=CHUNK_BYTES)


def probe() -> None:
    target = DeviceProbeTarget(context_of(0))
    say(target.to_proto().SerializeToString().hex())
    sys.stdin.read()
    target.close()


def serve(tls: str) -> None:
    use_host_transports(tls)
    tensors = DeviceTensors(model_specs(1), SEED)
    membership = member()
    layout, placement = build_layout("raw", tensors.local_tensors())
    membership.serve(layout, placement, {}, keep_alive=tensors)
    found = {"source_id": membership.source_id, "worker_id": membership.worker_id, "endpoint": membership.endpoint}
    say(json.dumps(found))
    for _ in sys.stdin:  # it asks what of the weights is another byte
        tensors.fetch()
        right = HostTensors(model_specs(1), SEED)
        pairs = zip(tensors.storages.values(), right.storages.values(), strict=True)
        say(json.dumps({"changed": sum(int(np.count_nonzero(ours != theirs)) for ours, theirs in pairs)}))
    membership.close()
    release_devices()
    tensors.close()


def main() -> None:
    task = json.loads(sys.argv[1])
    driver = StandIn(Path(task["library"]))
    driver.share(task["share"])
    if task["mode"] == "probe":
        probe()
    else:
        serve(task["tls"])
    counts = driver.counts()
    assert counts.violations == 0, driver.violation()
    assert counts.device_allocations == counts.opened == 0, counts


if __name__ == "__main__":
    main()
