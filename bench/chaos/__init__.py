"""The parts of `mx bench chaos`."""
