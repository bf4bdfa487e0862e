"""The protocol: .proto files, the stubs made of them by `make stubs`, and their descriptor pool.

Stubs are imported as modules, each when it is needed: `from mxserver.wire.proto import p2p_pb2`.
"""

__all__ = [
    "api_pb2",
    "api_pb2_grpc",
    "cache_pb2",
    "cache_pb2_grpc",
    "health_pb2",
    "health_pb2_grpc",
    "load_pb2",
    "model_pb2",
    "model_pb2_grpc",
    "mx_pb2",
    "mx_pb2_grpc",
    "p2p_pb2",
    "p2p_pb2_grpc",
    "record_pb2",
    "watch_pb2",
    "watch_pb2_grpc",
]
