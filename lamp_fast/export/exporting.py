"""A trained run as one graph: what ``python -m lamp_fast.export`` does.

The graph takes normalised pictures, float32 [B, 3, S, S] of any B from 1, and gives logits [B, C];
what a serving program needs beside it (preprocessing, class names, logit scale) is written as JSON.
With the text side inside, its classes are constants, or part of the graph where every picture has
its own text; beside it, they are a matrix that can be exchanged.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

import lamp_fast
from lamp_fast.classifier import Classifier
from lamp_fast.data.views import centre_view, used_preprocessing
from lamp_fast.errors import InputError
from lamp_fast.export.bounds import (
    Comparison,
    compare,
    float16_error,
    float32_error,
    int8_error,
    random_pictures,
    tolerance,
)
from lamp_fast.export.graphs import RUN, WRITE, Program, need_libraries, quantise
from lamp_fast.export.settings import CLASS_FEATURES, FILES, Format, Precision, TextSide
from lamp_fast.fields import to_json
from lamp_fast.files import write_json
from lamp_fast.methods.fixed import without_parameters

MAX_CLASSES = 256
"""With text per picture the graph computes every class for every picture, and cannot work in blocks
as the package does: memory grows with B times C, so C is bounded."""

_TRACED_BATCH = 3


@dataclass(frozen=True)
class Built:
    """What is exported, before an exporter saw it.

    Attributes:
        module: pictures float32 [B, 3, S, S], and ``class_features`` where there are any, to logits
            float32 [B, C], in plain torch ops.
        oracle: the method's own float32 logits of pictures for the same classes.
        class_features: float32 [C, D]; None with the text side inside.
    """

    module: nn.Module
    oracle: Callable[[Tensor], Tensor]
    class_features: Tensor | None = None

    def inputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """All of the module's, for pictures."""
        return (images,) if self.class_features is None else (images, self.class_features)


@torch.no_grad()
def build_module(
    classifier: Classifier,
    classes: tuple[str, ...],
    precision: Precision = "fp32",
    text_side: TextSide = "inside",
) -> Built:
    """The module that is exported, and its oracle.

    Args:
        classifier: on the CPU; it is cast to float32.
        classes: at least two distinct names.
        precision: "fp16" computes the towers in float16 with weights in float16; class features,
            what was learned beside the towers, cosines and logits stay float32, as in training.
            "int8" is float32 here and quantised later.
        text_side: "inside", or otherwise as a matrix.

    Raises:
        InputError: a matrix of a method that has none; too many classes with text per picture.
    """
    method = classifier.method.float()
    method.clip.float()
    check_text_side(classifier, classes, text_side)
    adapted = classifier.bias_for(classes) == "adapted"
    prepared = method.prepare(classes, classifier.template, classifier.origin)
    clip = without_parameters(method.clip)
    if precision == "fp16":
        clip = clip.half()

    def oracle(images: Tensor) -> Tensor:
        return method.logits(images, prepared, adapted)

    if text_side == "inside":
        logits = method.fixed_logits(clip, prepared, adapted)
        return Built(Program(logits, clip.dtype).eval(), oracle)
    sides = method.fixed_sides(clip, prepared, adapted)
    scale, pictures = clip.logit_scale, sides.pictures
    module = Program(lambda images, texts: scale * pictures(images) @ texts.T, clip.dtype)
    return Built(module.eval(), oracle, sides.classes.float().contiguous())


def check_text_side(classifier: Classifier, classes: tuple[str, ...], text_side: TextSide) -> None:
    """Refuse what the method has no graph for.

    Raises:
        InputError: see :func:`build_module`.
    """
    method, name = classifier.method, classifier.config.method
    reason = method.no_class_matrix
    if text_side != "inside" and reason is not None:
        raise InputError(f"--text-side {text_side}: expected inside; of --method {name} {reason}")
    if method.text_per_picture and len(classes) > MAX_CLASSES:
        raise InputError(
            f"--classes: {len(classes)}, expected at most {MAX_CLASSES} with --method {name},"
            f" where memory grows with pictures times classes: {reason}"
        )


def export(
    run: Path,
    out: Path,
    *,
    format: Format = "onnx",
    classes: tuple[str, ...] | None = None,
    precision: Precision = "fp32",
    text_side: TextSide = "inside",
) -> Comparison | None:
    """Export a run into the new folder ``out``, after checking the result against the method.

    Args:
        run: the run folder, or what ``save_pretrained`` wrote.
        out: where to; made whole, or not at all.
        format: "onnx" or "torch" (``torch.export``).
        classes: the classes, trained or not; by default the trained ones.
        precision: "fp32", "fp16", or "int8" (ONNX alone).
        text_side: "inside" the graph; "beside" it, as the matrix ``class_features.npy`` that is the
            graph's second input; or "alone", that matrix for other classes without a graph.

    Returns:
        How the graph compares with the method on random pictures; None for a matrix alone.

    Raises:
        InputError: what cannot be served, a library that is missing, a folder that is not empty, or
            an exported program that disagrees with the method.
    """
    _check_choices(format, precision, text_side)
    if text_side != "alone":
        need_libraries(format)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"OUT {out}: expected a new or an empty folder")
    # Cast afterwards, weights would be as low precision rounded them.
    classifier = Classifier.load(run, device="cpu", precision="fp32")
    names = classifier.trained_names if classes is None else tuple(classes)
    if len(names) < 2 or not all(each.strip() for each in names):
        raise InputError(f"--classes {' '.join(names)}: expected at least 2 distinct names")
    classifier.check_names(names)
    built = build_module(classifier, names, precision, text_side)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        facts, comparison = {}, None
        if text_side != "alone":
            file = unfinished / FILES[format]
            comparison = _write_graph(built, classifier, file, format, precision)
            facts = _graph_facts(built, classifier, names, format, precision, comparison)
        _write_beside(unfinished, built, classifier, names, facts)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return comparison


def _check_choices(format: str, precision: str, text_side: str) -> None:
    choices = (
        ("--format", format, tuple(FILES)),
        ("--precision", precision, get_args(Precision)),
        ("--text-side", text_side, get_args(TextSide)),
    )
    for flag, value, known in choices:
        if value not in known:
            raise InputError(f"{flag} {value}: expected {' or '.join(known)}")
    if precision == "int8" and format != "onnx":
        raise InputError(f"--precision int8: expected --format onnx, got --format {format}")


@torch.no_grad()
def _write_graph(
    built: Built, classifier: Classifier, file: Path, format: Format, precision: Precision
) -> Comparison:
    """Write, load, compare.

    Raises:
        InputError: beyond the bound of the precision.
    """
    method = classifier.method
    traced_with = built.inputs(random_pictures(classifier, _TRACED_BATCH))
    WRITE[format](built.module, traced_with, file)
    if precision == "int8":
        quantise(file)
        error = int8_error(built.module, traced_with)
    else:
        error = (float16_error if precision == "fp16" else float32_error)(method.clip)
    program = RUN[format](file)
    comparison = compare(
        lambda images: program(*built.inputs(images)), built.oracle, classifier, error
    )
    allowed = tolerance(method, error)
    if not comparison.difference <= allowed:
        raise InputError(
            f"--format {format}: the exported logits differ by {comparison.difference:.2e},"
            f" expected at most {allowed:.2e} with --precision {precision}; nothing was written"
        )
    return comparison


def _graph_facts(
    built: Built,
    classifier: Classifier,
    names: tuple[str, ...],
    format: Format,
    precision: Precision,
    comparison: Comparison,
) -> dict[str, Any]:
    side = classifier.method.clip.preprocessing.size
    columns = len(names) if built.class_features is None else "classes"
    return {
        "format": format,
        "file": FILES[format],
        "precision": precision,
        "input": {"name": "images", "dtype": "float32", "shape": ["batch", 3, side, side]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", columns]},
        "largest_difference": comparison.difference,
        "same_first_class": comparison.agreement,
    }


def _write_beside(
    folder: Path, built: Built, classifier: Classifier, names: tuple[str, ...], facts: dict
) -> None:
    clip = classifier.method.clip
    views = classifier.config.views
    preprocessing = asdict(used_preprocessing(views, clip.preprocessing))
    resize = centre_view(views, clip.preprocessing.size).resize or clip.preprocessing.size
    write_json(folder / "preprocessing.json", {**preprocessing, "resize": resize})
    write_json(folder / "classes.json", list(names))
    if built.class_features is not None:
        width = built.class_features.shape[1]
        np.save(folder / CLASS_FEATURES, built.class_features.numpy(), allow_pickle=False)
        facts["class_input"] = {
            "name": "class_features",
            "dtype": "float32",
            "shape": ["classes", width],
            "file": CLASS_FEATURES,
        }
    facts |= {
        "logit_scale": float(clip.logit_scale),
        "template": classifier.template,
        "words": None if (words := classifier.origin.words) is None else to_json(words),
        "trained": list(classifier.are_trained(names)),
        "bias": classifier.bias_for(names),
        "learned": _learned(classifier),
        "version": lamp_fast.__version__,
        "torch": torch.__version__,
        "clip": dict(classifier.record["clip"]),
    }
    write_json(folder / "export.json", facts)


def _learned(classifier: Classifier) -> str:
    """sha256 of what the run learned: a graph and a matrix go together where it is the same."""
    digest = hashlib.sha256()
    for name, value in sorted(classifier.method.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = [
    "CLASS_FEATURES",
    "MAX_CLASSES",
    "Built",
    "Comparison",
    "build_module",
    "check_text_side",
    "export",
]
