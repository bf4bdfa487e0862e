"""Tests of mxcore: memory."""
