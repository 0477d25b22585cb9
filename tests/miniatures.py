"""The field's data sets as miniatures of their real layouts, for tests that read them.

What they say is typed in from the data sets' own descriptions and the paper's Table 8, not taken
from the catalog.
"""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lamp_fast.errors import InputError

TEMPLATES = {
    "caltech101": "a photo of a {}.",
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": "a photo of a {}.",
    "flowers102": "a photo of a {}, a type of flower.",
    "food101": "a photo of a {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": "a photo of a {}.",
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenet": "a photo of a {}.",
    "imagenetv2": "a photo of a {}.",
    "imagenet_sketch": "a photo of a {}.",
    "imagenet_a": "a photo of a {}.",
    "imagenet_r": "a photo of a {}.",
    "imagenet_lt": "a photo of a {}.",
    "places_lt": "a photo of a {}.",
    "inaturalist2018": "a photo of a {}.",
    "cifar100_lt": "a photo of a {}.",
}
SPLIT_FILES = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("stanford_cars", "", "split_zhou_StanfordCars.json"),
    "flowers102": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": ("food-101", "images", "split_zhou_Food101.json"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json"),
}


def _jpeg() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 128, np.uint8)).save(content, "JPEG")
    return content.getvalue()


JPEG = _jpeg()


def put(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(JPEG)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def refusal(call, *arguments, **named):
    with pytest.raises(InputError) as error:
        call(*arguments, **named)
    message = str(error.value)
    assert "\n" not in message
    return message


def class_folders(images, counts, suffix="jpg"):
    for name, count in counts.items():
        put(*(images / name / f"{name}_{number:04}.{suffix}" for number in range(count)))


def caltech101(root):
    images = root / "caltech-101" / "101_ObjectCategories"
    counts = {"accordion": 7, "Faces": 13, "airplanes": 6, "Leopards": 5, "wild_cat": 4}
    class_folders(images, counts | {"BACKGROUND_Google": 3, "Faces_easy": 3, "Motorbikes": 5})
    write(images / "Faces" / ".DS_Store", "")
    # Capitals sort first: labels follow the folders' names, not the names that replace them.
    return ["face", "leopard", "motorbike", "accordion", "airplane", "wild cat"]


def food101(root):
    class_folders(root / "food-101" / "images", {"waffles": 10, "apple_pie": 11})
    write(root / "food-101" / "meta" / "classes.txt", "unread")
    return ["apple pie", "waffles"]


def dtd(root):
    class_folders(root / "dtd" / "images", {"zigzagged": 10, "banded": 10})
    write(root / "dtd" / "images" / "banded" / ".directory", "")
    return ["banded", "zigzagged"]


def eurosat(root):
    folders = {
        "AnnualCrop": "Annual Crop Land",
        "Forest": "Forest",
        "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road",
        "Industrial": "Industrial Buildings",
        "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land",
        "Residential": "Residential Buildings",
        "River": "River",
        "SeaLake": "Sea or Lake",
    }
    class_folders(root / "eurosat" / "2750", dict.fromkeys(reversed(folders), 5))
    return list(folders.values())


def flowers102(root):
    folder, labels = root / "oxford_flowers", [2, 2, 1, 2, 1, 3, 3, 1, 2, 1, 3, 2]
    put(*(folder / "jpg" / f"image_{number:05}.jpg" for number in range(1, len(labels) + 1)))
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    names = {"2": "hard-leaved pocket orchid", "1": "pink primrose", "3": "colt's foot"}
    write(folder / "cat_to_name.json", json.dumps(names))
    return ["pink primrose", "hard-leaved pocket orchid", "colt's foot"]


def oxford_pets(root):
    folder = root / "oxford_pets"
    lines = {
        "trainval": ["Abyssinian", "great_pyrenees", "Egyptian_Mau"],
        "test": ["Abyssinian", "Egyptian_Mau", "great_pyrenees"],
    }
    order = {"Abyssinian": 1, "Egyptian_Mau": 2, "great_pyrenees": 3}
    for first, (part, breeds) in enumerate(lines.items()):
        text = ""
        for breed, number in itertools.product(breeds, range(6 if part == "trainval" else 2)):
            picture = f"{breed}_{100 * first + number}"
            text += f"{picture} {order[breed]} 1 1\n"
            put(folder / "images" / f"{picture}.jpg")
        write(folder / "annotations" / f"{part}.txt", text)
    return ["abyssinian", "egyptian mau", "great pyrenees"]


def stanford_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "BMW X5 SUV 2007"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names[None]})
    parts = {"train": ("devkit/cars_train_annos.mat", 10), "test": (CARS_TEST, 2)}
    for part, (file, count) in parts.items():
        rows = [(f"{number:05}.jpg", 1 + number % 2) for number in range(1, count + 1)]
        put(*(folder / f"cars_{part}" / name for name, _ in rows))
        write_cars(folder / file, rows)
    return ["2000 AM General Hummer SUV", "2007 BMW X5 SUV"]


CARS_TEST = "cars_test_annos_withlabels.mat"


def write_cars(file, rows):
    kind = [(name, object) for name in ("bbox_x1", "bbox_y1", "class", "fname")]
    annotations = np.array([(1, 1, label, name) for name, label in rows], dtype=kind)
    savemat(file, {"annotations": annotations[None]})


def fgvc_aircraft(root):
    folder = root / "fgvc_aircraft"
    write(folder / "variants.txt", "707-320\nF/A-18\nFokker 100\n")
    numbers = itertools.count(1025794)
    for part in ("train", "val", "test"):
        text = ""
        for variant in ("Fokker 100", "707-320", "F/A-18"):
            number = next(numbers)
            put(folder / "images" / f"{number}.jpg")
            text += f"{number} {variant}\n"
        write(folder / f"images_variant_{part}.txt", text)
    return ["707-320", "F/A-18", "Fokker 100"]


def sun397(root):
    folder = root / "sun397"
    scenes = ["/a/abbey", "/c/church/outdoor", "/c/church/indoor", "/a/airplane_cabin"]
    write(folder / "ClassName.txt", "\n".join(scenes))
    for part, count in (("Training", 5), ("Testing", 2)):
        paths = [f"{scene}/sun_{part}{n}.jpg" for n in range(count) for scene in reversed(scenes)]
        put(*(folder / "SUN397" / path[1:] for path in paths))
        write(folder / f"{part}_01.txt", "\n".join(paths))
    return ["abbey", "outdoor church", "indoor church", "airplane cabin"]


def ucf101(root):
    folder = root / "ucf101"
    lists = folder / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n")
    places = {
        "ApplyEyeMakeup": "Apply_Eye_Makeup",
        "YoYo": "Yo_Yo",
        "HandstandPushups": "Handstand_Pushups",
    }
    for part, count in (("train", 5), ("test", 2)):
        text = ""
        for (action, place), number in itertools.product(places.items(), range(count)):
            put(folder / "UCF-101-midframes" / place / f"v_{action}_{part}_{number}.jpg")
            text += f"{action}/v_{action}_{part}_{number}.avi{' 1' * (part == 'train')}\n"
        write(lists / f"{part}list01.txt", text)
    return ["Apply Eye Makeup", "Handstand Pushups", "Yo Yo"]


# Not in the order of wnids, and with two classes of one name, as in CLIP's list.
CLASSNAMES = {
    "n04008634": "missile",
    "n01440764": "tench",
    "n03773504": "missile",
    "n01443537": "great_white shark",
}
BY_WNID = ["tench", "great white shark", "missile", "missile"]


def write_names(folder):
    write(folder / "classnames.txt", "".join(f"{a} {b}\n" for a, b in CLASSNAMES.items()))


def imagenet(root):
    folder = root / "imagenet"
    write_names(folder)
    for part, count in (("train", 3), ("val", 2)):
        class_folders(folder / "images" / part, dict.fromkeys(CLASSNAMES, count), "JPEG")
    return BY_WNID


def imagenetv2(root):
    write_names(root / "imagenetv2")
    images = root / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    class_folders(images, {str(number): 2 for number in range(4)}, "jpeg")
    return ["missile", "tench", "missile", "great white shark"]


def imagenet_sketch(root):
    write_names(root / "imagenet")  # found there, too
    class_folders(root / "imagenet-sketch" / "images", dict.fromkeys(CLASSNAMES, 2), "JPEG")
    return BY_WNID


def imagenet_a(root):
    folder = root / "imagenet-adversarial"
    write_names(folder)
    class_folders(folder / "imagenet-a", {"n03773504": 2, "n01440764": 3})
    write(folder / "imagenet-a" / "README.txt", "read me")
    return ["tench", "missile"]


def imagenet_r(root):
    folder = root / "imagenet-rendition"
    write_names(folder)
    class_folders(folder / "imagenet-r", {"n04008634": 2, "n01443537": 3, "n01440764": 1})
    write(folder / "imagenet-r" / "README.txt", "read me")
    return ["tench", "great white shark", "missile"]


def write_list(file, paths, labels):
    """``path label`` a line."""
    write(file, "".join(f"{path} {label}\n" for path, label in zip(paths, labels, strict=True)))


def imagenet_lt(root):
    imagenet(root)  # whose pictures these are
    wnids = sorted(CLASSNAMES)
    rows = {"train": [], "val": [], "test": []}
    for label, wnid in enumerate(wnids):
        for number in range(2 if label < 2 else 1):
            rows["train"].append((f"train/{wnid}/{wnid}_{number:04}.JPEG", label))
        rows["val"].append((f"train/{wnid}/{wnid}_0002.JPEG", label))
        rows["test"] += [(f"val/{wnid}/{wnid}_{number:04}.JPEG", label) for number in (0, 1)]
    for part, listed in rows.items():
        write_list(root / "imagenet_lt" / f"ImageNet_LT_{part}.txt", *zip(*listed, strict=True))
    return BY_WNID


def places_lt(root):
    folder = root / "places_lt"
    scenes = ["airfield", "airplane_cabin", "amusement_park", "arena-hockey"]
    names = [f"{scene} {scene.replace('_', ' ').replace('-', ' ')}\n" for scene in scenes]
    write(folder / "classnames.txt", "".join(names))
    number = itertools.count(4851)
    for part, counts in (("train", (9, 4, 2, 1)), ("val", (1, 1, 1, 1)), ("test", (2, 2, 2, 2))):
        place = "train" if part == "train" else "val"
        listed = [
            (f"{place}/{scene}/{next(number):08}.jpg", label)
            for label, (scene, count) in enumerate(zip(scenes, counts, strict=True))
            for _ in range(count)
        ]
        paths, labels = zip(*listed, strict=True)
        put(*(folder / "images" / path for path in paths))
        write_list(folder / f"Places_LT_{part}.txt", paths, labels)
    return ["airfield", "airplane cabin", "amusement park", "arena hockey"]


# By id: a genus of plants and one of birds have the same name.
SPECIES = [
    "Prunella vulgaris, Prunella, Lamiaceae, Lamiales, Magnoliopsida, Tracheophyta, Plantae",
    "Salvia spathacea, Salvia, Lamiaceae, Lamiales, Magnoliopsida, Tracheophyta, Plantae",
    "Prunella modularis, Prunella, Prunellidae, Passeriformes, Aves, Chordata, Animalia",
    "Corvus corax, Corvus, Corvidae, Passeriformes, Aves, Chordata, Animalia",
    "Salvia apiana, Salvia, Lamiaceae, Lamiales, Magnoliopsida, Tracheophyta, Plantae",
]


def inaturalist2018(root):
    folder = root / "inaturalist2018"
    ranks = ("name", "genus", "family", "order", "class", "phylum", "kingdom")
    categories = [
        {"id": number, **dict(zip(ranks, line.split(", "), strict=True))}
        for number, line in enumerate(SPECIES)
    ]
    write(folder / "categories.json", json.dumps(categories[::-1]))
    number = itertools.count(2**60)
    for part, counts in (("train", (5, 1, 3, 2, 4)), ("val", (3, 3, 3, 3, 3))):
        listed = [
            (f"train_val2018/{categories[label]['kingdom']}/{label}/{next(number):032x}.jpg", label)
            for label, count in enumerate(counts)
            for _ in range(count)
        ]
        paths, labels = zip(*listed, strict=True)
        put(*(folder / path for path in paths))
        write_list(folder / f"iNaturalist18_{part}.txt", paths, labels)
    return [line.split(", ")[0] for line in SPECIES]


def cifar100_lt(root):
    """As class folders; :func:`cifar100_binary` writes the other form."""
    for part, count in (("train", 20), ("test", 2)):
        counts = dict.fromkeys(("apple", "aquarium_fish", "worm"), count)
        class_folders(root / "cifar100" / part, counts, "png")
    return ["apple", "aquarium fish", "worm"]


def cifar100_binary(folder, names, train, test, seed=0):
    """CIFAR-100's binary version of random pictures; returns pixels [N, 32, 32, 3] by part."""
    generator = np.random.default_rng(seed)
    write(folder / "fine_label_names.txt", "".join(f"{name}\n" for name in names))
    pixels = {}
    for part, labels in (("train", train), ("test", test)):
        pixels[part] = generator.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
        content = b"".join(
            bytes([label // 5, label]) + each.transpose(2, 0, 1).tobytes()
            for label, each in zip(labels, pixels[part], strict=True)
        )
        (folder / f"{part}.bin").write_bytes(content)
    return pixels


MINIATURES = {name: globals()[name] for name in TEMPLATES}


def write_split(root, name, classes=("ant_hill", "Bee")):
    """The data set with its split file alone, labels against the alphabet; returns the rows."""
    folder, images, file = SPLIT_FILES[name]
    rows = {
        part: [
            [f"{part}/{each}{n}.jpg", at, each] for at, each in enumerate(classes) for n in (0, 1)
        ]
        for part in ("train", "val", "test")
    }
    for path, _, _ in itertools.chain(*rows.values()):
        put(root / folder / images / path)
    if name == "stanford_cars":
        for part in ("cars_train", "cars_test"):
            (root / folder / part).mkdir()
    write(root / folder / file, json.dumps(rows, indent=4))
    return rows
