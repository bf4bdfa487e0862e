"""NIXL's C library, opened once at the first use."""

def load_library() -> str:
    """Opens it; returns its path. Thread-safe. Raises NixlMissing with all places that were tried."""

def notifies() -> bool:
    """Whether it can tell a peer a number with a transfer. Raises as `load_library`."""
