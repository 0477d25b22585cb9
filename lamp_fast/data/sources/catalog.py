"""What is known of each named data set: where its files lie and how its classes are prompted.

One entry a data set, in the layout that CoOp introduced. :mod:`lamp_fast.data.sources.layouts`
reads them; ``docs/data.md`` says the same to people.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

# CLIP's names of ImageNet's classes; the variants take ImageNet's own file where they have none.
IMAGENET_NAMES = "classnames.txt"


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
        template: class prompt, of the paper's Table 8.
        classes: how many.
        counts: pictures of train, val and test, as the field splits them.
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
        spellings: further names that ``--data`` knows it by.
        download: None where torchvision cannot fetch it.
    """

    folder: str
    images: str
    template: str
    classes: int
    counts: tuple[int, int, int]
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
    ]
    split_file: str | None = None
    lists: Mapping[str, str] = field(default_factory=dict)
    class_list: str | None = None
    line: Literal["pets", "aircraft", "sun", "ucf"] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    test_only: bool = False
    spellings: tuple[str, ...] = ()
    download: Download | None = None

    @property
    def annotations(self) -> tuple[str, ...]:
        """The official files that it is read from without a split file, below ``folder``."""
        return (*filter(None, [self.class_list]), *self.lists.values())

    @property
    def is_imagenet(self) -> bool:
        """Whether it is ImageNet or a variant."""
        return self.class_list == IMAGENET_NAMES

    @property
    def distinct_names(self) -> bool:
        """False for ImageNet, where CLIP's list calls two classes "missile", two "sunglasses"."""
        return not self.is_imagenet


PHOTO = "a photo of a {}."

CATALOG: Mapping[str, DataSet] = MappingProxyType(
    {
        "caltech101": DataSet(
            folder="caltech-101",
            images="101_ObjectCategories",
            template=PHOTO,
            classes=100,
            counts=(4128, 1649, 2465),
            home="https://data.caltech.edu/records/mzrjq-6wc02",
            licence="CC BY 4.0",
            layout="class folders",
            split_file="split_zhou_Caltech101.json",
            renamed={
                "airplanes": "airplane",
                "Faces": "face",
                "Leopards": "leopard",
                "Motorbikes": "motorbike",
            },
            ignored=("BACKGROUND_Google", "Faces_easy"),
            download=Download(
                "Caltech101", {"caltech101/101_ObjectCategories": "101_ObjectCategories"}
            ),
        ),
        "oxford_pets": DataSet(
            folder="oxford_pets",
            images="images",
            template="a photo of a {}, a type of pet.",
            classes=37,
            counts=(2944, 736, 3669),
            home="https://www.robots.ox.ac.uk/~vgg/data/pets/",
            licence="CC BY-SA 4.0",
            layout="text lists",
            split_file="split_zhou_OxfordPets.json",
            lists={"train": "annotations/trainval.txt", "test": "annotations/test.txt"},
            line="pets",
            download=Download(
                "OxfordIIITPet",
                {"oxford-iiit-pet/images": "images", "oxford-iiit-pet/annotations": "annotations"},
            ),
        ),
        "stanford_cars": DataSet(
            folder="stanford_cars",
            images="",
            template=PHOTO,
            classes=196,
            counts=(6509, 1635, 8041),
            home="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
            licence="none stated",
            layout="matlab annotations",
            split_file="split_zhou_StanfordCars.json",
            lists={
                "train": "devkit/cars_train_annos.mat",
                "test": "cars_test_annos_withlabels.mat",
            },
            class_list="devkit/cars_meta.mat",
        ),
        "flowers102": DataSet(
            folder="oxford_flowers",
            images="jpg",
            template="a photo of a {}, a type of flower.",
            classes=102,
            counts=(4093, 1633, 2463),
            home="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            licence="none stated",
            layout="matlab labels",
            split_file="split_zhou_OxfordFlowers.json",
            lists={"train": "imagelabels.mat"},
            class_list="cat_to_name.json",
            spellings=("oxford_flowers",),
            download=Download(
                "Flowers102",
                {"flowers-102/jpg": "jpg", "flowers-102/imagelabels.mat": "imagelabels.mat"},
                names=True,
            ),
        ),
        "food101": DataSet(
            folder="food-101",
            images="images",
            template="a photo of a {}, a type of food.",
            classes=101,
            counts=(50500, 20200, 30300),
            home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            licence="scientific fair use; the pictures belong to their owners",
            layout="class folders",
            split_file="split_zhou_Food101.json",
            download=Download("Food101", {"food-101/images": "images", "food-101/meta": "meta"}),
        ),
        "fgvc_aircraft": DataSet(
            folder="fgvc_aircraft",
            images="images",
            template="a photo of a {}, a type of aircraft.",
            classes=100,
            counts=(3334, 3333, 3333),
            home="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            licence="non-commercial research",
            layout="text lists",
            lists={
                "train": "images_variant_train.txt",
                "val": "images_variant_val.txt",
                "test": "images_variant_test.txt",
            },
            class_list="variants.txt",
            line="aircraft",
            download=Download(
                "FGVCAircraft",
                {
                    f"fgvc-aircraft-2013b/data/{piece}": piece
                    for piece in (
                        "images",
                        "variants.txt",
                        "images_variant_train.txt",
                        "images_variant_val.txt",
                        "images_variant_test.txt",
                    )
                },
            ),
        ),
        "sun397": DataSet(
            folder="sun397",
            images="SUN397",
            template=PHOTO,
            classes=397,
            counts=(15880, 3970, 19850),
            home="https://vision.princeton.edu/projects/2010/SUN/",
            licence="none stated",
            layout="text lists",
            split_file="split_zhou_SUN397.json",
            lists={"train": "Training_01.txt", "test": "Testing_01.txt"},
            class_list="ClassName.txt",
            line="sun",
            download=Download(
                "SUN397",
                {"SUN397/ClassName.txt": "ClassName.txt", "SUN397": "SUN397"},
                without="Training_01.txt and Testing_01.txt (its page's Partitions.zip)",
            ),
        ),
        "dtd": DataSet(
            folder="dtd",
            images="images",
            template="{} texture.",
            classes=47,
            counts=(2820, 1128, 1692),
            home="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            licence="research",
            layout="class folders",
            split_file="split_zhou_DescribableTextures.json",
            spellings=("DescribableTextures",),
            download=Download("DTD", {f"dtd/dtd/{each}": each for each in ("images", "labels")}),
        ),
        "eurosat": DataSet(
            folder="eurosat",
            images="2750",
            template="a centered satellite photo of {}.",
            classes=10,
            counts=(13500, 5400, 8100),
            home="https://github.com/phelber/EuroSAT",
            licence="MIT",
            layout="class folders",
            split_file="split_zhou_EuroSAT.json",
            renamed={
                "AnnualCrop": "Annual Crop Land",
                "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road",
                "Industrial": "Industrial Buildings",
                "Pasture": "Pasture Land",
                "PermanentCrop": "Permanent Crop Land",
                "Residential": "Residential Buildings",
                "SeaLake": "Sea or Lake",
            },
            download=Download("EuroSAT", {"eurosat/2750": "2750"}),
        ),
        "ucf101": DataSet(
            folder="ucf101",
            images="UCF-101-midframes",
            template="a photo of a person doing {}.",
            classes=101,
            counts=(7639, 1898, 3783),
            home="https://www.crcv.ucf.edu/data/UCF101.php",
            licence="none stated",
            layout="text lists",
            split_file="split_zhou_UCF101.json",
            lists={
                "train": "ucfTrainTestlist/trainlist01.txt",
                "test": "ucfTrainTestlist/testlist01.txt",
            },
            class_list="ucfTrainTestlist/classInd.txt",
            line="ucf",
        ),
        "imagenet": DataSet(
            folder="imagenet",
            images="images",
            template=PHOTO,
            classes=1000,
            counts=(1281167, 50000, 50000),
            home="https://www.image-net.org/",
            licence="non-commercial research and education, by agreement",
            layout="imagenet",
            class_list=IMAGENET_NAMES,
        ),
        "imagenetv2": DataSet(
            folder="imagenetv2",
            images="imagenetv2-matched-frequency-format-val",
            template=PHOTO,
            classes=1000,
            counts=(0, 0, 10000),
            home="https://github.com/modestyachts/ImageNetV2",
            licence="MIT (its repository)",
            layout="numbered folders",
            class_list=IMAGENET_NAMES,
            test_only=True,
        ),
        "imagenet_sketch": DataSet(
            folder="imagenet-sketch",
            images="images",
            template=PHOTO,
            classes=1000,
            counts=(0, 0, 50889),
            home="https://github.com/HaohanWang/ImageNet-Sketch",
            licence="MIT (its repository)",
            layout="wnid folders",
            class_list=IMAGENET_NAMES,
            test_only=True,
        ),
        "imagenet_a": DataSet(
            folder="imagenet-adversarial",
            images="imagenet-a",
            template=PHOTO,
            classes=200,
            counts=(0, 0, 7500),
            home="https://github.com/hendrycks/natural-adv-examples",
            licence="MIT (its repository)",
            layout="wnid folders",
            class_list=IMAGENET_NAMES,
            test_only=True,
        ),
        "imagenet_r": DataSet(
            folder="imagenet-rendition",
            images="imagenet-r",
            template=PHOTO,
            classes=200,
            counts=(0, 0, 30000),
            home="https://github.com/hendrycks/imagenet-r",
            licence="MIT (its repository)",
            layout="wnid folders",
            class_list=IMAGENET_NAMES,
            test_only=True,
        ),
    }
)


def find(name: str) -> str | None:
    """The catalog's name of a data set; case, "_" and "-" do not count, so ``OxfordPets`` is one.

    None where the catalog has no such data set.
    """
    return _NAMES.get(_plain(name))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_NAMES = {
    _plain(spelling): name
    for name, entry in CATALOG.items()
    for spelling in (name, *entry.spellings)
}
