"""Exported graphs give the method's logits, for any batch, or leave nothing behind."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from lamp_fast import export as exporting
from lamp_fast import train
from lamp_fast.classifier import Classifier
from lamp_fast.errors import InputError
from lamp_fast.export import build_module, export, random_pictures, run_onnx, run_torch, tolerance
from lamp_fast.methods import ZeroShot
from lamp_fast.runs.config import TrainConfig, apply_preset

FILES = {"classes.json", "export.json", "preprocessing.json"}
KINDS = {
    "image": {},
    "class": {"text_query": "class"},
    "shared-only": {"mpp": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One-epoch runs by kind, made when first asked for."""
    made = {}

    def run(kind):
        if kind not in made:
            config = apply_preset(TrainConfig(out=tmp_path_factory.mktemp("runs") / "run"), "tiny")
            config = replace(
                config,
                optim=replace(config.optim, epochs=1, warmup_epochs=0),
                machine=replace(config.machine, threads=1),
                own=replace(config.own, adapt_passes=1, **KINDS[kind]),
            )
            assert train.main(config) == 0
            made[kind] = config.out
        return made[kind]

    return run


def load(run, kind):
    classifier = Classifier.load(run, device="cpu")
    if kind == "zeroshot":
        classifier.method = ZeroShot(classifier.method.clip)
    return classifier


def check(classifier, program, names):
    """The oracle is the method, loaded anew, in float64."""
    method = classifier.method
    allowed = tolerance(method.clip)
    assert allowed < 0.01  # of logits that reach 10 and more: a tolerance that can fail
    batches = [random_pictures(classifier, size) for size in (1, 2, 6)]
    method.double()
    method.clip.double()
    adapted = classifier.bias_for(names) == "adapted"
    classes = method.prepare(names, classifier.template)
    for images in batches:
        got = program(images)
        assert got.dtype == torch.float32
        assert got.shape == (len(images), len(names))
        expected = method.logits(images.double(), classes, adapted)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("kind", ["image", "class", "shared-only", "zeroshot"])
def test_the_module_is_the_method(runs, kind):
    """Without an exporter in between, so that a disagreement has one place to be."""
    names = ("four", "a cat", "seven")
    run = runs("image" if kind == "zeroshot" else kind)
    module, _ = build_module(load(run, kind), names)
    with torch.no_grad():
        check(load(run, kind), module, names)


def test_a_graph_has_none_of_our_ops(runs):
    """Text per image, whose short rows the C++ kernel serves outside of a graph."""
    classifier = load(runs("image"), "image")
    module, _ = build_module(classifier, ("one", "two"))
    with torch.no_grad():
        graph = exporting._traced(module, random_pictures(classifier, 3)).graph
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not [each for each in targets if "lamp_fast" in each]


@pytest.mark.parametrize("kind", [pytest.param("image", marks=pytest.mark.slow), "class"])
def test_torch_export(runs, kind, tmp_path):
    out = tmp_path / "exported"
    difference = export(runs(kind), out, format="torch")
    assert {each.name for each in out.iterdir()} == FILES | {"model.pt2"}
    classifier = load(runs(kind), kind)
    names = tuple(json.loads((out / "classes.json").read_text()))
    assert names == classifier.trained_names
    assert difference <= tolerance(classifier.method.clip)
    check(classifier, run_torch(out / "model.pt2"), names)
    program = torch.export.load(out / "model.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [each for each in targets if "lamp_fast" in each]


@pytest.mark.parametrize("kind", [pytest.param("image", marks=pytest.mark.slow), "class"])
def test_onnx(runs, kind, tmp_path):
    onnx = pytest.importorskip("onnx")
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    out, names = tmp_path / "exported", ("five", "six", "seven", "eight", "nine")
    export(runs(kind), out, format="onnx", classes=names)
    assert {each.name for each in out.iterdir()} == FILES | {"model.onnx"}
    facts = json.loads((out / "export.json").read_text())
    assert facts["bias"] == "adapted"
    assert facts["trained"] == [False] * 5
    check(load(runs(kind), kind), run_onnx(out / "model.onnx"), names)
    graph = onnx.load(out / "model.onnx").graph
    for tensor in (*graph.input, *graph.output):
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_what_lies_beside_the_graph(runs, tmp_path):
    out = tmp_path / "exported"
    export(runs("class"), out, format="torch", classes=("one", "a cat"))
    clip = Classifier.load(runs("class"), device="cpu").method.clip
    preprocessing = json.loads((out / "preprocessing.json").read_text())
    assert preprocessing == {
        "size": clip.preprocessing.size,
        "mean": list(clip.preprocessing.mean),
        "std": list(clip.preprocessing.std),
        "interpolation": clip.preprocessing.interpolation,
        "resize_mode": clip.preprocessing.resize_mode,
        "resize": clip.preprocessing.size,
    }
    facts = json.loads((out / "export.json").read_text())
    assert facts["logit_scale"] == float(clip.logit_scale)
    assert facts["trained"] == [True, False]
    assert json.loads((out / "classes.json").read_text()) == ["one", "a cat"]


def test_a_graph_that_disagrees_is_not_left_behind(runs, tmp_path, monkeypatch):
    def off(module, images, file):
        file.write_bytes(b"a graph")

    monkeypatch.setitem(exporting.WRITE, "torch", off)
    wrong = {
        "slightly off": lambda images: oracle(images) + 0.05,
        "not a number": lambda images: oracle(images) * float("nan"),
        "of another shape": lambda images: oracle(images)[:1],
    }
    _, oracle = build_module(Classifier.load(runs("class"), device="cpu"), ("zero", "one"))
    for program in wrong.values():
        monkeypatch.setitem(exporting.RUN, "torch", lambda file, program=program: program)
        with pytest.raises(InputError, match=r"--format torch: the exported logits differ by"):
            export(runs("class"), tmp_path / "out", format="torch", classes=("zero", "one"))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tflite"}, "--format tflite: expected torch or onnx"),
        ({"classes": ("one",)}, "--classes one: expected at least 2 distinct names"),
        ({"classes": ("one", "one")}, "classes: 'one' is named 2 times, expected distinct names"),
        ({"classes": ("one", " ")}, "--classes one"),
        ({"classes": tuple(f"c{n}" for n in range(257))}, "--classes: 257, expected at most 256"),
    ],
)
def test_bad_input(runs, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        export(runs("image"), tmp_path / "out", **{"format": "torch"} | changes)
    assert not list(tmp_path.iterdir())


def test_a_filled_folder_is_refused(runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"OUT .*: expected a new or an empty folder"):
        export(runs("image"), tmp_path, format="torch")
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missing_library_is_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    pytest.importorskip("onnx")
    with pytest.raises(InputError, match=r"--format onnx: needs onnxscript.*lamp_fast\[export\]"):
        export(runs("image"), tmp_path / "out", format="onnx")
    assert not list(tmp_path.iterdir())
