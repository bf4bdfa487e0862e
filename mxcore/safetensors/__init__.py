"""The safetensors header: a strict parser, compiled, and one error class for each rule."""
