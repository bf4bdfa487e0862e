"""`mx bench object` and its parts."""
