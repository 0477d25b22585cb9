"""LAMP: long-tailed multimodal prompt tuning for CLIP, correct and fast."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lamp_fast")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"
