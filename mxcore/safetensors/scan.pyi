DTYPE_BITS: dict[str, int]
"""Bits an element of each dtype of safetensors 0.8, by its code."""
