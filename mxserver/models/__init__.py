"""The model cache: downloads, files, eviction. The gRPC side is mxserver.services.model."""
