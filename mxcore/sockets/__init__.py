"""Chunks over TCP connections, compiled: gathered and sent by one side, scattered and hashed by the other."""
