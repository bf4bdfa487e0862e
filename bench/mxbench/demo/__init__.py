"""`make demo`: a vLLM worker takes its weights from another vLLM worker, and answers exactly as vLLM's own loader."""
