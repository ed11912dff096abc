"""Measures inference options of a model on this machine: what ``factory tune`` runs."""
