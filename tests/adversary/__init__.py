"""Hostile clients and failing machines against a real server: `make test-adversary`, apart from `make test`."""
