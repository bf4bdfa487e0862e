"""Real vLLM engines on one GPU of a machine without a network: docs/notes/gpu-testing.md."""
