"""`mx bench transfer` and its parts."""
