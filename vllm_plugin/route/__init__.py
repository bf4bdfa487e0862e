"""The HTTP route of updates in vLLM's API server, and the readiness beside it. Imports nothing of vLLM."""
