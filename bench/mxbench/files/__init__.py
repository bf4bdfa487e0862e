"""`mx bench files` and its parts."""
