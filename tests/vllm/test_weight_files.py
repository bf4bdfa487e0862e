"""The files that we say the engine reads are those that vLLM's own default loader takes of the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mxcore.engine import find_checkpoint

LAYOUTS = [
    ["model.safetensors", "pytorch_model.bin"],
    ["pytorch_model.bin", "training_args.bin", "x.pt"],
    ["x.pt", "optimizer.pt"],
    ["a.safetensors", "b.safetensors", "consolidated.safetensors"],
    ["a.safetensors", "b.safetensors", "._a.safetensors", "stray.safetensors"],
    ["consolidated-1.safetensors", "consolidated-2.safetensors", "model.safetensors"],
    ["A.SAFETENSORS", "x.bin"],
]
ASK = """
import json, sys
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
loader = DefaultModelLoader(LoadConfig())
taken = [loader._prepare_weights(folder, None, None, True, None)[1] for folder in sys.argv[1:]]
print(json.dumps([sorted(files) for files in taken]))
"""


def test_the_files_are_what_vllms_loader_takes(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(LAYOUTS))]
    for folder, names in zip(folders, LAYOUTS, strict=True):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        if "b.safetensors" in names:
            text = json.dumps({"weight_map": {"t": "a.safetensors", "u": "b.safetensors"}})
            (folder / "model.safetensors.index.json").write_text(text)
    answer = subprocess.run(
        [sys.executable, "-c", ASK, *map(str, folders)], stdout=subprocess.PIPE, text=True, check=True
    )
    theirs = json.loads(answer.stdout.splitlines()[-1])
    for folder, taken in zip(folders, theirs, strict=True):
        assert [str(file) for file in find_checkpoint(str(folder)).weight_files] == taken
