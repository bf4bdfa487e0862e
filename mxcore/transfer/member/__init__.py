"""A worker's life in a fleet: join, find sources, receive, serve, drain."""
