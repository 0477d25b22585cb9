"""Exported graphs give the method's logits, for any batch, or leave nothing behind."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lamp_fast import train
from lamp_fast.classifier import Classifier
from lamp_fast.errors import InputError
from lamp_fast.export import graphs
from lamp_fast.export.bounds import float16_error, int8_error, random_pictures, tolerance
from lamp_fast.export.exporting import build_module, export
from lamp_fast.export.graphs import run_onnx, run_torch
from lamp_fast.export.settings import CLASS_FEATURES
from lamp_fast.methods import METHODS
from lamp_fast.methods.zeroshot import ZeroShot
from lamp_fast.runs import figures
from lamp_fast.runs.config import TrainConfig, apply_preset

FILES = {"classes.json", "export.json", "preprocessing.json"}
CLASSES = ("bread", "cheese", "ham", "salad")  # two base, two new
NAMES = ("bread", "a cat", "seven")  # trained and not
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders of noise; of the first class more than of the second."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, counts in (("train", (5, 2, 2, 2)), ("test", (2, 2, 2, 2))):
        for name, count in zip(CLASSES, counts, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A short run of every method on those pictures, made when first asked for."""
    made = {}

    def run(method):
        if method not in made:
            out = tmp_path_factory.mktemp("runs") / method
            flags = ["--method", method, "--data", "folder", "--root", str(pictures)]
            flags += ["--clip", "tiny", "--split", "base-new", "--out", str(out), "--threads", "1"]
            if method != "zeroshot":
                flags += ["--epochs", "1", "--batch", "3", "--warmup-epochs", "0"]
            with pytest.MonkeyPatch.context() as patch:
                for name in ("plot_curves", "plot_per_class"):
                    patch.setattr(figures, name, lambda *_: None)
                assert train.main(train.read_flags(flags)) == 0
            made[method] = out
        return made[method]

    return run


def moved(run):
    """A loaded run whose weights are far from where training starts, the same at every call."""
    classifier = Classifier.load(run, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in classifier.method.parameters():
            size = weight.abs().mean().clamp_min(0.01)
            weight += 0.3 * size * torch.randn(weight.shape, generator=generator)
    return classifier


def some_slow(every, *fast):
    """All as parameters; but for some they are slow ones."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in every]


def load(run, kind):
    classifier = Classifier.load(run, device="cpu")
    if kind == "zeroshot":
        classifier.method = ZeroShot(classifier.method.clip)
    return classifier


def check(classifier, program, names, error=None):
    """The oracle is the method, loaded anew, in float64; ``error`` is relative, of the features."""
    method = classifier.method
    allowed = tolerance(method, error)
    batches = [random_pictures(classifier, size, error or 1e-5) for size in (1, 2, 6)]
    method.double()
    method.clip.double()
    adapted = classifier.bias_for(names) == "adapted"
    classes = method.prepare(names, classifier.template, classifier.origin)
    for images in batches:
        got = program(images)
        assert got.dtype == torch.float32
        assert got.shape == (len(images), len(names))
        expected = method.logits(images.double(), classes, adapted)
        # Of logits that spread over several units: a tolerance that can fail.
        assert allowed < (0.01 if error is None else 10)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize(
    "kind", some_slow(("image", "class", "shared-only", "zeroshot"), "image", "zeroshot")
)
def test_the_module_is_the_method(runs, kind):
    """Without an exporter in between, so that a disagreement has one place to be."""
    names = ("four", "a cat", "seven")
    run = runs("image" if kind == "zeroshot" else kind)
    built = build_module(load(run, kind), names)
    with torch.no_grad():
        check(load(run, kind), built.module, names)


@pytest.mark.parametrize(
    "method", some_slow(METHODS, "maple", "candle", "lift", "tip", "lp++", "mmrl")
)
def test_every_method_is_its_module(trained, method):
    run = trained(method)
    loaded = Classifier.load(run, device="cpu")
    names = NAMES if loaded.method.entry.no_new_names is None else loaded.trained_names
    with torch.no_grad():
        built = build_module(moved(run), names)
        check(moved(run), built.module, names)
        halved = build_module(moved(run), names, "fp16")
        check(moved(run), halved.module, names, float16_error(loaded.method.clip))
        # It is float16 that computes, or the two would be equal to rounding.
        images = random_pictures(moved(run), 4)
        difference = (built.module(images) - halved.module(images)).abs().max()
        assert difference > 100 * 2**-24


def with_classes(module, matrix):
    return lambda images: module(images, matrix)


@pytest.mark.parametrize(
    "method",
    some_slow(("lamp-class", *METHODS), "coop", "linear-probe"),
)
def test_swapped_names_are_those_exported_anew(trained, runs, method):
    """The picture side of one list of names, the classes of others."""
    run = runs("class") if method == "lamp-class" else trained(method)
    ours = Classifier.load(run, device="cpu")
    reason = ours.method.no_class_matrix
    trained_names = ours.trained_names
    if reason is not None:
        with pytest.raises(InputError, match=f"--text-side beside: expected inside.*{reason}"):
            build_module(ours, trained_names, text_side="beside")
        return
    with torch.no_grad():
        beside = build_module(moved(run), trained_names, text_side="beside")
        for names in (trained_names, ("a dog", *NAMES), tuple(reversed(trained_names))):
            alone = build_module(moved(run), names, text_side="alone")
            program = with_classes(beside.module, alone.class_features)
            check(moved(run), program, names)
            anew = build_module(moved(run), names).module
            images = random_pictures(moved(run), 4)
            allowed = tolerance(ours.method)
            torch.testing.assert_close(program(images), anew(images), rtol=0, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_onnx(trained, method, precision, tmp_path):
    """With the text inside, and beside where that goes: there new names without a new graph."""
    pytest.importorskip("onnxruntime")
    run, out = trained(method), tmp_path / "inside"
    comparison = export(run, out, classes=NAMES, precision=precision)
    facts = json.loads((out / "export.json").read_text())
    assert facts["largest_difference"] == comparison.difference
    assert facts["precision"] == precision

    def new():
        return Classifier.load(run, device="cpu")

    built = build_module(new(), NAMES)
    error = {"fp32": None, "fp16": float16_error(new().method.clip)}.get(precision)
    if precision == "int8":
        error = int8_error(built.module, (random_pictures(new(), 3),))
    check(new(), run_onnx(out / "model.onnx"), NAMES, error)
    if new().method.no_class_matrix is None:
        names = ("a dog", *NAMES)
        export(run, tmp_path / "beside", precision=precision, text_side="beside")
        export(run, tmp_path / "alone", classes=names, text_side="alone")
        matrix = torch.from_numpy(np.load(tmp_path / "alone" / CLASS_FEATURES))
        program = run_onnx(tmp_path / "beside" / "model.onnx")
        check(new(), with_classes(program, matrix), names, error)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_torch(trained, method, precision, tmp_path):
    run = trained(method)
    export(run, tmp_path / "out", classes=NAMES, format="torch", precision=precision)
    classifier = Classifier.load(run, device="cpu")
    error = float16_error(classifier.method.clip) if precision == "fp16" else None
    check(classifier, run_torch(tmp_path / "out" / "model.pt2"), NAMES, error)


def test_int8_has_the_steps_of_its_bound(trained, tmp_path):
    """A weight of known steps: each channel is off by at most half a step, and the last product,
    of features and classes, stays as it was."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weight = torch.tensor([[0.5, -1.0, 0.25], [30.0, 7.0, -64.0]]).T.contiguous()  # [in, out]
    classes = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).T.contiguous()
    module = graphs.Program(lambda x: x.mean((2, 3)) @ weight @ classes)
    images = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "model.onnx"
    graphs.write_onnx(module, (images,), file)
    graphs.quantise(file)
    graph = onnx.load(file).graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    (rounded,) = [each for each in stored.values() if each.dtype == np.int8 and each.ndim == 2]
    (step,) = [each for name, each in stored.items() if name.endswith("_scale")]
    np.testing.assert_allclose(step, 2 * weight.abs().amax(0).numpy() / graphs.WEIGHT_STEPS)
    assert (np.abs(rounded * step - weight.numpy()) <= step / 2 + 1e-6).all()
    kept = [each for each in stored.values() if each.dtype == np.float32 and each.shape == (2, 4)]
    np.testing.assert_array_equal(kept, [classes.numpy()])
    # relative errors: uniform in a step, of the product's size
    x = images.mean((2, 3))
    own = (((x.max() - x.min()) / 255).square() / 12 / x.square().mean()).item()
    its = ((torch.tensor([1 / 64, 1.0]).square() / 12).mean() / weight.square().mean()).item()
    middle = x @ weight
    own += (((middle.max() - middle.min()) / 255).square() / 12 / middle.square().mean()).item()
    steps = classes.abs().amax(0) / 64
    its += ((steps.square() / 12).mean() / classes.square().mean()).item()
    assert int8_error(module, (images,)) == pytest.approx((own + its) ** 0.5, rel=1e-5)


def code_of(document, *words):
    """The Python of the document's blocks, in order, that hold all of some words."""
    text = (Path(__file__).parents[2] / "docs" / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return [block for block in blocks if all(word in block for word in words)]


@pytest.mark.slow
def test_what_the_documents_serve_it_with(runs, tmp_path, monkeypatch, capsys):
    """ONNX Runtime and numpy alone give the answers of the package, with exchanged names, too."""
    pytest.importorskip("onnxruntime")
    run, names = runs("class"), ("five", "a cat", "nine")
    export(run, tmp_path / "exported", text_side="inside", precision="fp16")
    export(run, tmp_path / "served", text_side="beside")
    export(run, tmp_path / "zoo", classes=names, text_side="alone")
    assert {each.name for each in (tmp_path / "zoo").iterdir()} == FILES | {CLASS_FEATURES}
    monkeypatch.chdir(tmp_path)
    (inside,) = code_of("commands.md", "onnxruntime", "exported/model.onnx")
    (beside,) = code_of("commands.md", "class_features")
    for code in (inside, beside):
        imported = set(re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE))
        assert imported <= {"json", "numpy", "onnxruntime"}
        assert len([line for line in code.splitlines() if line.strip()]) <= 12
    classifier = Classifier.load(run, device="cpu")
    size = classifier.method.clip.preprocessing.size
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    known = {"pictures": pictures}
    for code, asked, error in ((inside, None, float16_error), (beside, names, None)):
        exec(code, known)
        answers = classifier.classify(pictures, asked, top=10)
        asked = asked or classifier.trained_names
        order = [[answer.names.index(name) for name in asked] for answer in answers]
        expected = np.array(
            [
                [answer.probabilities[place] for place in places]
                for answer, places in zip(answers, order, strict=True)
            ]
        )
        got = torch.from_numpy(known["logits"]).softmax(1).numpy()
        # A logit's error of e changes a probability p by at most 2 e p (1 - p) <= e / 2.
        method = classifier.method
        allowed = tolerance(method, error and error(method.clip)) / 2
        np.testing.assert_allclose(got, expected, rtol=0, atol=allowed)
        assert capsys.readouterr().out.strip() == str([answer.names[0] for answer in answers])


def test_a_graph_has_none_of_our_ops(runs):
    """Text per image, whose short rows the C++ kernel serves outside of a graph."""
    classifier = load(runs("image"), "image")
    built = build_module(classifier, ("one", "two"))
    with torch.no_grad():
        graph = graphs.trace(built.module, built.inputs(random_pictures(classifier, 3))).graph
    targets = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not [each for each in targets if "lamp_fast" in each]


@pytest.mark.parametrize("kind", [pytest.param("image", marks=pytest.mark.slow), "class"])
def test_torch_export(runs, kind, tmp_path):
    out = tmp_path / "exported"
    difference = export(runs(kind), out, format="torch").difference
    assert {each.name for each in out.iterdir()} == FILES | {"model.pt2"}
    classifier = load(runs(kind), kind)
    names = tuple(json.loads((out / "classes.json").read_text()))
    assert names == classifier.trained_names
    assert difference <= tolerance(classifier.method)
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
    def off(module, inputs, file):
        file.write_bytes(b"a graph")

    monkeypatch.setitem(graphs.WRITE, "torch", off)
    wrong = {
        "slightly off": lambda images: oracle(images) + 0.05,
        "not a number": lambda images: oracle(images) * float("nan"),
        "of another shape": lambda images: oracle(images)[:1],
    }
    oracle = build_module(Classifier.load(runs("class"), device="cpu"), ("zero", "one")).oracle
    for program in wrong.values():
        monkeypatch.setitem(graphs.RUN, "torch", lambda file, program=program: program)
        with pytest.raises(InputError, match=r"--format torch: the exported logits differ by"):
            export(runs("class"), tmp_path / "out", format="torch", classes=("zero", "one"))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tflite"}, "--format tflite: expected torch or onnx"),
        ({"precision": "fp8"}, "--precision fp8: expected fp32 or fp16 or int8"),
        ({"precision": "int8"}, "--precision int8: expected --format onnx, got --format torch"),
        ({"text_side": "left"}, "--text-side left: expected inside or beside or alone"),
        ({"text_side": "alone"}, "--text-side alone: expected inside; of --method lamp every pict"),
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
