"""The parts of `mx bench transfer`."""
