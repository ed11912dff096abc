"""How foreign model files are found, verified, loaded and run."""
