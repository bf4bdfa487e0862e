"""Candidates of `mx bench object`."""
