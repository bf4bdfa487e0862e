"""Tests of mxcore: transfer/receive."""
