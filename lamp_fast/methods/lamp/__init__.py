"""LAMP: the paper's method."""
