"""Records in Redis, for several replicas of the server."""
