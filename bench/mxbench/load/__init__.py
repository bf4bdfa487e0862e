"""`mx bench load` and its parts."""
