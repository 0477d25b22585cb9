"""How the tiny CLIP that the package carries was made."""
