"""Runners of text kinds."""
