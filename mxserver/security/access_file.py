"""The file that says which tokens and which Kubernetes subjects have which role.

TOML, such as::

    [[tokens]]
    name = "prefill-fleet"      # records that are published with this token belong to this name
    role = "publish"            # read, publish or admin
    sha256 = "…"                # of the token: printf %s "$TOKEN" | sha256sum

    [[subjects]]                # with --auth kubernetes
    name = "system:serviceaccount:models:*"
    role = "publish"

Only hashes are kept, here and in memory. Tokens must be long and random (openssl rand -hex 32), because the hash of a
short token can be guessed. The file is read again when it has changed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxserver.config_file import read_toml
from mxserver.security.roles import Caller, Role, Unauthenticated
from mxserver.wire import SettingError, unknown_key

_LOG = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROLES = {role.name.lower(): role for role in Role}


@dataclass(frozen=True)
class _Entry:
    name: str
    role: Role
    digest: bytes = b""


@dataclass(frozen=True)
class AccessRules:
    """One reading of the file."""

    tokens: tuple[_Entry, ...]
    subjects: tuple[_Entry, ...]


def read_rules(path: Path) -> AccessRules:
    """Raises SettingError, which names the file, the entry and the rule."""
    content = read_toml(path, "access file", "give one with --auth-file")
    for key in content:
        if key not in ("tokens", "subjects"):
            raise SettingError(f"access file {path}: {unknown_key(key, ('tokens', 'subjects'))}")
    rules = AccessRules(
        tuple(_entry(path, "tokens", n, entry) for n, entry in enumerate(_list(path, content, "tokens"), 1)),
        tuple(_entry(path, "subjects", n, entry) for n, entry in enumerate(_list(path, content, "subjects"), 1)),
    )
    digests = [entry.digest for entry in rules.tokens]
    if len(set(digests)) != len(digests):
        raise SettingError(f"access file {path}: two tokens are the same; each needs one of its own")
    return rules


def _list(path: Path, content: dict[str, Any], key: str) -> list[Any]:
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise SettingError(f"access file {path}: {key} must be written as [[{key}]], once for each")
    return entries


def _entry(path: Path, kind: str, number: int, entry: Any) -> _Entry:
    where = f"access file {path}, [[{kind}]] number {number}"
    keys = ("name", "role", "sha256") if kind == "tokens" else ("name", "role")
    if not isinstance(entry, dict):
        raise SettingError(f"{where}: must have {', '.join(keys)}")
    for key in entry:
        if key not in keys:
            raise SettingError(f"{where}: {unknown_key(key, keys)}")
    name, role = entry.get("name"), entry.get("role")
    if not isinstance(name, str) or not name:
        raise SettingError(f"{where}: name must be a text")
    if role not in _ROLES:
        raise SettingError(f"{where} ({name}): role {role!r} must be read, publish or admin")
    if kind == "subjects":
        return _Entry(name, _ROLES[role])
    digest = str(entry.get("sha256", "")).lower()
    if not _SHA256.fullmatch(digest):
        raise SettingError(f"{where} ({name}): sha256 must be the 64 hexadecimal digits of the token's SHA-256")
    return _Entry(name, _ROLES[role], bytes.fromhex(digest))


def _fits(pattern: str, name: str) -> bool:
    """Whether a name is the pattern, in which `*` stands for anything and nothing else for something."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.DOTALL) is not None


class AccessFile:
    """The rules of a file as it is now. Thread-safe. If the file becomes unusable, the last rules stay in force."""

    def __init__(self, path: Path) -> None:
        """Raises SettingError."""
        self._path = path
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._rules = read_rules(path)
        self._looked_at = time.monotonic()

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def rules(self) -> AccessRules:
        """The rules in force. The file is checked at most once a second."""
        with self._lock:
            if time.monotonic() - self._looked_at < LOOK_SECONDS:
                return self._rules
            self._looked_at = time.monotonic()
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._rules = read_rules(self._path)
                    _LOG.info("access rules of %s are in force", self._path)
                except SettingError as error:
                    _LOG.error("the old access rules stay in force reason=%s", error)
            return self._rules

    def authenticate(self, token: bytes) -> Caller:
        """Whose token this is. Raises Unauthenticated. Takes as long for a wrong token as for a right one."""
        digest = hashlib.sha256(token).digest()
        found = None
        for entry in self.rules().tokens:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        if found is None:
            raise Unauthenticated("the token is not known")
        return Caller(found.name, found.role)

    def require_plausible(self, token: bytes) -> None:
        """Raises Unauthenticated for an unknown token, where that can be told without a look at the file."""
        with self._lock:
            looks_next = time.monotonic() - self._looked_at >= LOOK_SECONDS
        if not looks_next:
            self.authenticate(token)

    def role_of_subject(self, name: str) -> Role | None:
        """The first rule's role whose pattern fits; `*` stands for anything."""
        return next((rule.role for rule in self.rules().subjects if _fits(rule.name, name)), None)
