"""The gRPC services of the server: thin over the store."""
