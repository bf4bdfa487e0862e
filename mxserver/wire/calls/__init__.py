"""Calls to a server: channels, credentials, the client of workers, source ids."""
