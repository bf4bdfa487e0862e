"""This process' C environment, and the memory of other processes on this host."""
