"""`mx rollout`: another version of a model for running engines, some at a time."""
