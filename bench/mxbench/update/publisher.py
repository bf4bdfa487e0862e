"""A trainer, and one that takes what it publishes into bare memory: `python -m mxbench.update.publisher`.

Commands come as JSON lines, answers as JSON lines: {"publish": version, "folder": …}, {"fetch": version}, which answers
with the seconds of the receive. What was published before ends with the next.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAME = "bench/update"


def main() -> None:
    """Until stdin ends."""
    from safetensors.torch import load_file

    from mxcore import Published, fetch, publish

    published: Published | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if "publish" in command:
            tensors = {
                name: tensor
                for file in sorted(Path(command["folder"]).glob("*.safetensors"))
                for name, tensor in load_file(file).items()
            }
            before, published = published, publish(NAME, tensors, command["publish"])
            if before is not None:
                before.close()
            answer: dict[str, object] = {"uri": published.uri, "bytes": published.total_bytes}
        else:
            report = fetch(NAME, command["fetch"], wait_seconds=60).report
            answer = {"seconds": report.seconds, "bytes": report.bytes, "transport": report.transport}
        print(json.dumps(answer), flush=True)
    if published is not None:
        published.close()


if __name__ == "__main__":
    main()
