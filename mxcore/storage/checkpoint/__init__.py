"""What a checkpoint holds: its files, tensors, dtypes and digest."""
