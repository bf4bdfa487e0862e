"""Which service accounts of Kubernetes have which role: by the access file, by a list of those allowed, or by both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from mxserver.security.access_file import AccessFile
from mxserver.security.roles import Role, Unauthenticated
from mxserver.wire import SettingError

_PREFIX = "system:serviceaccount:"


class Subjects(Protocol):
    """Says what somebody may do whom Kubernetes knows."""

    def role_of(self, username: str) -> Role:
        """The role of `system:serviceaccount:namespace:name`, or of a user. Raises Unauthenticated."""


class FileSubjects:
    """Those of the access file's [[subjects]]. Thread-safe."""

    def __init__(self, access: AccessFile) -> None:
        self._access = access

    def role_of(self, username: str) -> Role:
        role = self._access.role_of_subject(username)
        if role is None:
            raise Unauthenticated(f"{username} has no role; add it to the [[subjects]] of the access file")
        return role


class AllowedAccounts:
    """Those of a list and nobody else; they publish, as workers do, unless the access file gives roles. Thread-safe."""

    def __init__(self, accounts: Iterable[str], roles: FileSubjects | None = None) -> None:
        """`accounts`: namespace:name of each."""
        self._usernames = frozenset(_PREFIX + account for account in accounts)
        self._roles = roles

    def role_of(self, username: str) -> Role:
        if username not in self._usernames:
            raise Unauthenticated(
                f"{username} is not among the allowed accounts; add it to "
                "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS (--auth-accounts) of the server"
            )
        return self._roles.role_of(username) if self._roles is not None else Role.PUBLISH


def subjects(accounts: tuple[str, ...], access: AccessFile | None) -> Subjects:
    """By whichever of the two there is. Raises SettingError where there is neither, which would let nobody in."""
    roles = FileSubjects(access) if access is not None else None
    if accounts:
        return AllowedAccounts(accounts, roles)
    if roles is None:
        raise SettingError("--auth kubernetes needs --auth-file or --auth-accounts")
    return roles
