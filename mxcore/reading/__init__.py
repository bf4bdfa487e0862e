"""Reading files, compiled: to host memory by pread, O_DIRECT, io_uring or mmap, to a device by a pinned ring or cuFile."""
