"""What is known of each named data set: where its files lie and how its classes are prompted.

One entry a data set, in the layout that CoOp introduced or in the long-tail field's.
:mod:`lamp_fast.data.sources.layouts` reads them; ``docs/data.md`` says the same to people.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from lamp_fast.data.entries import AS_IT_IS, IMAGENET_NAMES, DataSet, Download

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
            is_imagenet=True,
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
            is_imagenet=True,
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
            is_imagenet=True,
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
            is_imagenet=True,
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
            is_imagenet=True,
            test_only=True,
        ),
        "imagenet_lt": DataSet(
            folder="imagenet_lt",
            images="images",
            template=PHOTO,
            classes=1000,
            counts=(None, 20000, 50000),
            home="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
            licence="pictures as ImageNet's",
            layout="labelled lists",
            lists={
                "train": "ImageNet_LT_train.txt",
                "val": "ImageNet_LT_val.txt",
                "test": "ImageNet_LT_test.txt",
            },
            class_list=IMAGENET_NAMES,
            is_imagenet=True,
            images_of="imagenet",
            protocol=AS_IT_IS,
        ),
        "places_lt": DataSet(
            folder="places_lt",
            images="images",
            template=PHOTO,
            classes=365,
            counts=(62500, 7300, 36500),
            home="https://github.com/zhmiao/OpenLongTailRecognition-OLTR",
            licence="pictures as Places365's",
            layout="labelled lists",
            lists={
                "train": "Places_LT_train.txt",
                "val": "Places_LT_val.txt",
                "test": "Places_LT_test.txt",
            },
            class_list="classnames.txt",
            protocol=AS_IT_IS,
        ),
        "inaturalist2018": DataSet(
            folder="inaturalist2018",
            images="",
            template=PHOTO,
            classes=8142,
            counts=(None, 0, 24426),
            home="https://github.com/visipedia/inat_comp/tree/master/2018",
            licence="non-commercial research and education; the pictures belong to their owners",
            layout="inaturalist",
            # Of the challenge's test pictures nobody has the labels.
            lists={"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"},
            class_list="categories.json",
            protocol=AS_IT_IS,
            levels=("species", "genus", "family", "order", "class", "phylum", "kingdom"),
        ),
        "cifar100_lt": DataSet(
            folder="cifar100",
            images="",
            template=PHOTO,
            classes=100,
            counts=(10847, 0, 10000),
            home="https://www.cs.toronto.edu/~kriz/cifar.html",
            licence="none stated",
            layout="cifar",
            lists={"train": "train.bin", "test": "test.bin"},
            class_list="fine_label_names.txt",
            protocol=replace(AS_IT_IS, imb=100.0),
            draws_tail=True,
        ),
    }
)


def find(name: str) -> str | None:
    """The catalog's name of a data set; case, "_" and "-" do not count, so ``OxfordPets`` is one.

    None where the catalog has no such data set.
    """
    return _NAMES.get(_plain(name))


def names_file(entry: DataSet, root: Path) -> Path:
    """The data set's own file of class names, or ImageNet's for what is a part or variant of it."""
    own = root / entry.folder / entry.class_list
    if own.is_file() or not entry.is_imagenet:
        return own
    return root / CATALOG["imagenet"].folder / IMAGENET_NAMES


def images_folder(entry: DataSet, root: Path) -> Path:
    """Where the pictures of a data set lie: in its own folder, or in another data set's."""
    own = root / entry.folder / entry.images
    if entry.images_of is None or own.is_dir():
        return own
    other = CATALOG[entry.images_of]
    return root / other.folder / other.images


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


_NAMES = {
    _plain(spelling): name
    for name, entry in CATALOG.items()
    for spelling in (name, *entry.spellings)
}
