"""Tests of mxcore: transfer/layout."""
