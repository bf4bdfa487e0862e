"""What a server bears: `mx bench control`, `kills` and `drain`."""
