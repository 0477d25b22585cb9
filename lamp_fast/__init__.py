"""LAMP: long-tailed multimodal prompt tuning for CLIP, correct and fast."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamp_fast.classifier import Classifier, Prediction
    from lamp_fast.errors import InputError

try:
    __version__ = version("lamp_fast")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Classifier", "InputError", "Prediction", "__version__"]

_HOME = {
    "Classifier": "lamp_fast.classifier",
    "InputError": "lamp_fast.errors",
    "Prediction": "lamp_fast.classifier",
}


def __getattr__(name: str) -> Any:
    """Public names on first use, so that importing the package alone takes no time."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
