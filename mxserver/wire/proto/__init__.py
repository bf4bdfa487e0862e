"""The protocol: .proto files, the stubs made of them by `make stubs`, and their descriptor pool."""
