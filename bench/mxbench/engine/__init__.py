"""What a real vLLM takes to load: `mx bench vllm`."""
