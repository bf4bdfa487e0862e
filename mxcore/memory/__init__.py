"""Host memory: aligned and pinned buffers, their DLPack export, sorted and merged address ranges."""
