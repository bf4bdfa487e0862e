"""What `mx bench gpu` runs."""
