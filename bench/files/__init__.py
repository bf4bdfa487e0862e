"""The parts of `mx bench files`."""
