"""Tests of mxcore: transfer/member."""
