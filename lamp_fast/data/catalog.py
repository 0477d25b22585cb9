"""What is known of each named data set: where its files lie and how its classes are prompted."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitFileLayout:
    """A data set in CoOp's layout: pictures and a ``split_zhou_*.json`` in one folder.

    Attributes:
        folder: of the data set, below the root.
        images: what the paths of the split file start from, below ``folder``.
        split_file: below ``folder``.
        template: of the paper's Table 8.
    """

    folder: str
    images: str
    split_file: str
    template: str


SPLIT_FILE_DATA = {
    "caltech101": SplitFileLayout(
        folder="caltech-101",
        images="101_ObjectCategories",
        split_file="split_zhou_Caltech101.json",
        template="a photo of a {}.",
    ),
}
