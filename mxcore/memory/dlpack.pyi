"""Memory of ours as a DLPack capsule of bytes, for the compiled modules that own memory; nothing for Python."""
