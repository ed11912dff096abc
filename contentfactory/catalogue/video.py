"""Known video models."""
