"""docs/reference/settings.md is what the code says."""

from __future__ import annotations

import subprocess
import sys

from mxcore.settings import WorkerSettings
from mxserver.settings import ServerSettings
from mxserver.wire import VARIABLES
from tests.server.conftest import ROOT

PRINT = (
    "import sys; sys.path.insert(0, 'tools'); import make_settings_doc; sys.stdout.write(make_settings_doc.render())"
)


def test_page_is_what_the_generator_makes() -> None:
    run = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, cwd=ROOT)
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert page == run.stdout, "run: python tools/make_settings_doc.py"


def test_page_has_every_setting_and_no_path_of_this_machine() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    for settings in (ServerSettings, WorkerSettings):
        assert all(f"| `{field.alias}` |" in page for field in settings.model_fields.values())
    assert all(f"| `{variable.name}` |" in page for variable in VARIABLES if variable.reader in ("worker", "both"))
    assert str(ROOT) not in page
