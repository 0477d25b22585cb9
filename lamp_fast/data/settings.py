"""Which pictures a run takes, how the protocol draws from them, and what is shown of each."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lamp_fast.cli import expand_path
from lamp_fast.data import catalog
from lamp_fast.data.catalog import CATALOG
from lamp_fast.data.entries import AS_IT_IS, HALVED, OWN_DATA, SPLIT_PARTS, Protocol
from lamp_fast.data.words import check_templates
from lamp_fast.errors import InputError
from lamp_fast.fields import Bounds, IntOrNone

# Settings that say where files lie, and nothing of what they hold.
LISTS = (*SPLIT_PARTS, "names")
PLACES = ("root", "table", *LISTS)
# Files whose content a run keeps.
DESCRIBING = ("descriptions", "hierarchy", "exclude")
# What text files of parts, and of class names, go with.
_LISTED = {
    **dict.fromkeys(SPLIT_PARTS, ("list", "webdataset")),
    "names": ("list", "webdataset", "hf"),
}
SPLITS = ("all", "base-new")
AUTO = "auto"
# More pictures than any data set has.
MANY = 1_000_000_000
# The least share of a picture that a random crop shows, as the peers draw it.
LEAST_AREA = 0.08
MAX_SIDE = 65_536
# Times what the CLIP takes: beyond that the centre shows next to nothing of a picture.
MAX_ENLARGEMENT = 16
Sampling = Literal["shuffle", "balanced", "sqrt"]
# What commands that use a run say of its test-time ensemble, and what they mean.
Tte = Literal["as-trained", "on", "off"]
TTE: dict[str, bool | None] = {"as-trained": None, "on": True, "off": False}


def _read_cap(arguments: list[str]) -> int | str | None:
    word = arguments[0].lower()
    return {"none": None, AUTO: AUTO}[word] if word in ("none", AUTO) else int(word)


Cap = Annotated[
    int | str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|none|auto",
        instance_from_str=_read_cap,
        is_instance=lambda value: value is None or value == AUTO or isinstance(value, int),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]


@dataclass(frozen=True)
class DataConfig:
    """The pictures and the protocol that draws from them."""

    data: str = "digits"
    """digits; folder (one folder of pictures a class), table (see --table), list (see --train),
    webdataset (.tar shards) or hf (a Hugging Face dataset; see --root); or one of the field's data
    sets (docs/data.md), in CoOp's layout: caltech101, oxford_pets, stanford_cars, flowers102,
    food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101, imagenet; or of the long-tail field:
    imagenet_lt, places_lt, inaturalist2018, cifar100_lt."""
    root: Path | None = None
    """The folder that holds the data set's folder; for --data folder the class folders; for --data
    table and list what paths start from, by default the folder of the table or the train list; for
    webdataset NAME-{0000..0099}.tar or a folder with nshards.txt; for hf a name on the hub or a
    folder."""
    table: Path | None = None
    """For --data table: a .csv or .parquet file with a row a picture."""
    path_column: str = "path"
    """The table's column of paths; for --data hf, of pictures."""
    label_column: str = "label"
    """The table's column of class names; also hf's. For webdataset the field of KEY.json, or the
    ending of the member, that is the class; by default KEY.cls, too."""
    split_column: str | None = None
    """The table's column of train, val and test; by default "split" where there is one."""
    train: Path | None = None
    """For --data list: a text file of training pictures, "path label" a line, labels from 0. For
    webdataset: the shards of this part, as --root has them."""
    val: Path | None = None
    """For --data list and webdataset: of validation pictures; without it there are none."""
    test: Path | None = None
    """For --data list and webdataset: of test pictures."""
    names: Path | None = None
    """For --data list, webdataset and hf: a text file with "id name" or a name a line, the first of
    label 0; by default the names of the folders that each label's pictures lie in, classnames.txt
    beside the shards, or the dataset's own names."""
    level: str | None = None
    """For inaturalist2018, what labels are: species (the default), genus, family, order, class,
    phylum or kingdom."""
    template: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Class prompt with {} for the name, a named set (imagenet-7, promptsrc-60, openai-80), or a
    .txt file of a template a line; by default the data set's own. Of several, --template A
    --template B, and so of a set, methods over frozen text take the mean."""
    descriptions: Path | None = None
    """A .csv with the columns class and description, of every class: texts that it has in place of
    the template, with or without {} for the name. Of several a class the mean is taken."""
    hierarchy: Path | None = None
    """A .csv with the column class and a column for each level above it (genus, family, ...), of
    every class: scores are also given at those levels, and predict --level answers at one."""
    levels: tuple[str, ...] = ()
    """Which columns are levels, the nearest to the classes first; by default all of --hierarchy.
    For --data table without --hierarchy, columns of the table itself."""
    split: str | None = None
    """all trains and tests every class together, the default for own pictures and the long-tail
    field's data sets; base-new trains the first half and also tests the rest, as papers do, the
    default for the others."""
    imb: Annotated[float | None, Bounds(1, 1_000_000)] = None
    """Imbalance ratio of the base training set; by default 10, but 1 (as it is) with --shots, for
    own pictures and the long-tail field's data sets, and 100 for cifar100_lt."""
    cap: Annotated[Cap, Bounds(1, MANY)] = AUTO
    """Most pictures a class before the long tail is drawn; none takes the classes as they are; by
    default 100, but none for own pictures and the long-tail field's data sets."""
    shots: Annotated[IntOrNone, Bounds(1, MANY)] = None
    """Few-shot: this many pictures a class, in place of --cap."""
    exclude: Path | None = None
    """Leave out the pictures that a .csv names in its column path, and part where it has one, as
    python -m lamp_fast.data --audit writes it, or a .txt with a path a line; paths start from the
    pictures' root. No other picture changes its part."""
    skip_unreadable: bool = False
    """Count unreadable pictures and go on without them."""
    downscale: Annotated[IntOrNone, Bounds(1, 65_536)] = None
    """Scale larger pictures down to this shorter side when they are decoded: less to keep and to
    read, but other crops than from the files."""

    def __post_init__(self) -> None:
        # One name for a data set, whatever it was called: settings, folders and runs go by it.
        object.__setattr__(self, "data", catalog.find(self.data) or self.data)
        if self.template is None or isinstance(self.template, str):
            given = () if self.template is None else (self.template,)
            object.__setattr__(self, "template", given)

    def check_together(self) -> None:
        """Refuse words that no data could be meant by.

        Raises:
            InputError: naming the first such flag, its value and what was expected.
        """
        if isinstance(self.cap, str) and self.cap != AUTO:
            raise InputError(f"--cap {self.cap}: expected a number, none or {AUTO}")
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"--split {self.split}: expected {' or '.join(SPLITS)}")
        if self.table is not None and self.data != "table":
            raise InputError(
                f"--table {self.table}: expected --data table with it, not {self.data}"
            )
        for name in LISTS:
            if (file := getattr(self, name)) is not None and self.data not in _LISTED[name]:
                raise InputError(
                    f"--{name} {file}: expected --data {' or '.join(_LISTED[name])} with it, not"
                    f" {self.data}"
                )
        self._check_level()
        check_templates(self.template)
        if self.levels and self.hierarchy is None and self.table is None:
            raise InputError(
                f"--levels {' '.join(self.levels)}: expected --hierarchy or --table with them"
            )

    def _check_level(self) -> None:
        if self.level is None:
            return
        levels = CATALOG[self.data].levels if self.data in CATALOG else ()
        if not levels:
            having = " or ".join(name for name, entry in CATALOG.items() if entry.levels)
            raise InputError(
                f"--level {self.level}: expected --data {having} with it, not {self.data}"
            )
        if self.level not in levels:
            raise InputError(f"--level {self.level}: expected one of {', '.join(levels)}")

    @property
    def protocol(self) -> Protocol:
        """How the data set is drawn from where nothing is said."""
        if self.data in OWN_DATA:
            return AS_IT_IS
        return CATALOG[self.data].protocol if self.data in CATALOG else HALVED

    def resolved(self) -> "DataConfig":
        """The same with the defaults of the data set filled in and absolute paths."""
        protocol = self.protocol
        imb = protocol.imb if self.shots is None else 1.0
        levels = CATALOG[self.data].levels if self.data in CATALOG else ()
        places = {name: getattr(self, name) for name in (*PLACES, *DESCRIBING)}
        return replace(
            self,
            **{
                name: None if place is None else self._absolute(name, place)
                for name, place in places.items()
            },
            split=self.split or protocol.split,
            imb=imb if self.imb is None else self.imb,
            cap=protocol.cap if self.cap == AUTO else self.cap,
            level=self.level or next(iter(levels), None),
        )

    def _absolute(self, name: str, place: Path) -> Path:
        place = expand_path(place)
        on_the_hub = self.data == "hf" and name == "root" and not place.exists()
        return place if on_the_hub else place.absolute()


def _read_resize(arguments: list[str]) -> int | str | None:
    word = arguments[0].lower()
    if word == "none":
        return None
    return int(word) if word.isdecimal() else word


Resize = Annotated[
    int | str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|A/B|none",
        instance_from_str=_read_resize,
        is_instance=lambda value: value is None or isinstance(value, (int, str)),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    ),
]


@dataclass(frozen=True)
class ViewConfig:
    """How pictures are cropped."""

    augment: Literal["auto", "standard", "minimalist", "none"] = "auto"
    """Of training pictures: standard is a random crop of random shape; minimalist (LIFT+) a random
    square, never mirrored, that shows more from epoch to epoch; none is the test crop. auto is
    standard, but none for data that crops would spoil (digits)."""
    crop_area: Annotated[float, Bounds(above=0, high=1)] = LEAST_AREA
    """The least share of a picture that a random crop shows."""
    flip: bool = True
    """Mirror half of the training pictures, with --augment standard."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How pictures are scaled, in training and testing; auto as the CLIP's own."""
    test_resize: Annotated[Resize, Bounds(1, MAX_SIDE)] = None
    """What a test picture's shorter side is scaled to before its centre is cut out: pixels, or as
    8/7 of what the CLIP takes; none is just that."""
    tte: bool = False
    """Test-time ensemble: the mean of the logits of four corners and the centre, of pictures scaled
    to 248 where the CLIP takes 224, and in proportion; five times the work. --test-resize has then
    no part in testing."""

    def check_together(self) -> None:
        """Refuse a size that is none.

        Raises:
            InputError: naming it.
        """
        if isinstance(self.test_resize, str) and self.test_ratio is None:
            raise InputError(
                f"--test-resize {self.test_resize}: expected pixels, a ratio from 1 to"
                f" {MAX_ENLARGEMENT} such as 8/7, or none"
            )

    @property
    def test_ratio(self) -> tuple[int, int] | None:
        """A ``test_resize`` of the form A/B; None of another one."""
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", str(self.test_resize), re.ASCII)
        if found is None:
            return None
        above, below = map(int, found.groups())
        return (above, below) if 0 < below <= above <= MAX_ENLARGEMENT * below else None

    def describe(self) -> str:
        """What differs from the defaults, on one line."""
        plain = vars(ViewConfig())
        return " ".join(
            f"{name}={value}" for name, value in vars(self).items() if value != plain[name]
        )

    def check_size(self, size: int) -> None:
        """Refuse a ``test_resize`` that leaves less than a CLIP takes, or far more.

        Args:
            size: what it takes, in pixels.

        Raises:
            InputError: naming both.
        """
        largest = MAX_ENLARGEMENT * size
        if isinstance(self.test_resize, int) and not size <= self.test_resize <= largest:
            raise InputError(
                f"--test-resize {self.test_resize}: expected {size}, which the CLIP takes, to"
                f" {largest}"
            )
