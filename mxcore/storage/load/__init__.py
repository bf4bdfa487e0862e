"""Tensors of a checkpoint into host or device memory, whole or as a stream."""
