"""Tests of mxcore: process."""
