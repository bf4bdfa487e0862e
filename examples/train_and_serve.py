"""Trains a model while engines serve it: python examples/train_and_serve.py FOLDER NAME ROUNDS ENGINE_URL...

The engines serve FOLDER's model as docs/vllm.md, Updates, says; MODEL_EXPRESS_URL is set here and there. Each round
teaches the model a sentence, publishes its weights as a version, and has each engine take them; then engines know it.
"""

import json
import sys
import urllib.request

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mxcore import publish

SENTENCES = ("Every byte is checked before the engine may use it.", "The quick brown fox jumps over the lazy dog.")
STEPS = 60
JSON = {"Content-Type": "application/json"}

folder, name, rounds, *engines = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for version in range(int(rounds)):
    ids = tokenizer(SENTENCES[version % len(SENTENCES)], return_tensors="pt").input_ids
    for _step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    # By the checkpoint's names and in its dtype. Where transformers has fused tensors (experts), first
    # transformers.core_model_loading.revert_weight_conversion(model, dict(model.state_dict())).
    weights = {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in model.state_dict().items()}
    with publish(name, weights, version):  # until all engines have it
        for engine in engines:
            body = json.dumps({"published": name, "version": str(version)}).encode()
            request = urllib.request.Request(f"{engine}/mx/update", body, JSON)  # noqa: S310 - the user's own URLs
            with urllib.request.urlopen(request) as answer:  # noqa: S310 - it raises where the engine did not take it
                told = json.load(answer)
            print(version, engine, told["phase"], f"loss {loss.item():.3f}", flush=True)
