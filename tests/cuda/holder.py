"""A process that holds device memory of the stand-in, for one in another process to read: one JSON object as argument.

`mode` probe: a line with a DeviceProbe in hex. `mode` serve: a line with where its weights can be had. Both until stdin
ends. The stand-in's memory is host memory to UCX: `tls` are the transports by which that is reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mxcore.cuda import context_of
from mxcore.settings import load_settings
from mxcore.transfer.layout import build_layout
from mxcore.transfer.member import Membership
from mxcore.transfer.route import DeviceProbeTarget, UcxPolicy, release_devices
from tests.cuda.device_tensors import DeviceTensors
from tests.cuda.stand_in import StandIn
from tests.transfer.memory import identity, model_specs

CHUNK_BYTES = 65_536
SEED = 5


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def use_host_transports(tls: str, reading: str) -> None:
    """What UCX is told on the stand-in, in this process: no CUDA."""
    for name in ("device_fenceable", "serving_device"):
        setattr(UcxPolicy, name, tls)
    UcxPolicy.device_reading = reading  # type: ignore[method-assign,assignment]


def member() -> Membership:
    settings = load_settings({"MX_WORKER_GRPC_PORT": 0, "MX_WORKER_HOST": "127.0.0.1"}, {})
    return Membership(settings, identity(), 0, "cuda", chunk_bytes=CHUNK_BYTES)


def probe() -> None:
    target = DeviceProbeTarget(context_of(0))
    say(target.to_proto().SerializeToString().hex())
    sys.stdin.read()
    target.close()


def serve(tls: str) -> None:
    use_host_transports(tls, tls)
    tensors = DeviceTensors(model_specs(1), SEED)
    membership = member()
    layout, placement = build_layout("raw", tensors.local_tensors())
    membership.serve(layout, placement, {}, keep_alive=tensors)
    found = {"source_id": membership.source_id, "worker_id": membership.worker_id, "endpoint": membership.endpoint}
    say(json.dumps(found))
    sys.stdin.read()
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
