"""Reading checkpoints: real files, real reads, safetensors as the oracle."""
