"""`python -m mxserver` is `mxserver`."""

from __future__ import annotations

from mxserver.cli import main

if __name__ == "__main__":
    main()
