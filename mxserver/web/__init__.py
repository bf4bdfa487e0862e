"""The HTTP side of the server: probes, metrics, and the status page."""
