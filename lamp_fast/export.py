"""``python -m lamp_fast.export RUN OUT``: a trained run as one graph for a fixed set of classes.

The graph takes normalised pictures, float32 [B, 3, S, S] of any B from 1, and gives logits [B, C];
what a serving program needs beside it (preprocessing, class names, logit scale) is written as JSON.
Retrieval is inside. With ``--text-query class``, as for zero-shot, the text side is a constant;
with ``image`` it is part of the graph, every picture with its own text.
"""

import copy
import importlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

import lamp_fast
from lamp_fast import cli, ops
from lamp_fast.classifier import Classifier
from lamp_fast.clip import FrozenClip
from lamp_fast.errors import InputError
from lamp_fast.files import write_json
from lamp_fast.methods import Lamp, ZeroShot
from lamp_fast.methods.lamp.export import fixed_logits

MAX_CLASSES = 256
"""With text per image the graph computes every class for every picture, and cannot work in blocks
as the package does: memory grows with B times C, so C is bounded."""

FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
# One picture is a size of its own to an exporter; the other is larger than the one traced with.
CHECKED_BATCHES = (1, 5)
_TRACED_BATCH = 3
_NEEDED = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}


class Program(nn.Module):
    """Pictures [B, 3, S, S] to logits [B, C]; all that it reads besides become its constants."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)


def _without_parameters(clip: FrozenClip) -> FrozenClip:
    """A copy that shares its weights as buffers, of which a graph keeps those alone that it reads
    (folded ones are not stored twice); torch 2.11 refuses parameters of no module."""
    plain = {id(weight): weight.detach() for weight in clip.parameters()}
    clip = copy.deepcopy(clip, plain)
    for module in clip.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight)
    return clip


@torch.no_grad()
def build_module(classifier: Classifier, classes: tuple[str, ...]) -> tuple[nn.Module, Any]:
    """The float32 module that is exported, in plain torch ops, and its oracle.

    Args:
        classifier: on the CPU; it is cast to float32.
        classes: at least two distinct names.

    Returns:
        The module, images float32 [B, 3, S, S] to logits [B, C]; the method's own
        ``images -> logits`` for the same classes.

    Raises:
        InputError: a method without such a graph, or too many classes with text per image.
    """
    method = classifier.method.float()
    method.clip.float()
    adapted = classifier.bias_for(classes) == "adapted"
    prepared = method.prepare(classes, classifier.template, classifier.origin)
    clip = _without_parameters(method.clip)
    if isinstance(method, ZeroShot):
        logits = partial(ZeroShot(clip).logits, classes=prepared)
    elif isinstance(method, Lamp):
        if method.config.text_query == "image" and len(classes) > MAX_CLASSES:
            raise InputError(
                f"--classes: {len(classes)}, expected at most {MAX_CLASSES} with text per image,"
                " where memory grows with pictures times classes; --text-query class has no such"
                " bound"
            )
        logits = fixed_logits(method, clip, prepared, adapted)
    else:
        raise InputError(
            f"RUN: its method is {classifier.config.method}, expected lamp or zeroshot"
        )
    return Program(logits).eval(), lambda images: method.logits(images, prepared, adapted)


def tolerance(clip: FrozenClip) -> float:
    """How far float32 logits of two correct programs can lie apart.

    Each of N blocks (both towers) adds to the residual stream sums of at most n = 4 width terms,
    whose roundings, of 2^-24 each, walk to about sqrt(n) 2^-24 of their size; pre-norm blocks pass
    earlier errors on without enlarging them. So features differ by about N sqrt(n) 2^-24 of their
    length, cosines by no more than twice that, logits by the logit scale times as much.
    """
    blocks = len(clip.vision.blocks) + len(clip.text.blocks)
    terms = 4 * max(clip.vision.width, clip.text.width)
    return float(clip.logit_scale) * 2 * blocks * terms**0.5 * 2.0**-24


def largest_difference(
    program: Callable[[Tensor], Tensor], classifier: Classifier, oracle: Callable[[Tensor], Tensor]
) -> float:
    """Largest difference of logits on random pictures, at every size in ``CHECKED_BATCHES``."""
    differences = []
    for count in CHECKED_BATCHES:
        images = random_pictures(classifier, count)
        expected = oracle(images)
        got = program(images)
        if got.shape != expected.shape:
            return float("inf")
        difference = (got.double() - expected.double()).abs().max()
        differences.append(float(difference.nan_to_num(float("inf"))))
    return max(differences)


def random_pictures(classifier: Classifier, count: int) -> Tensor:
    """Seeded noise, float32 [count, 3, S, S], normalised as pictures are.

    Pictures whose retrieval hangs on a rounding are redrawn: of two all but equal scores either may
    win, and the logits then differ by more than any rounding.
    """
    size = classifier.method.clip.preprocessing.size
    generator = torch.Generator().manual_seed(count)
    kept: list[Tensor] = []
    while len(kept) < count:
        picture = torch.randn(1, 3, size, size, generator=generator)
        noise = 1e-5 * torch.randn(picture.shape, generator=generator)
        if _routes(classifier, picture) == _routes(classifier, picture + noise):
            kept.append(picture)
    return torch.cat(kept)


def _routes(classifier: Classifier, images: Tensor) -> list[list[list[int]]]:
    method = classifier.method
    return [each.tolist() for each in method.routes(images)] if isinstance(method, Lamp) else []


def write_torch(module: nn.Module, images: Tensor, file: Path) -> None:
    """``torch.export`` with a dynamic batch: load with ``torch.export.load(file).module()``."""
    program = _traced(module, images)
    content = io.BytesIO()
    torch.export.save(program, content)
    file.write_bytes(content.getvalue())


def write_onnx(module: nn.Module, images: Tensor, file: Path) -> None:
    """ONNX with a dynamic batch, input ``images``, output ``logits``."""
    # The exporter knows plain sort alone, which becomes TopK: there too the lower index wins a tie.
    plain = {torch.ops.aten.sort.stable: _plain_sort}
    program = torch.onnx.export(
        _traced(module, images).run_decompositions(plain),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    program.save(file)


def run_torch(file: Path) -> Callable[[Tensor], Tensor]:
    """The saved program, as whoever loads it runs it."""
    return torch.export.load(file).module()


def run_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """The saved graph in ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


WRITE = {"torch": write_torch, "onnx": write_onnx}
RUN = {"torch": run_torch, "onnx": run_onnx}


def export(
    run: Path,
    out: Path,
    *,
    format: Literal["onnx", "torch"] = "onnx",
    classes: tuple[str, ...] | None = None,
) -> float:
    """Export a run into the new folder ``out``, after checking the result against the method.

    Args:
        run: the run folder, or what ``save_pretrained`` wrote.
        out: where to; made whole, or not at all.
        format: "onnx" or "torch" (``torch.export``).
        classes: the fixed classes, trained or not; by default the trained ones.

    Returns:
        The largest difference of logits, on random pictures at two batch sizes.

    Raises:
        InputError: what cannot be served, a library that is missing, a folder that is not empty, or
            an exported program that disagrees with the method.
    """
    if format not in FILES:
        raise InputError(f"--format {format}: expected {' or '.join(FILES)}")
    _need(format)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"OUT {out}: expected a new or an empty folder")
    # Cast afterwards, weights would be as low precision rounded them.
    classifier = Classifier.load(run, device="cpu", precision="fp32")
    names = classifier.trained_names if classes is None else tuple(classes)
    if len(names) < 2 or not all(each.strip() for each in names):
        raise InputError(f"--classes {' '.join(names)}: expected at least 2 distinct names")
    classifier.check_names(names)
    module, oracle = build_module(classifier, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        file = unfinished / FILES[format]
        with torch.no_grad():
            WRITE[format](module, random_pictures(classifier, _TRACED_BATCH), file)
            difference = largest_difference(RUN[format](file), classifier, oracle)
        allowed = tolerance(classifier.method.clip)
        if not difference <= allowed:
            raise InputError(
                f"--format {format}: the exported logits differ by {difference:.2e}, expected at"
                f" most {allowed:.2e}; nothing was written"
            )
        _write_facts(unfinished, classifier, names, format, difference)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return difference


def _traced(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Whoever loads the graph has torch or ONNX Runtime, and none of our ops.
    before = ops.prefer("reference")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations, nothing of ours
            return torch.export.export(
                module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=True
            )
    finally:
        ops.prefer(before)


def _plain_sort(
    values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.sort.default(values, dim, descending)


def _need(format: str) -> None:
    for name in _NEEDED[format]:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(
                f"--format {format}: needs {name}, which is not installed;"
                " pip install 'lamp_fast[export]'"
            ) from None


def _write_facts(
    folder: Path, classifier: Classifier, names: tuple[str, ...], format: str, difference: float
) -> None:
    clip = classifier.method.clip
    side = clip.preprocessing.size
    write_json(folder / "preprocessing.json", asdict(clip.preprocessing))
    write_json(folder / "classes.json", list(names))
    facts = {
        "format": format,
        "file": FILES[format],
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", 3, side, side]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(names)]},
        "logit_scale": float(clip.logit_scale),
        "template": classifier.template,
        "trained": list(classifier.are_trained(names)),
        "bias": classifier.bias_for(names),
        "largest_difference": difference,
        "version": lamp_fast.__version__,
        "torch": torch.__version__,
        "clip": dict(classifier.record["clip"]),
    }
    write_json(folder / "export.json", facts)


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained run as one graph for a fixed set of classes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """A new folder for the graph and what belongs to it."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx (needs the export extra), or torch for a torch.export program."""
    classes: tuple[str, ...] | None = None
    """The class names, trained or not; by default the trained ones."""


def main(config: ExportConfig) -> int:
    """Export, check, and say how well the two agree."""
    difference = export(config.run, config.out, format=config.format, classes=config.classes)
    cli.say(
        f"{config.out / FILES[config.format]}: largest difference of logits {difference:.1e}"
        f" on random pictures, batches of {' and '.join(map(str, CHECKED_BATCHES))}"
    )
    return 0


if __name__ == "__main__":
    cli.run(ExportConfig, main, sys.argv[1:], prog="python -m lamp_fast.export")
