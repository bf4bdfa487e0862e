"""The `mx` command. Each subcommand lives in a module of its own and is imported when it is called, so that
`mx --help` stays fast."""

from __future__ import annotations
