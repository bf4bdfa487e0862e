"""`mx models` in this process, and the JSON that it prints."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from mxcore.cli.models import models


def mx(server: str, *arguments: str) -> Result:
    return CliRunner().invoke(models, ["--server", server, *arguments])


def data(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found
