"""``python -m lamp_fast.data --check`` and ``--download``, without a network."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import miniatures
import pytest
from torchvision import datasets

from lamp_fast import cli
from lamp_fast.data import __main__ as command
from lamp_fast.data.catalog import CATALOG

pytestmark = pytest.mark.filterwarnings("ignore:--data")


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process: exit code, output, error."""
    # cli.run changes how warnings are shown, for good; pytest wants its own way back.
    monkeypatch.setattr(cli, "_quieten", lambda: None)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.run(command.DescribeConfig, command.main, list(map(str, arguments)))
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def test_check(tmp_path, call):
    miniatures.imagenet_a(tmp_path)
    miniatures.write_split(tmp_path, "dtd")
    miniatures.eurosat(tmp_path)
    miniatures.sun397(tmp_path)
    (tmp_path / "sun397" / "Training_01.txt").unlink()
    miniatures.oxford_pets(tmp_path)
    damaged = tmp_path / "oxford_pets" / "annotations" / "test.txt"
    damaged.write_text("nonsense\n")
    code, out, err = call("--check", tmp_path, "--json")
    assert (code, err) == (0, "")
    states = {each["name"]: each for each in json.loads(out)}
    assert list(states) == list(CATALOG)
    ready = [name for name, each in states.items() if each["ready"]]
    assert ready == ["dtd", "eurosat", "imagenet_a"]
    assert states["dtd"]["counts"] == [4, 4, 4]
    assert states["imagenet_a"]["counts"] == [0, 0, 5]
    assert states["imagenet_a"]["classes"] == 2
    assert states["eurosat"]["notes"][0].startswith("split_zhou_EuroSAT.json is missing, so val")
    assert states["sun397"]["missing"] == [
        "sun397/split_zhou_SUN397.json (or sun397/Training_01.txt)"
    ]
    assert states["oxford_pets"]["missing"][0].startswith(f"{damaged}: line 1 is 'nonsense'")
    assert states["food101"]["missing"] == ["food-101/images/"]
    assert states["food101"]["notes"] == [
        "split_zhou_Food101.json is missing too, without which val and test are drawn here"
    ]
    assert states["imagenet"]["missing"] == [
        "imagenet/images/train/",
        "imagenet/images/val/",
        "imagenet/classnames.txt",
    ]
    code, text, _ = call("--check", tmp_path)
    assert code == 0
    *lines, blank, total = text.splitlines()
    assert (blank, total) == ("", f"3 of {len(CATALOG)} data sets are ready")
    heads = [line.split()[:2] for line in lines if not line.startswith(" ")]
    assert heads == [[name, "ready" if name in ready else "missing"] for name in CATALOG]
    addresses = [line.split()[0] for line in lines if "(licence: " in line]
    assert addresses == [entry.home for entry in CATALOG.values()]
    for each in states.values():
        for path in each["missing"]:
            assert f" lacks {path}\n" in text


def test_check_refusals(tmp_path, call):
    code, _, err = call("--check", tmp_path / "none")
    assert code == 2
    assert err == f"error: --check {tmp_path / 'none'}: expected the folder of the data sets\n"
    for flag, takes, others in (
        ("--check", "--json", [tmp_path, "--data", "dtd"]),
        ("--check", "--json", [tmp_path, "--out", "chart.png"]),
        ("--download", "--root and --json", ["dtd", "--check", tmp_path]),
        ("--download", "--root and --json", ["dtd", "--root", tmp_path, "--imb", "10"]),
    ):
        message = f"error: {flag}: expected nothing with it but {takes}\n"
        assert call(flag, *others) == (2, "", message)


def stand_in(miniature, piece, unpacked, names=None, error=None):
    """A class of torchvision.datasets that unpacks a miniature where the real one unpacks.

    Args:
        miniature: makes the data set below a folder.
        piece: of the miniature, what the archive holds.
        unpacked: where that appears below torchvision's root.
        names: the class's list of class names.
        error: raised at the end.
    """

    class Dataset:
        classes = names

        def __init__(self, root, download):
            assert download
            miniature(Path(root) / "made")
            (Path(root) / unpacked).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / "made" / piece).rename(Path(root) / unpacked)
            if error is not None:
                raise error

    return Dataset


# The class of torchvision, and where it unpacks what is the data set's folder here.
FETCHED = {
    "caltech101": ("Caltech101", "caltech101"),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet"),
    "food101": ("Food101", "food-101"),
    "fgvc_aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b/data"),
    "eurosat": ("EuroSAT", "eurosat"),
}


@pytest.mark.parametrize("name", FETCHED)
def test_download(tmp_path, monkeypatch, call, name):
    kind, unpacked = FETCHED[name]
    folder = CATALOG[name].folder
    monkeypatch.setattr(datasets, kind, stand_in(miniatures.MINIATURES[name], folder, unpacked))
    root = tmp_path / "new" / "root"
    code, out, err = call("--download", name, "--root", root)
    assert code == 0
    assert out.startswith(f"{name}  ready ")
    if name != "fgvc_aircraft":
        assert f"{name}: without {CATALOG[name].split_file}, the published split" in err
    assert [each.name for each in root.iterdir()] == [folder]
    code, _, err = call("--download", name, "--root", root)
    assert code == 2
    assert err.startswith(f"error: --download {name}: {root / folder}/")


def test_download_of_dtd_beside_its_split_file(tmp_path, monkeypatch, call):
    def unpack(root):
        miniatures.dtd(root)
        (root / "dtd" / "labels").mkdir()

    miniatures.write(tmp_path / "dtd" / "split_zhou_DescribableTextures.json", "{}")
    monkeypatch.setattr(datasets, "DTD", stand_in(unpack, "dtd", "dtd/dtd"))
    code, out, _ = call("--download", "DescribableTextures", "--root", tmp_path)
    assert code == 0
    assert "expected lists named train, val, test" in out  # the split file was kept, and is read
    assert (tmp_path / "dtd" / "images" / "banded").is_dir()


def test_download_of_flowers_writes_their_names(tmp_path, monkeypatch, call):
    def unpack(root):
        miniatures.flowers102(root)
        (root / "oxford_flowers" / "cat_to_name.json").unlink()

    names = ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    kind = stand_in(unpack, "oxford_flowers", "flowers-102", names)
    # The real class knows the same names in the same order.
    assert datasets.Flowers102.classes[:3] == names
    assert len(datasets.Flowers102.classes) == 102
    monkeypatch.setattr(datasets, "Flowers102", kind)
    assert call("--download", "flowers102", "--root", tmp_path)[0] == 0
    written = json.loads((tmp_path / "oxford_flowers" / "cat_to_name.json").read_text())
    assert written == {"1": names[0], "2": names[1], "3": names[2]}


def test_download_of_sun397_lacks_the_partitions(tmp_path, monkeypatch, call):
    def unpack(root):
        miniatures.sun397(root)
        folder = root / "sun397"
        (folder / "ClassName.txt").rename(folder / "SUN397" / "ClassName.txt")

    monkeypatch.setattr(datasets, "SUN397", stand_in(unpack, "sun397/SUN397", "SUN397"))
    code, out, err = call("--download", "sun397", "--root", tmp_path)
    assert code == 0
    assert "sun397: without Training_01.txt and Testing_01.txt" in err
    assert "lacks sun397/split_zhou_SUN397.json (or sun397/Training_01.txt, " in out
    assert (tmp_path / "sun397" / "SUN397" / "a" / "abbey").is_dir()


def test_offline(tmp_path, monkeypatch, call):
    """The real torchvision classes, up to the first byte that they ask the network for."""

    def refuse(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name, entry in CATALOG.items():
        if entry.download is None:
            continue
        code, out, err = call("--download", name, "--root", tmp_path)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith(f"error: --download {name}: could not be fetched (")
        assert "Name or service not known" in err
        assert f"get it from {entry.home} into {tmp_path / entry.folder}/" in err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("File not found or corrupted."), "File not found or corrupted."),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch, call, error, shown):
    kind = stand_in(miniatures.eurosat, "eurosat", "eurosat", error=error)
    monkeypatch.setattr(datasets, "EuroSAT", kind)
    code, _, err = call("--download", "eurosat", "--root", tmp_path)
    assert code == 2
    assert f"could not be fetched ({shown})" in err
    assert list(tmp_path.iterdir()) == []


def test_downloads_that_there_are_none_of(tmp_path, call):
    by_hand = [name for name, entry in CATALOG.items() if entry.download is None]
    assert {"stanford_cars", "ucf101", "imagenet", "imagenetv2"} < set(by_hand)
    for name in by_hand:
        code, _, err = call("--download", "dtd", name, "--root", tmp_path)
        assert code == 2
        assert err.startswith(f"error: --download {name}: torchvision cannot fetch it; get it from")
        assert CATALOG[name].home in err
    assert call("--download", "mnist", "--root", tmp_path)[2].startswith(
        "error: --download mnist: expected one of caltech101, oxford_pets, flowers102,"
    )
    assert call("--download", "dtd")[2].startswith("error: --root: missing; --download needs")
    assert list(tmp_path.iterdir()) == []
