"""Checkpoints that lie elsewhere: object stores, the server's model cache, the hub's cache."""
