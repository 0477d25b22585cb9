"""A run: its settings, its parts, the training loop, its folder, its scores and pictures."""
