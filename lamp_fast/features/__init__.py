"""CLIP's features of pictures, for other programs."""
