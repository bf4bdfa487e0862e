"""Fleets of real processes on one machine, and a simulator of large ones."""
