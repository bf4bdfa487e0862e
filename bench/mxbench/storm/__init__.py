"""`mx bench storm` and its parts."""
