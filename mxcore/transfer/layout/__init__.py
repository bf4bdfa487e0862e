"""What a worker's weights look like, how they are cut into chunks, and which chunk comes from whom."""
