"""Trains a small model while vLLM serves it: python examples/train_and_serve.py, with MODEL_EXPRESS_URL set.

The running engine takes each version that the trainer publishes, and then answers as the trainer's own model does.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

from mxcore import publish

PROMPT, WANTED = [1, 2, 3], [17, 4, 30, 8, 9, 11]
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def serve(folder: str) -> LLM:
    return LLM(
        folder,
        load_format="mx",
        weight_transfer_config={"backend": "mx"},
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        kv_cache_memory_bytes=1 << 24,
    )


def update(engine: LLM, uri: str) -> None:
    """What `POST /mx/update` does in a server; here nothing is asked meanwhile."""
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", kwargs={"update_info": {"uri": uri}})
    engine.collective_rpc("finish_weight_update")
    engine.reset_prefix_cache()  # what was computed with the weights before


def engines_answer(engine: LLM) -> list[int]:
    sampling = SamplingParams(temperature=0, max_tokens=len(WANTED), ignore_eos=True, detokenize=False)
    return list(engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)[0].outputs[0].token_ids)


def own_answer(model: LlamaForCausalLM) -> list[int]:
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in WANTED:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.tensor([PROMPT + WANTED])
    labels = torch.tensor([[-100] * len(PROMPT) + WANTED])
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).float()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = serve(folder)
        print(f"before training: {engines_answer(engine)}", flush=True)
        learning = [*model.model.layers[-1].parameters(), *model.lm_head.parameters()]  # the rest stays as it is
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
        for version in (1, 2, 3):
            train(model, optimizer, steps=30)
            with publish("policy", model, version) as published:
                update(engine, published.uri)
                sent = f"{published.bytes_given} of {published.total_bytes} bytes"
            print(f"version {version}, {sent}: {engines_answer(engine)}, own {own_answer(model)}", flush=True)


if __name__ == "__main__":
    main()
