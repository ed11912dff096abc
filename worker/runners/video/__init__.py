"""Runners of video kinds."""
