"""Reading files, compiled: to host memory (pread, O_DIRECT, io_uring, mmap), to devices (pinned ring, cuFile)."""
