"""Receiving weights from several holders at once, and what is told of it."""
