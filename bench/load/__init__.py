"""What `mx bench load` is made of."""
