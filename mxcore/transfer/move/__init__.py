"""Moving chunks between two workers: by NIXL, over TCP, within a host; calls to a source."""
