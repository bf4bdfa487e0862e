"""The parts of `mx bench control`."""
