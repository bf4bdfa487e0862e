"""Tensors from other workers: layouts, chunks, NIXL sessions, holders, receivers, membership in a fleet."""
