"""Who may do what: roles, tokens, limits. docs/explanation/threat-model.md names the boundaries."""

from __future__ import annotations

from mxserver.security import setup
from mxserver.security.interceptors import Authenticator
from mxserver.security.roles import (
    AccessError,
    AccessUnknown,
    Role,
    Unauthenticated,
    bearer_token,
    current_owner,
    require_role,
)

__all__ = [
    "AccessError",
    "AccessUnknown",
    "Authenticator",
    "Role",
    "Unauthenticated",
    "bearer_token",
    "current_owner",
    "require_role",
    "setup",
]
