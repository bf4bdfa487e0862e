"""What `mx bench update` measures: running engines that take other weights."""
