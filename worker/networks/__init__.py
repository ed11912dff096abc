"""Networks in pure PyTorch, usable in a notebook."""
