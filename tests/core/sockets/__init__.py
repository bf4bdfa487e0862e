"""Tests of mxcore: sockets."""
