"""One end of perftest's ib_write_bw. Started with a JSON object: `role` take or give, `port`, `seconds`, `address`.

It says `waiting` (take) as soon as ib_write_bw is started, `moved` with GB/s when it has ended, or `missing`. It ends
with its input.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

from mxcore.transfer.route import usable_ports

PROGRAM = "ib_write_bw"
_ROW = re.compile(r"^\s*\d+\s+\d+\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s*$", re.MULTILINE)


def say(**values: Any) -> None:
    """One line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def rate_of(output: str) -> float:
    """GB/s (10^9 bytes a second) in what ib_write_bw --report_gbits prints. Raises ValueError without a rate."""
    rows = _ROW.findall(output)
    if not rows:
        raise ValueError(f"{PROGRAM} printed no rate: {output.strip()[-300:]}")
    return float(rows[-1]) / 8


def main() -> None:
    """One end."""
    task = json.loads(sys.argv[1])
    ports = usable_ports()
    if shutil.which(PROGRAM) is None or not ports:
        say(event="missing", why="no RDMA port can be used" if not ports else f"{PROGRAM} (perftest) is not installed")
        return
    device, _, number = ports[0].partition(":")
    flags = ["-d", device, "-i", number or "1", "-p", str(task["port"]), "-D", str(int(task["seconds"]) or 1)]
    command = [PROGRAM, *flags, "--report_gbits", "-F", *([task["address"]] if task["role"] == "give" else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def follow_input() -> None:
        sys.stdin.read()
        process.kill()

    threading.Thread(target=follow_input, daemon=True).start()
    if task["role"] == "take":
        say(event="waiting")
    output, _ = process.communicate()
    try:
        say(event="moved", gbps=rate_of(output))
    except ValueError as error:
        say(event="missing", why=str(error))


if __name__ == "__main__":
    main()
