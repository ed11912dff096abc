"""Runners of image kinds."""
