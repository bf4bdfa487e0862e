"""`mx doctor`: checks that must be tried, each in its own process, because a native library may crash or hang.

`python -m mxcore.cli.doctor.probes NAME` is such a process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mxcore.cli.doctor.findings import Finding
from mxcore.errors import NixlMissing
from mxcore.settings import WorkerSettings

PROBE_SECONDS = 30.0
VLLM_SECONDS = 180.0  # importing it takes most of it
_FORMATS = "vllm_plugin.formats"  # run as a program: nothing here imports vLLM
_LOADS = "loads"
_NO_NIXL = f"[{NixlMissing.code}]"
_CLASS_NAME = re.compile(r"^mxcore\.\w+(\.\w+)*: ")
_NO_LIBRARY = re.compile(r"(\S+): cannot open shared object file: No such file or directory")


def needs_nixl(findings: Sequence[Finding], settings: WorkerSettings) -> bool:
    """Whether weights on this machine move by NIXL: device memory, RDMA, or where a setting wants it."""
    found = any(finding.name in ("cuda", "rdma") and finding.state != "note" for finding in findings)
    return found or settings.transport == "rdma" or settings.tcp_transfer == "nixl"


def nixl(*, is_needed: bool) -> Finding:
    """NIXL's library opens, and its UCX backend makes an agent that registers memory."""
    ran = _run("agent")
    if ran.returncode == 0:
        return Finding("nixl", "ok", ran.stdout.strip())
    reason = _last_line(ran) or f"the probe ended with {ran.returncode}"
    do = "pip install --no-deps nixl-cu12 (250 MB; nixl-cu13 for CUDA 13); without it, no device memory and no RDMA"
    if is_needed:
        return Finding("nixl", "fail", reason, do)
    instead = (
        "none is needed here: host memory goes by our own TCP connections, or within the host. For devices or RDMA: "
    )
    return Finding("nixl", "note", reason, instead + do.partition(";")[0])


def nixl_backends() -> Finding:
    """Which of NIXL's backend plugins could be used here: those whose own libraries are all there."""
    ran = _run("backends")
    if _NO_NIXL in ran.stderr:
        return Finding("nixl backends", "note", "none: there is no NIXL")
    tried = [line.partition("\t") for line in ran.stdout.splitlines()]
    fitting = [name for name, _, reason in tried if reason == _LOADS]
    failing = [f"{name} ({reason or 'the probe ended here'})" for name, _, reason in tried if reason != _LOADS]
    if not tried:
        do = "set NIXL_PLUGIN_DIR to the folder with libplugin_UCX.so, where NIXL is no wheel"
        return Finding("nixl backends", "note", _last_line(ran) or "no plugins beside NIXL's library", do)
    fact = f"load: {', '.join(fitting) or 'none'}"
    if not failing:
        return Finding("nixl backends", "ok", fact)
    do = "UCX (MX_NIXL_BACKEND) is all that weights move by; install what another one names to use that"
    return Finding("nixl backends", "note", f"{fact}; do not: {', '.join(failing)}", do)


def same_host() -> Finding:
    """One process reads another's memory (CMA), as two workers on this host do."""
    with subprocess.Popen(_command("hold"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None  # noqa: S101 - both are pipes
        assert holder.stdout is not None  # noqa: S101
        probe = holder.stdout.readline()
        ran = _run("read", probe)
        holder.stdin.close()
        holder.wait(PROBE_SECONDS)
    if ran.returncode == 0:
        return Finding("same host", "ok", "processes of this user read each other's memory: no TCP between them")
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    hint = f"kernel.yama.ptrace_scope={scope.read_text().strip()}; " if scope.is_file() else ""
    do = f"{hint}workers on this host use TCP instead; the capability SYS_PTRACE, or ptrace_scope=1 or 0, lifts it"
    return Finding("same host", "warn", "one process may not read another's memory", do)


def load_formats(environ: Mapping[str, str]) -> list[Finding]:
    """Whether vLLM finds our plugin, and whether its load formats are ours; nothing without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return []
    named = environ.get("VLLM_PLUGINS")
    allowed = None if named is None else named.split(",")
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    let_in = [point for point in points if allowed is None or point.name in allowed]
    ours = sorted(point.name for point in let_in if point.module == "vllm_plugin")
    if not ours:
        do = "add modelexpress to VLLM_PLUGINS, or give --worker-cls vllm_plugin.worker.MxWorker"
        fact = f"VLLM_PLUGINS={named} leaves our plugin out" if named is not None else "vLLM does not find our plugin"
        return [Finding("load formats", "warn", f"{fact}: --load-format mx is not known", do)]
    if all(point.module.partition(".")[0] in ("vllm", "vllm_plugin") for point in let_in):
        return [Finding("load formats", "ok", f"vLLM finds our plugin ({', '.join(ours)}), and no other")]
    ran = _ended([sys.executable, "-W", "ignore", "-m", _FORMATS], VLLM_SECONDS)
    try:
        taken: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = _last_line(ran) or f"the probe ended with {ran.returncode}"
        return [
            Finding("load formats", "warn", f"vLLM's plugins do not load: {reason}", "start vLLM, and read its log")
        ]
    if taken:
        fact = "; ".join(f"{name} belongs to {owner}" for name, owner in taken.items())
        do = "VLLM_PLUGINS=modelexpress_mx makes it ours (name your other plugins there as well), or uninstall one"
        return [Finding("load formats", "warn", fact, do)]
    return [Finding("load formats", "ok", f"vLLM finds our plugin ({', '.join(ours)}), and no other takes its formats")]


def all_findings(*, nixl_is_needed: bool) -> list[Finding]:
    return [nixl(is_needed=nixl_is_needed), nixl_backends(), same_host(), *load_formats(os.environ)]


def _command(name: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "mxcore.cli.doctor.probes", name]  # the last line is the reason


def _run(name: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return _ended(_command(name), PROBE_SECONDS, given)


def _ended(command: list[str], seconds: float, given: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess([], 124, "", f"no answer within {seconds:g} s")


def _last_line(ran: subprocess.CompletedProcess[str]) -> str:
    """The reason why it ended, without the exception's class name if the error has a code."""
    lines = ran.stderr.strip().splitlines()
    return _CLASS_NAME.sub("", lines[-1]) if lines else ""


def _agent() -> None:
    from array import array

    from mxcore.memory import HostBuffer
    from mxcore.nixl import NixlAgent, load_library
    from mxcore.settings import load_settings
    from mxcore.transfer.route import UcxPolicy, ucx_settings

    library = load_library()
    backend = load_settings({}).nixl_backend
    with ucx_settings(UcxPolicy.from_environment("auto").tls, backend) as parameters:
        agent = NixlAgent("mx-doctor", backend=backend, backend_params=parameters)
    buffer = HostBuffer(1 << 20)
    try:
        agent.register(array("Q", [buffer.address]), array("Q", [buffer.size_bytes]))
        print(f"{Path(library).name} opens, {backend} makes an agent and registers memory")  # noqa: T201
    finally:
        agent.destroy()
        buffer.close()


def _backends() -> None:
    """Opens one plugin after the other. Each prints the start of its line before it is opened."""
    import ctypes

    from mxcore.nixl import load_library

    folder = Path(os.environ.get("NIXL_PLUGIN_DIR") or Path(load_library()).parent / "plugins")
    for path in sorted(folder.glob("libplugin_*.so")):
        print(path.stem.removeprefix("libplugin_"), end="\t", flush=True)  # noqa: T201
        try:
            ctypes.CDLL(str(path))
            reason = _LOADS
        except OSError as error:
            reason = _NO_LIBRARY.sub(r"no \1", str(error).replace(f"{path}: ", "").replace("\n", " "))
        print(reason, flush=True)  # noqa: T201


def _hold() -> None:
    from mxcore.process import allow_attaching
    from mxcore.transfer.route import ProbeTarget

    target = ProbeTarget()
    allow_attaching()
    print(target.to_proto().SerializeToString().hex(), flush=True)  # noqa: T201
    sys.stdin.read()  # until the other one has read


def _read() -> None:
    from mxcore.transfer.route import can_read
    from mxserver.wire.proto import mx_pb2

    sys.exit(0 if can_read(mx_pb2.SameHostProbe.FromString(bytes.fromhex(sys.stdin.readline().strip()))) else 1)


_PROBES: dict[str, Callable[[], None]] = {"agent": _agent, "backends": _backends, "hold": _hold, "read": _read}

if __name__ == "__main__":
    _PROBES[sys.argv[1]]()
