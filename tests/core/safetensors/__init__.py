"""Tests of mxcore: safetensors."""
