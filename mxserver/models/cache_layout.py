"""The layout of the cache folder.

::

    CACHE/
      models--ORG--NAME/           the Hugging Face Hub's own layout, so that HF_HUB_OFFLINE=1 finds the models
        blobs/HASH
        refs/main                  the commit that `main` stands for
        snapshots/COMMIT/PATH      a link to ../../blobs/HASH
      .modelexpress/
        objects/MODEL/REVISION/PATH    models of S3, GCS, Azure and local folders
        refs/MODEL/NAME                as the hub's refs, for those
        records/KEY.json               what is complete: nothing else makes a model visible
        pins/KEY
        leases/ uses/ folder-id        see lease.py
        staging/KEY.TOKEN/             what is being downloaded, or deleted
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mxserver.models.errors import CacheUnusable, UnsafePath
from mxserver.models.names import ModelKey, ModelName
from mxserver.models.record import write_in_one_step
from mxserver.wire import path_problem, unique_beside
from mxserver.wire.proto import model_pb2

STATE = ".modelexpress"


class CacheLayout:
    """Paths in one cache folder, all absolute. Stateless."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.state = self.root / STATE
        self.records = self.state / "records"
        self.pins = self.state / "pins"
        self.staging = self.state / "staging"

    def make(self) -> None:
        """Makes the folders. Raises OSError."""
        for folder in (self.records, self.pins, self.staging):
            folder.mkdir(parents=True, exist_ok=True)

    def record(self, key: ModelKey) -> Path:
        return self.records / f"{key.id}.json"

    def pin(self, key: ModelKey) -> Path:
        return self.pins / key.id

    def model_folder(self, model: ModelName) -> Path:
        if model.provider == model_pb2.HUGGING_FACE:
            return self.root / f"models--{model.name.replace('/', '--')}"
        return self.state / "objects" / model_id(model)

    def require_inside(self, model: ModelName) -> None:
        """Raises CacheUnusable where the model's folders lead out of the cache folder: nothing would be read there."""
        folder = self.model_folder(model)
        for place in (folder, folder / "blobs", folder / "snapshots"):
            real = os.path.realpath(place)
            if not Path(real).is_relative_to(self.root):
                raise CacheUnusable(
                    f"{place} is a link to {real}, out of the cache folder, and such links are not followed: mount "
                    "what is there in its place (mount --bind), or name the folder that it belongs to by --cache-dir"
                )

    def relative(self, path: Path) -> str:
        """A path of this layout, relative to the root."""
        return str(path.relative_to(self.root))

    def snapshot(self, key: ModelKey) -> Path:
        """The folder in which the files have their names."""
        if key.model.provider == model_pb2.HUGGING_FACE:
            return self.model_folder(key.model) / "snapshots" / key.revision
        return self.model_folder(key.model) / key.revision

    def place(self, key: ModelKey, path: str, blob: str) -> str:
        """Where a file's bytes lie, relative to the root."""
        if key.model.provider == model_pb2.HUGGING_FACE:
            return str((self.model_folder(key.model) / "blobs" / blob).relative_to(self.root))
        return str((self.snapshot(key) / path).relative_to(self.root))

    def _ref(self, model: ModelName, ref: str) -> Path:
        if model.provider == model_pb2.HUGGING_FACE:
            return self.model_folder(model) / "refs" / ref
        return self.state / "refs" / model_id(model) / (ref or "latest")

    def read_ref(self, model: ModelName, ref: str) -> str | None:
        """The revision that a name stands for; None when it was never resolved."""
        try:
            return self._ref(model, ref).read_text().strip() or None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def write_ref(self, model: ModelName, ref: str, revision: str, scratch: Path) -> None:
        path = self._ref(model, ref)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_in_one_step(path, revision, scratch)

    def refs_to(self, model: ModelName, revision: str) -> list[Path]:
        """The files of all names that stand for a revision."""
        folder = self._ref(model, "any").parent
        return [path for path in folder.rglob("*") if path.is_file() and path.read_text().strip() == revision]

    def link(self, key: ModelKey, path: str, place: str, scratch: Path) -> None:
        """Makes the file's name in the hub's layout, once its bytes are in place."""
        name = self.snapshot(key) / path
        name.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.root / place, name.parent)
        if name.is_symlink() and str(name.readlink()) == target:
            return
        made = unique_beside(scratch / "link")
        made.symlink_to(target)
        made.replace(name)


def model_id(model: ModelName) -> str:
    """A file name for a model: 32 hex digits."""
    return hashlib.sha256(f"{model.provider_name}\n{model.name}".encode()).hexdigest()[:32]


def check_paths(model: ModelName, paths: list[str]) -> None:
    """Refuses a list of file names that cannot all be files of one folder.

    Raises:
        UnsafePath: names the first one and what is wrong with it.
    """
    names = set(paths)
    for path in paths:
        problem = path_problem(path)
        parents = (path[:at] for at, char in enumerate(path) if char == "/")
        if problem is None and (parent := next((parent for parent in parents if parent in names), None)):
            problem = f"{parent[:100]!r} is a file too"
        if problem:
            raise UnsafePath(f"{model.name} has a file {path[:200]!r}, which is refused: {problem}")
    if len(names) != len(paths):
        raise UnsafePath(f"{model.name} lists a file twice")
