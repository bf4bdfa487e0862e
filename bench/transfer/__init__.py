"""What `mx bench transfer` is made of."""
