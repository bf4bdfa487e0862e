"""The parts of `mx bench storm`."""
