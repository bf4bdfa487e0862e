"""Tests of mxcore: transfer/serve."""
