"""Fuzzing of what reads files of others."""
