"""The agent over stdin and stdout: what ssh starts."""

from __future__ import annotations

from mxbench.hosts.agent import main

main()
