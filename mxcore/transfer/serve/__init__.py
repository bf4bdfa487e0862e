"""Serving weights to other workers, under leases, complete or while they are still received."""
