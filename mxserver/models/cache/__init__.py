"""The folder of cached models: what is in it, what goes first, who downloads."""
