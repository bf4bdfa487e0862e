"""Real vLLM engines on one GPU of a machine without a network: docs/gpu-testing.md."""
