"""Tests of mxcore: digest."""
