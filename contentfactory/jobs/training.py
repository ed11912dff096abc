"""Kinds of training jobs."""
