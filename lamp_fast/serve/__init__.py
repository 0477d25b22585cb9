"""A run behind HTTP: pictures are posted, answers come as ``predict --json`` writes them."""
