"""The candidates of `mx bench object`."""
