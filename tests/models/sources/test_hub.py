"""Downloads from a hub through the whole server: the real huggingface_hub against a stand-in over HTTP."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mxbench.stand_ins.hub import LARGE_BYTES, Fault, HubStandIn, git_sha1
from mxserver.wire import ModelDownloadError, ModelNotFound, ServerRefused
from mxserver.wire.files import ModelClient
from mxserver.wire.proto import model_pb2
from tests.models.conftest import (
    FILE_DIGESTS,
    FILES,
    REPOSITORY,
    WEIGHTS,
    StartServer,
    digests_of,
    files_below,
    pattern,
)

LARGE = "model-00001-of-00002.safetensors"


def snapshot(cache: Path, commit: str) -> Path:
    return cache / "models--org--tiny-1.0" / "snapshots" / commit


def test_download_puts_the_hubs_layout_into_the_cache(client: ModelClient, hub: HubStandIn, cache_folder: Path) -> None:
    commit = client.ensure(REPOSITORY)
    assert commit == hub.repositories[REPOSITORY].refs["main"]
    folder = snapshot(cache_folder, commit)
    assert files_below(folder) == FILE_DIGESTS
    assert all(path.is_symlink() for path in folder.rglob("*") if path.is_file())
    assert (cache_folder / "models--org--tiny-1.0" / "refs" / "main").read_text() == commit
    assert not list((cache_folder / ".modelexpress" / "staging").iterdir())


def test_offline_library_finds_the_model(client: ModelClient, cache_folder: Path) -> None:
    client.ensure(REPOSITORY)
    program = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", program, REPOSITORY, str(cache_folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert files_below(Path(done.stdout.strip())) == FILE_DIGESTS


def test_second_request_asks_for_nothing_but_the_revision(client: ModelClient, hub: HubStandIn) -> None:
    client.ensure(REPOSITORY)
    sent = hub.bytes_sent.total()
    commit = client.ensure(REPOSITORY)
    assert hub.bytes_sent.total() == sent
    asked = hub.requests["api"]
    client.ensure(REPOSITORY, revision=commit)
    assert hub.requests["api"] == asked


def test_ignore_weights_first_and_the_rest_later(client: ModelClient, hub: HubStandIn) -> None:
    client.ensure(REPOSITORY, ignore_weights=True)
    light = {info.path for info in client.list_files(REPOSITORY, ignore_weights=True).files}
    assert light == set(FILES) - WEIGHTS
    with pytest.raises(ModelNotFound, match="without its weights"):
        client.list_files(REPOSITORY)
    assert not any(hub.bytes_sent[path] for path in WEIGHTS)
    client.ensure(REPOSITORY)
    assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES)
    assert hub.requests["GET extra/nested/tokenizer.json"] == 1


def test_branch_that_moves(client: ModelClient, hub: HubStandIn, cache_folder: Path) -> None:
    old = client.ensure(REPOSITORY)
    changed = FILES | {"config.json": b'{"model_type": "other"}'}
    new = hub.add(REPOSITORY, changed)
    sent = {path: hub.bytes_sent[path] for path in FILES}
    assert client.ensure(REPOSITORY) == new
    assert files_below(snapshot(cache_folder, new)) == digests_of(changed)
    assert files_below(snapshot(cache_folder, old)) == FILE_DIGESTS
    assert hub.bytes_sent[LARGE] == sent[LARGE]  # the same blob is not fetched twice


def test_branches_and_tags_with_slashes(client: ModelClient, hub: HubStandIn) -> None:
    commit = hub.add(REPOSITORY, {"config.json": b"{}"}, ref="v1.0")
    assert client.ensure(REPOSITORY, revision="v1.0") == commit
    assert [info.path for info in client.list_files(REPOSITORY, revision="v1.0").files] == ["config.json"]


def test_unknown_model_and_unknown_revision(client: ModelClient) -> None:
    with pytest.raises(ModelNotFound, match="org/none"):
        client.ensure("org/none")
    with pytest.raises(ModelNotFound, match="nowhere"):
        client.ensure(REPOSITORY, revision="nowhere")


def token(value: str) -> dict[str, str]:
    return {"HF_TOKEN": value}


def test_gated_model_needs_the_token(start_server: StartServer, hub: HubStandIn) -> None:
    hub.repositories[REPOSITORY].gated = True
    with (
        ModelClient(start_server(**token("wrong")).address) as client,
        pytest.raises(ModelDownloadError, match="HF_TOKEN"),
    ):
        client.ensure(REPOSITORY)
    with ModelClient(start_server(**token("right")).address) as client:
        assert client.ensure(REPOSITORY)
    assert "Bearer right" in hub.tokens


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("api", Fault(status=429, retry_after="1")),
        ("api", Fault(status=503)),
        (f"HEAD {LARGE}", Fault(status=503, retry_after="1")),
        (f"GET {LARGE}", Fault(status=429, retry_after="1")),
        (f"GET {LARGE}", Fault(status=503, retry_after="1")),
        (f"GET {LARGE}", Fault(cut_after=1_000_000)),
        (f"GET {LARGE}", Fault(replace_with=pattern(3_000_001, 7))),
        (f"GET {LARGE}", Fault(replace_with=pattern(2_000_000, 1))),
        ("GET config.json", Fault(replace_with=b'{"model_type": "evil"}')),
        ("GET config.json", Fault(status=500)),
    ],
    ids=[
        "rate limit",
        "hub down",
        "head 503",
        "cdn 429",
        "cdn 503",
        "cut",
        "other bytes",
        "too short",
        "other small file",
        "500",
    ],
)
def test_faults_that_pass_are_ridden_out(
    client: ModelClient, hub: HubStandIn, cache_folder: Path, key: str, fault: Fault
) -> None:
    hub.faults[key].append(fault)
    commit = client.ensure(REPOSITORY)
    assert not hub.faults[key], "the fault did not happen"
    assert files_below(snapshot(cache_folder, commit)) == FILE_DIGESTS


def test_the_hub_says_how_long_to_wait(start_server: StartServer, hub: HubStandIn) -> None:
    """By RateLimit, as the hub does, and not by Retry-After (findings, row 18)."""
    hub.faults["api"].append(Fault(status=429, rate_limit='"api";r=0;t=3'))
    messages: list[str] = []
    with ModelClient(start_server().address) as client:
        client.ensure(REPOSITORY, on_update=lambda update: messages.append(update.message))
    assert any("asking the provider again in 3 s" in message for message in messages)


def test_copies_in_other_forms_stay_where_they_are_and_it_is_said(start_server: StartServer, hub: HubStandIn) -> None:
    copies = {"original/consolidated.00.pth": b"1" * 70, "metal/model.bin": b"2" * 30, "pytorch_model.bin": b"3"}
    hub.add(REPOSITORY, FILES | copies)
    messages: list[str] = []
    with ModelClient(start_server().address) as client:
        client.ensure(REPOSITORY, on_update=lambda update: messages.append(update.message))
        assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES)
        assert not [verdict for verdict in client.validate(REPOSITORY) if verdict.problem]
    assert "left out: 3 files of 101 bytes" in messages[-1]
    assert not any(hub.bytes_sent[name] for name in copies)
    with ModelClient(start_server(MX_DOWNLOAD_IGNORE="none").address) as client:
        client.ensure(REPOSITORY)
        assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES | copies)


def test_cut_is_resumed_where_it_was(client: ModelClient, hub: HubStandIn) -> None:
    hub.add(REPOSITORY, {"large.safetensors": pattern(24_000_000)})
    hub.faults["GET large.safetensors"].append(Fault(cut_after=22_000_000))
    client.ensure(REPOSITORY)
    assert hub.requests["GET large.safetensors"] == 2
    assert hub.bytes_sent["large.safetensors"] < 24_000_000 + 10_485_760  # the library writes in steps of 10 MiB


def test_a_mirror_without_ranges_gives_the_file_from_its_beginning(
    client: ModelClient, hub: HubStandIn, cache_folder: Path
) -> None:
    """After a cut the rest is asked for, and all of it comes (findings, row 28)."""
    hub.knows_ranges = False
    data = pattern(24_000_000)
    commit = hub.add(REPOSITORY, {"large.safetensors": data})
    hub.faults["GET large.safetensors"].append(Fault(cut_after=22_000_000))
    assert client.ensure(REPOSITORY) == commit
    assert hub.requests["GET large.safetensors"] == 2
    assert hub.bytes_sent["large.safetensors"] > 44_000_000
    assert files_below(snapshot(cache_folder, commit)) == digests_of({"large.safetensors": data})


def test_progress_is_real(client: ModelClient, hub: HubStandIn) -> None:
    gate = Fault(gate=threading.Event(), gate_after=1_048_576)
    hub.faults[f"GET {LARGE}"].append(gate)
    seen: list[model_pb2.DownloadProgress] = []

    def note(update: model_pb2.ModelStatusUpdate) -> None:
        if update.HasField("progress") and update.status == model_pb2.DOWNLOADING:
            seen.append(update.progress)
            others = sum(map(len, FILES.values())) - len(FILES[LARGE])
            if update.progress.files_done == 4 and update.progress.bytes_done > others:
                assert gate.gate
                gate.gate.set()

    client.ensure(REPOSITORY, on_update=note)
    total = sum(map(len, FILES.values()))
    assert {update.bytes_total for update in seen if update.bytes_total} == {total}
    assert [update.bytes_done for update in seen] == sorted(update.bytes_done for update in seen)
    assert any(0 < update.bytes_done < total for update in seen)
    assert {update.files_total for update in seen if update.files_total} == {5}


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.json",
        "/etc/passwd",
        "a/../../b",
        "a\\..\\b",
        "C:/x",
        "sub//x",
        "nul.txt",
        "bad\x00name",
        "config.json/inner",
        "config.json",
    ],
)
def test_hostile_names_of_a_hub_are_refused(
    client: ModelClient, hub: HubStandIn, cache_folder: Path, tmp_path: Path, name: str
) -> None:
    hub.add(REPOSITORY, FILES, listed=(name,))
    with pytest.raises(ModelDownloadError, match="MX_MODEL_PATH"):
        client.ensure(REPOSITORY)
    assert not (tmp_path / "outside.json").exists()
    assert not (cache_folder / "models--org--tiny-1.0").exists()


def test_offline_server_serves_what_lies_in_its_folder(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    program = "import sys, huggingface_hub as h; h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", program, REPOSITORY, str(cache_folder)],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache_folder.parent / "other")},
        check=True,
    )
    asked = hub.requests.total()
    with ModelClient(start_server(HF_HUB_OFFLINE="1").address) as client:
        with pytest.raises(ModelNotFound):
            client.list_files(REPOSITORY)
        client.ensure(REPOSITORY)
        assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES)
        with pytest.raises(ModelDownloadError, match="HF_HUB_OFFLINE"):
            client.ensure("org/other")
    assert hub.requests.total() == asked


def test_a_name_that_somebody_wrote_with_a_line_end(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path
) -> None:
    """As `echo COMMIT > refs/main` does (findings, row 32)."""
    with ModelClient(start_server().address) as client:
        commit = client.ensure(REPOSITORY)
    (cache_folder / "models--org--tiny-1.0" / "refs" / "main").write_text(f"{commit}\n")
    with ModelClient(start_server(HF_HUB_OFFLINE="1").address) as client:
        assert client.ensure(REPOSITORY) == commit
        assert {info.path for info in client.list_files(REPOSITORY).files} == set(FILES)


def test_names_that_have_to_be_quoted(client: ModelClient, hub: HubStandIn, tmp_path: Path) -> None:
    """Findings, row 31."""
    names = ("a b.json", "ü.json", "100%.json", "%41.json", "1+1.json", "a#b&c.json")
    files = {name: name.encode() for name in names}
    hub.add("org/quoted", files)
    client.ensure("org/quoted")
    client.fetch("org/quoted", tmp_path / "http")
    with ModelClient(client.address, files_port=0) as by_grpc:
        by_grpc.fetch("org/quoted", tmp_path / "grpc")
    for way in ("http", "grpc"):
        assert files_below(tmp_path / way) == digests_of(files)


@pytest.mark.parametrize("which", ["", "blobs"], ids=["repository", "blobs"])
def test_a_link_to_another_disk_is_named(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path, tmp_path: Path, which: str
) -> None:
    """The hub's library follows it; here it is said why not, and what to do instead (findings, row 34)."""
    commit, folder = hub.repositories[REPOSITORY].refs["main"], cache_folder / "models--org--tiny-1.0"
    for inner in ("refs", "blobs"):
        (folder / inner).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for path, data in FILES.items():
        blob = hashlib.sha256(data).hexdigest() if len(data) >= LARGE_BYTES else git_sha1(data)
        (folder / "blobs" / blob).write_bytes(data)
        name = folder / "snapshots" / commit / path
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(os.path.relpath(folder / "blobs" / blob, name.parent))
    place, elsewhere = folder / which, tmp_path / "another-disk"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    words = rf"{place} is a link to {elsewhere}, out of the cache folder.*--cache-dir.*MX_CACHE_UNUSABLE"
    with ModelClient(start_server(HF_HUB_OFFLINE="1").address) as client:
        with pytest.raises(ModelDownloadError, match=words):
            client.ensure(REPOSITORY)
        place.unlink()
        elsewhere.rename(place)
        client.ensure(REPOSITORY)
        assert files_below(snapshot(cache_folder, commit)) == FILE_DIGESTS


def test_a_server_writes_to_its_cache_folder_alone(
    start_server: StartServer, hub: HubStandIn, cache_folder: Path, tmp_path: Path
) -> None:
    """All else is read-only, as with readOnlyRootFilesystem (findings, row 38)."""
    cache_folder.mkdir()
    mounts = 'mount --make-rprivate /; mount --bind "$0" "$0"; mount -o remount,bind,ro /; exec "$@"'
    launcher = ("unshare", "--mount", "sh", "-ec", mounts, str(cache_folder))
    tried = subprocess.run([*launcher, "touch", str(tmp_path / "written")], capture_output=True, text=True, check=False)
    if "Read-only file system" not in tried.stderr:
        pytest.skip(f"no mounts of one's own here: {tried.stderr.strip()}")
    server = start_server(launcher=launcher)
    with ModelClient(server.address) as client:
        commit = client.ensure(REPOSITORY)
        client.fetch(REPOSITORY, tmp_path / "fetched")
    assert files_below(tmp_path / "fetched") == files_below(snapshot(cache_folder, commit)) == FILE_DIGESTS
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not [line for line in server.lines if "Traceback" in line or "Read-only" in line]


def test_hub_that_is_away_does_not_take_cached_models_along(start_server: StartServer, hub: HubStandIn) -> None:
    with ModelClient(start_server().address) as client:
        commit = client.ensure(REPOSITORY)
        hub.faults["api"] = [Fault(status=403) for _ in range(9)]
        assert client.ensure(REPOSITORY) == commit
        with pytest.raises(ModelDownloadError, match="403"):
            client.ensure("org/other")


def test_xet_is_left_aside_unless_it_is_asked_for(client: ModelClient, hub: HubStandIn, cache_folder: Path) -> None:
    """hf_xet is installed here."""
    hub.repositories[REPOSITORY].xet = True
    commit = client.ensure(REPOSITORY)
    assert hub.requests["xet"] == 0
    assert files_below(snapshot(cache_folder, commit)) == FILE_DIGESTS


def test_xet_that_fails_gives_way_to_http(start_server: StartServer, hub: HubStandIn, cache_folder: Path) -> None:
    hub.repositories[REPOSITORY].xet = True
    process = start_server(HF_HUB_DISABLE_XET="0")
    with ModelClient(process.address) as client:
        commit = client.ensure(REPOSITORY)
    process.wait_for("Xet failed")
    assert hub.requests["xet"] > 1
    assert files_below(snapshot(cache_folder, commit)) == FILE_DIGESTS


def test_names_that_make_no_sense(client: ModelClient) -> None:
    for name in ("", "a/b/c", "../x", "org/..", "a--b", "s3://", "s3://bucket/../x", "file://host/x", "gs://b\x00/x"):
        with pytest.raises(ServerRefused, match="INVALID_ARGUMENT"):
            client.ensure(name)
    with pytest.raises(ServerRefused, match="INVALID_ARGUMENT"):
        client.ensure(REPOSITORY, revision="a..b/../c")
    with pytest.raises(ServerRefused, match="no revisions"):
        client.ensure("s3://bucket/prefix", revision="main")
