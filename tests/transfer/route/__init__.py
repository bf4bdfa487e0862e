"""Tests of mxcore: transfer/route."""
