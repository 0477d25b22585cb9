"""A trained run as one graph, for programs that have none of this package."""
