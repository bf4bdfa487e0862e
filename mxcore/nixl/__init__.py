"""NIXL through its C library, opened at run time: agents, registrations, transfers, notifications."""
