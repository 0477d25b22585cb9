"""What an entry of the catalog of data sets says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SPLIT_PARTS = ("train", "val", "test")
# A user's own pictures, which are in no catalog.
OWN_DATA = ("folder", "table", "list", "webdataset", "hf")
# Of those, what papers publish: nothing is taken out of its training part unasked.
PUBLISHED_FORM = ("list",)
# CLIP's names of ImageNet's classes; the variants take ImageNet's own file where they have none.
IMAGENET_NAMES = "classnames.txt"


@dataclass(frozen=True)
class Protocol:
    """How a data set is drawn from by default; see :class:`lamp_fast.data.settings.DataConfig`.

    Attributes:
        split: "base-new" or "all".
        imb: imbalance ratio.
        cap: most pictures a class before the long tail is drawn; None takes them all.
    """

    split: Literal["base-new", "all"] = "base-new"
    imb: float = 10.0
    cap: int | None = 100


# The paper's, of halved and thinned classes; and data that are what somebody wants to learn.
HALVED = Protocol()
AS_IT_IS = Protocol("all", imb=1.0, cap=None)


@dataclass(frozen=True)
class Download:
    """How torchvision fetches a data set and where its pieces belong.

    Attributes:
        dataset: class of ``torchvision.datasets``.
        pieces: what it unpacks, below its root, to where that belongs below the data set's folder.
        names: also write the class's own list of names as the data set's ``cat_to_name.json``.
        without: what it leaves out that is needed beside it.
    """

    dataset: str
    pieces: Mapping[str, str]
    names: bool = False
    without: str | None = None


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        folder: below the root.
        images: what paths start from, below ``folder``; "" is the folder itself.
        template: class prompt, of the paper's Table 8 or as the long-tail field has it.
        classes: how many.
        counts: pictures of train, val and test, as the field splits them; None where we know no
            checked figure. Of a long tail that is drawn here, those of ``protocol.imb``.
        home: its official page.
        licence: what is known of its terms; its page decides.
        layout: how it is read where it has no split file.
        split_file: CoOp's, below ``folder``: paths, labels and names of every part.
        lists: for "text lists" and "matlab annotations": the official file of each part.
        class_list: the official file of class names.
        line: how lines of the text lists are written, see :mod:`lamp_fast.data.sources.layouts`.
        renamed: class folders whose class name is another.
        ignored: class folders that are no class.
        test_only: has no training pictures.
        is_imagenet: ImageNet, a variant or a part of it: classes are wnids, and their names those
            of ImageNet's own file where the data set has none.
        images_of: the data set whose picture folder takes the place of a missing one.
        protocol: how a run draws from it by default.
        draws_tail: its layout draws the training pictures by the imbalance ratio itself.
        levels: what its labels can be, the finest first, which is the default; empty for one kind.
        spellings: further names that ``--data`` knows it by.
        download: None where torchvision cannot fetch it.
    """

    folder: str
    images: str
    template: str
    classes: int
    counts: tuple[int | None, int | None, int | None]
    home: str
    licence: str
    layout: Literal[
        "class folders",
        "text lists",
        "matlab annotations",
        "matlab labels",
        "imagenet",
        "wnid folders",
        "numbered folders",
        "labelled lists",
        "inaturalist",
        "cifar",
    ]
    split_file: str | None = None
    lists: Mapping[str, str] = field(default_factory=dict)
    class_list: str | None = None
    line: Literal["pets", "aircraft", "sun", "ucf"] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    test_only: bool = False
    is_imagenet: bool = False
    images_of: str | None = None
    protocol: Protocol = HALVED
    draws_tail: bool = False
    levels: tuple[str, ...] = ()
    spellings: tuple[str, ...] = ()
    download: Download | None = None

    @property
    def annotations(self) -> tuple[str, ...]:
        """The official files that it is read from without a split file, below ``folder``."""
        return (*filter(None, [self.class_list]), *self.lists.values())

    @property
    def distinct_names(self) -> bool:
        """False for ImageNet, where CLIP's list calls two classes "missile", two "sunglasses"."""
        return not self.is_imagenet
