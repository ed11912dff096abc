"""Runners of training kinds."""
