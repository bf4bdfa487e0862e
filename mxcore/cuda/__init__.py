"""CUDA through its driver, opened at first use: contexts, streams, memory, IPC handles, digests on the device."""
