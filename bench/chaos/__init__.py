"""What `mx bench chaos` is made of."""
