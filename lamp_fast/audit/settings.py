"""What an audit looks for."""

from dataclasses import dataclass
from typing import Annotated

from lamp_fast.fields import Bounds


@dataclass(frozen=True)
class AuditConfig:
    """What --audit looks for."""

    folds: Annotated[int, Bounds(2, 100)] = 5
    """A probe that judges a picture's label has learned from the other folds alone; labels of
    classes with fewer pictures are not judged."""
    twin_cosine: Annotated[float, Bounds(above=0, below=1)] = 0.99
    """Pictures whose features have at least this cosine are taken for copies of one another."""
    neighbours: Annotated[int, Bounds(1, 1000)] = 5
    """A picture's distance from all others is that to this nearest one of them."""
    outlier_score: Annotated[float, Bounds(above=0, high=1_000_000)] = 5.0
    """Pictures are outliers whose distance is so many robust standard deviations above the median;
    the field's usual 3.5 is for symmetric distances, which these are not."""
    shown: Annotated[int, Bounds(0, 2_000)] = 60
    """Most pictures that the page shows of each kind; the CSV has all."""
