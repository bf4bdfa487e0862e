"""`mxserver` for a bench: says `listening` with its address, and ends with its input. Started with a JSON object."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading

_LISTENING = re.compile(r"listening on (\S+)")


def main() -> None:
    """`host` of the task is where it listens; its port is free, its state in memory."""
    task = json.loads(sys.argv[1])
    flags = ["--host", task["host"], "--port", "0", "--store", "memory", "--metrics-port", "0", "--files-port", "0"]
    names = {name: value for name, value in os.environ.items() if not name.startswith(("MX_", "MODEL_EXPRESS"))}
    server = subprocess.Popen([sys.executable, "-m", "mxserver", *flags], stderr=subprocess.PIPE, text=True, env=names)
    assert server.stderr is not None
    log = server.stderr

    def read() -> None:
        for line in log:
            sys.stderr.write(line)
            if found := _LISTENING.search(line):
                sys.stdout.write(json.dumps({"event": "listening", "address": found[1]}) + "\n")
                sys.stdout.flush()

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        sys.stdin.read()
    finally:
        server.kill()
        server.wait()
        reading.join()


if __name__ == "__main__":
    main()
