"""The pictures of what was measured; each takes numbers and gives a figure."""
