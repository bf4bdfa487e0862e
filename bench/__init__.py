"""What `mx bench` and `make demo` run: real processes, real sockets; figures as JSON with --json."""
