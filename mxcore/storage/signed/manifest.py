"""What a signature promises of a model's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from mxcore.errors import SignatureInvalid

__all__ = ["Hasher", "Promise", "SignedManifest", "hasher_of"]

_SHARDED = re.compile(r"-sharded-\d+$")
_OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # what the library leaves out of every signature


class Hasher(Protocol):
    """As those of hashlib."""

    def update(self, data: Any, /) -> object: ...
    def hexdigest(self) -> str: ...


class Promise(NamedTuple):
    """The digest of a file's bytes from `begin` to before `end`; `end` None: to the file's end."""

    begin: int
    end: int | None
    algorithm: str
    digest: str  # lower hex


@dataclass(frozen=True)
class SignedManifest:
    """The files that a trusted signature names, by their paths below the model's folder, with "/". Immutable.

    `ignored` are paths of files and folders that the signer left out. `signature` says where the signature was.
    """

    files: Mapping[str, tuple[Promise, ...]]
    ignored: frozenset[str] = frozenset()
    signature: str = field(default="", compare=False)

    @classmethod
    def of(
        cls, resources: Iterable[tuple[str, str, str]], *, sharded: bool, ignored: Iterable[str], signature: str
    ) -> SignedManifest:
        """Of the resources (name, algorithm, lower hex) as they were signed; the name of a shard is path:begin:end.

        Raises SignatureInvalid for what is no such resource.
        """
        files: dict[str, list[Promise]] = {}
        for name, algorithm, digest in resources:
            begin, end = 0, None
            if sharded:
                name, _, stretch = name.partition(":")
                begin, end = (int(place) for place in stretch.split(":"))
            known = files.setdefault(name, [])
            if begin != (known[-1].end if known else 0):
                raise SignatureInvalid(
                    f"{signature}: the shards of {name} do not follow each other: sign the model again"
                )
            hasher_of(algorithm, signature)
            known.append(Promise(begin, end, algorithm, digest.lower()))
        return cls({name: tuple(promises) for name, promises in files.items()}, frozenset(ignored), signature)

    @cached_property
    def digest(self) -> str:
        """What tells the promises apart, whoever signed them: lower hex of the SHA-256 of their canonical JSON."""
        promises = [[name, *promise] for name in sorted(self.files) for promise in self.files[name]]
        text = json.dumps(promises, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def leaves_out(self, name: str) -> bool:
        """Whether a file is none that a signature has to name."""
        return any(name == path or name.startswith(f"{path}/") for path in (*_OF_GIT, *self.ignored))


def hasher_of(algorithm: str, signature: str) -> Callable[[], Hasher]:
    """What makes digests of that name. Raises SignatureInvalid for an unknown one."""
    name = _SHARDED.sub("", algorithm)
    if name == "sha256":
        return hashlib.sha256
    if name in ("blake2", "blake2b"):
        return hashlib.blake2b
    if name == "blake3":
        made: Callable[[], Hasher] = import_module("blake3").blake3  # the library's, as the signature is
        return made
    raise SignatureInvalid(
        f"{signature}: digests by {algorithm!r} are unknown here: sign with sha256, blake2 or blake3"
    )
