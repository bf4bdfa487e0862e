"""The parts of `mx bench load`."""
