"""What all gRPC calls share: the wrapper of method handlers, and the way to refuse a call."""
