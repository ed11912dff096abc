"""Runners of audio kinds."""
