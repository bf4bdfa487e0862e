"""`mx bench chaos` and its parts."""
