"""`mx bench gpu` and its parts."""
