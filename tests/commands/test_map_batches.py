"""The docs' lines that map a classifier over Ray's and Spark's batches, run as they stand there."""

import os
import re
from pathlib import Path

import pytest
from PIL import Image

from lamp_fast.classifier import Classifier
from lamp_fast.data.sources import load_source

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def lines_with(word):
    """The block of code of the page that holds a word."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (block,) = [each for each in blocks if word in each]
    return block


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run and photos where the docs' lines look for them."""
    monkeypatch.chdir(tmp_path)
    Classifier.train(epochs=1, warmup_epochs=0, shots=4, out=tmp_path / "runs" / "pictures")
    scans = load_source("digits", None).test
    (tmp_path / "photos").mkdir()
    for number in range(7):
        Image.fromarray(scans.arrays[number]).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def expected(place):
    files = sorted((place / "photos").iterdir())
    answers = Classifier.load(place / "runs" / "pictures").classify(files, top=1)
    return {file.name: answer.names[0] for file, answer in zip(files, answers, strict=True)}


def test_spark_maps_over_tables_of_pandas(place):
    pandas = pytest.importorskip("pandas")
    held = {}
    exec(lines_with("mapInPandas"), held)
    files = sorted((place / "photos").iterdir())
    rows = pandas.DataFrame(
        {"path": [each.name for each in files], "content": [each.read_bytes() for each in files]}
    )
    found = pandas.concat(held["classify"](iter([rows[:4], rows[4:]])))
    assert dict(zip(found["path"], found["name"], strict=True)) == expected(place)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # an actor imports torch anew, which a busy machine makes minutes of
def test_ray_maps_over_batches(place):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    parquet = pytest.importorskip("pyarrow.parquet")
    code = lines_with("import ray").replace('"photos"', repr(str(place / "photos")))
    code = code.replace('"runs/pictures"', repr(str(place / "runs" / "pictures")))
    code = code.replace('"answers"', repr(str(place / "answers")))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        ray.shutdown()
    found = parquet.read_table(place / "answers").to_pydict()
    names = [os.path.basename(path) for path in found["path"]]
    assert dict(zip(names, found["class"], strict=True)) == expected(place)
