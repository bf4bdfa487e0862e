"""Tests of mxcore: transfer/move."""
