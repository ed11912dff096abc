"""Known image models."""
