"""`mx doctor`: on this machine as it is, and on trees of /proc and /sys as other machines have them."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mxcore.cli.connection import Connection
from mxcore.cli.doctor import machine as doctor_machine
from mxcore.cli.doctor import probes as doctor_probes
from mxcore.cli.doctor import server as doctor_server
from mxcore.cli.doctor.findings import Finding, State, failed
from mxcore.settings import load_settings
from tests.cli.mx_process import mx
from tests.installs import installed
from tests.web.conftest import WebServer, start_web, web

__all__ = ["start_web", "web"]  # fixtures


def test_everything_is_looked_at_and_nothing_fails(web: WebServer) -> None:
    ran = mx("doctor", "--json", MODEL_EXPRESS_URL=web.address)
    facts = ran.json()
    by_name = {finding["name"]: finding for finding in facts["findings"]}
    assert {
        "versions", "compiled core", "cuda", "rdma", "memlock", "huge pages", "shared memory", "io_uring",
        "nixl", "nixl backends", "same host", "load formats", "setting", "server", "clock",
    } <= set(by_name)  # fmt: skip
    assert (ran.code, facts["well"]) == (0, True), ran.out
    assert by_name["nixl"]["state"] == "ok"
    assert by_name["server"]["state"] == "ok"
    assert by_name["clock"]["state"] == "ok"
    for finding in facts["findings"]:
        assert finding["state"] == "ok" or finding["do"], f"{finding['name']} says nothing about what to do"


def test_text_marks_failures_and_says_what_to_do() -> None:
    ran = mx("doctor", "--server", "127.0.0.1:1")
    assert ran.code == 1
    assert "FAIL  server " in ran.out
    assert "→ is it running" in ran.out


def test_machine_alone() -> None:
    ran = mx("doctor", "--no-server", "--json")
    assert ran.code == 0
    assert "server" not in {finding["name"] for finding in ran.json()["findings"]}


def test_no_server_named_is_a_warning() -> None:
    [finding] = doctor_server.environment({})
    assert (finding.state, "no server is named" in finding.fact) == ("warn", True)


def test_environment_names() -> None:
    environ = {"MODEL_EXPRESS_URL": "tcp://10.0.0.1:8001", "MX_SERVER_ADRESS": "x:1", "MX_SERVER_ADDRESS": "h:1"}
    found = doctor_server.environment(environ)
    assert [finding.fact for finding in found] == [
        "MX_SERVER_ADRESS is no setting",
        "MODEL_EXPRESS_URL was set by Kubernetes for a service",
    ]
    assert found[0].do == "did you mean MX_SERVER_ADDRESS?"


def test_names_without_effect_are_one_note() -> None:
    environ = {"MX_SERVER_ADDRESS": "h:1", "MX_METADATA_PORT": "5555", "MX_POOL_REG": "1", "MX_SOMETHING": "1"}
    unknown, unused = doctor_server.environment(environ)
    assert (unknown.fact, unknown.do) == ("MX_SOMETHING is no setting", "unset it")
    assert (unused.state, unused.fact) == ("note", "without effect on a worker: MX_METADATA_PORT, MX_POOL_REG")


@pytest.mark.parametrize(
    ("plugins", "state", "said"),
    [
        (None, "ok", "(modelexpress, modelexpress_mx)"),
        ("modelexpress", "ok", "(modelexpress)"),
        ("lora_filesystem_resolver,modelexpress_mx", "ok", "(modelexpress_mx)"),
        ("lora_filesystem_resolver", "warn", "VLLM_PLUGINS=lora_filesystem_resolver leaves our plugin out"),
        ("", "warn", "VLLM_PLUGINS= leaves our plugin out"),
    ],
)
def test_whether_vllm_finds_the_plugin(plugins: str | None, state: str, said: str) -> None:
    [finding] = doctor_probes.load_formats({} if plugins is None else {"VLLM_PLUGINS": plugins})
    assert (finding.state, said in finding.fact) == (state, True), finding


def test_a_load_format_of_another_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = installed("modelexpress-0.7.0", "modelexpress==0.7.0", "google-crc32c", dependencies=False)
    monkeypatch.syspath_prepend(theirs)  # for this process, and
    monkeypatch.setenv("PYTHONPATH", str(theirs))  # for the probe's
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    [finding] = doctor_probes.load_formats({})
    owner = "modelexpress 0.7.0 (modelexpress.engines.vllm.loader.MxModelLoader)"
    assert (finding.state, finding.fact) == ("warn", f"mx belongs to {owner}")
    assert "VLLM_PLUGINS=modelexpress_mx makes it ours" in finding.do


def test_bad_address_is_a_failure() -> None:
    [finding] = doctor_server.server(Connection("http://"))
    assert finding.state == "fail"


@pytest.mark.parametrize(
    ("server_ms", "state"), [(1_000_000, "ok"), (1_005_000, "warn"), (990_000, "warn"), (0, "note")]
)
def test_clock(server_ms: int, state: str) -> None:
    assert doctor_server.clock(server_ms, sent_ms=1_000_000, took_seconds=0.1).state == state


def test_slow_answer_makes_the_clock_less_certain() -> None:
    assert doctor_server.clock(1_003_000, sent_ms=1_000_000, took_seconds=4.0).state == "ok"


def make(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_rdma_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.rdma(tmp_path).state == "note"
    make(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN\n")
    down = doctor_machine.rdma(tmp_path)
    assert (down.state, down.fact) == ("warn", "no port is active: mlx5_0:1 1: DOWN")
    make(tmp_path, "sys/class/infiniband/mlx5_1/ports/1/state", "4: ACTIVE\n")
    make(tmp_path, "sys/class/infiniband_verbs/uverbs0/ibdev", "mlx5_0\n")
    make(tmp_path, "sys/class/infiniband_verbs/uverbs1/ibdev", "mlx5_1\n")
    make(tmp_path, "dev/infiniband/uverbs0")  # of the port that is down
    assert "no /dev/infiniband/uverbs* of theirs can be opened" in doctor_machine.rdma(tmp_path).fact
    make(tmp_path, "dev/infiniband/uverbs1")
    make(tmp_path, "proc/self/status", "CapEff:\t0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (65536, 65536))
    assert "too little memory may be pinned" in doctor_machine.rdma(tmp_path).fact
    make(tmp_path, "proc/self/status", "CapEff:\t4000\n")
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    fact = "mlx5_0:1 1: DOWN, mlx5_1:1 4: ACTIVE; weights are READ over mlx5_1:1"
    assert doctor_machine.rdma(tmp_path) == Finding("rdma", "ok", fact)
    monkeypatch.setenv("UCX_NET_DEVICES", "mlx5_0:1,eth0")
    left_out = doctor_machine.rdma(tmp_path)
    assert (left_out.state, "UCX_NET_DEVICES=mlx5_0:1,eth0 leaves them out" in left_out.fact) == ("warn", True)


@pytest.mark.parametrize(
    ("capabilities", "device", "state"), [("4000", False, "ok"), ("0", False, "note"), ("0", True, "warn")]
)
def test_memlock(tmp_path: Path, capabilities: str, device: bool, state: str) -> None:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        pytest.skip("this machine has no limit on pinned memory")
    make(tmp_path, "proc/self/status", f"Name:\tx\nCapEff:\t{capabilities}\n")
    if device:
        make(tmp_path, "sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")
    assert doctor_machine.memlock(tmp_path).state == state


@pytest.mark.parametrize(
    ("enabled", "free", "state"),
    [
        ("always [madvise] never", "0", "ok"),
        ("always madvise [never]", "0", "warn"),
        ("", "0", "warn"),
        ("", "12", "ok"),
    ],
)
def test_huge_pages(tmp_path: Path, enabled: str, free: str, state: str) -> None:
    make(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nHugePages_Free:       {free}\n")
    if enabled:
        make(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", enabled)
    assert doctor_machine.huge_pages(tmp_path).state == state


def test_shared_memory_missing(tmp_path: Path) -> None:
    assert doctor_machine.shared_memory(tmp_path).state == "warn"


def test_io_uring_agrees_with_the_kernel() -> None:
    """The kernel's own switch and the answer cannot contradict each other."""
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if not switch.is_file():
        pytest.skip("this kernel has no switch for io_uring")
    if switch.read_text().strip() == "2":
        assert doctor_machine.io_uring().state == "note"
    assert doctor_machine.io_uring().state in ("ok", "note")


@pytest.mark.parametrize(("is_needed", "state"), [(True, "fail"), (False, "note")])
def test_missing_nixl_is_a_failure_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_needed: bool, state: str
) -> None:
    """The probe's process finds a NIXL that cannot be opened."""
    library = tmp_path / ".nixl_cu12.mesonpy.libs" / "libnixl_capi.so"
    make(tmp_path, "nixl_cu12/__init__.py")
    make(tmp_path, "nixl_cu13/__init__.py")
    make(tmp_path, str(library.relative_to(tmp_path)), "no library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor_probes.nixl(is_needed=is_needed)
    assert finding.state == state
    assert ("none is needed here" in finding.do) is not is_needed
    assert "pip install" in finding.do


@pytest.mark.parametrize(
    ("name", "state", "environ", "is_needed"),
    [
        ("cuda", "note", {}, False),  # no driver
        ("rdma", "note", {}, False),  # no device
        ("cuda", "ok", {}, True),
        ("rdma", "warn", {}, True),
        ("cuda", "note", {"MX_TRANSPORT": "rdma"}, True),
        ("cuda", "note", {"MX_TCP_TRANSFER": "nixl"}, True),
        ("memlock", "fail", {"MX_TRANSPORT": "tcp"}, False),
    ],
)
def test_nixl_is_needed_for_devices_rdma_and_where_a_setting_says_so(
    name: str, state: State, environ: dict[str, str], is_needed: bool
) -> None:
    assert doctor_probes.needs_nixl([Finding(name, state, "", "")], load_settings({}, environ)) is is_needed


def test_every_compiled_module_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"digest.digest", "nixl.agent", "reading.checkpoint_reader"} <= set(doctor_machine.COMPILED)
    assert doctor_machine.compiled_core().state == "ok"
    monkeypatch.setattr(doctor_machine, "COMPILED", ("digest.digest", "not_built"))
    finding = doctor_machine.compiled_core()
    assert (finding.state, "mxcore.not_built" in finding.fact, "make build" in finding.do) == ("fail", True, True)


def test_backends_say_which_library_they_miss() -> None:
    """The wheel's plugins on a machine as it is: UCX is there, and each that is not names what it lacks."""
    finding = doctor_probes.nixl_backends()
    loading, _, missing = finding.fact.partition("; do not: ")
    assert "UCX" in loading
    assert all(reason.endswith(")") for reason in missing.split("), ")[-1:] if reason)
    assert (finding.state, bool(finding.do)) == (("note", True) if missing else ("ok", False))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no library", r"note load: none; do not: BROKEN \(.*(too short|invalid ELF).*\)"), (None, "note")],
)
def test_plugins_of_a_folder_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "libplugin_BROKEN.so").write_bytes(content)
    monkeypatch.setenv("NIXL_PLUGIN_DIR", str(tmp_path))
    finding = doctor_probes.nixl_backends()
    assert re.match(said, f"{finding.state} {finding.fact}")
    assert finding.do


def test_backend_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MX_NIXL_BACKEND", "NOWHERE")
    finding = doctor_probes.nixl(is_needed=True)
    assert (finding.state, "NOWHERE" in finding.fact) == ("fail", True)


def test_probe_that_hangs_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_probes, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(doctor_probes, "_command", lambda name: [sys.executable, "-c", "import time; time.sleep(600)"])
    started = time.monotonic()
    finding = doctor_probes.nixl(is_needed=True)
    assert (finding.state, finding.fact) == ("fail", "no answer within 0.5 s")
    assert time.monotonic() - started < 300


def test_one_failure_is_enough() -> None:
    fine = Finding("a", "warn", "slow", "do")
    assert not failed([fine, Finding("b", "ok", "fine")])
    assert failed([fine, Finding("b", "fail", "broken")])


def test_help_of_all_is_fast_to_import() -> None:
    program = (
        "import sys\nfrom click.testing import CliRunner\nfrom mxcore.cli.main import mx\n"
        "for name in ('status', 'sources', 'doctor'):\n"
        "    ran = CliRunner().invoke(mx, [name, '--help'])\n"
        "    assert ran.exit_code == 0 and 'Exit codes' in ran.output and 'Examples' in ran.output, ran.output\n"
        "print([name for name in ('torch', 'vllm', 'grpc', 'numpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
