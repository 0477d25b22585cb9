"""Graphs and their files: traced by torch, written for ONNX Runtime or torch, perhaps quantised."""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lamp_fast import ops
from lamp_fast.export.settings import Format
from lamp_fast.extras import need

Runner = Callable[..., Tensor]

INPUTS = ("images", "class_features")
# What of a quantised weight's range is used: 7 bits, for on processors without VNNI the sum of two
# products of 8 bits each can overflow.
WEIGHT_STEPS, ACTIVATION_STEPS = 128, 255

_NEEDED = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
_AXES = {"images": "batch", "class_features": "classes"}
_PRODUCTS = ("MatMul", "Gemm")


class Program(nn.Module):
    """The inputs to logits [B, C]; all that it reads besides become constants of the graph.

    Args:
        logits: of pictures [B, 3, S, S] in ``dtype`` and perhaps float32 class features [C, D].
        dtype: what it computes in; pictures come as float32.
    """

    def __init__(self, logits: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits, self.dtype = logits, dtype

    def forward(self, images: Tensor, class_features: Tensor | None = None) -> Tensor:
        images = images.to(self.dtype)
        return (
            self.logits(images) if class_features is None else self.logits(images, class_features)
        )


def need_libraries(format: Format) -> None:
    """Refuse a format whose libraries are not installed.

    Raises:
        InputError: naming the first.
    """
    for name in _NEEDED[format]:
        need(f"--format {format}", name, "export")


def trace(module: nn.Module, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """``torch.export`` of any number of pictures and, as a second input, of classes."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # Whoever loads the graph has torch or ONNX Runtime, and none of our ops.
    before = ops.prefer("reference")
    axes = tuple({0: torch.export.Dim(_AXES[name])} for name, _ in _named(inputs))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own deprecations, nothing of ours
            return torch.export.export(module, tuple(inputs), dynamic_shapes=axes, strict=True)
    finally:
        ops.prefer(before)


def write_torch(module: nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
    """``torch.export`` with a dynamic batch: load with ``torch.export.load(file).module()``."""
    program = trace(module, inputs)
    content = io.BytesIO()
    torch.export.save(program, content)
    file.write_bytes(content.getvalue())


def write_onnx(module: nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
    """ONNX with a dynamic batch, inputs as :data:`INPUTS`, output ``logits``."""
    plain = {torch.ops.aten.sort.stable: _plain_sort, torch.ops.aten.index.Tensor: _plain_index}
    names = [name for name, _ in _named(inputs)]
    program = torch.onnx.export(
        trace(module, inputs).run_decompositions(plain),
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=tuple({0: _AXES[name]} for name in names),
        dynamo=True,
        verbose=False,
    )
    program.save(file)


def quantise(file: Path) -> None:
    """Rewrite an ONNX graph with its weights in int8, activations in uint8 by their range at run
    time (``quantize_dynamic``); sums are integers, everything between is float32.

    Every output channel has its own step. Products of two activations stay, and so does the last
    one, of features and classes: it is small, and logits hang on it directly.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    last = _last_products(onnx.load(file).graph)
    # It says on the root logger what one should do before it.
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            file,
            file,
            op_types_to_quantize=list(_PRODUCTS),
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=last,
        )
    finally:
        logger.setLevel(level)


def run_torch(file: Path) -> Runner:
    """The saved program, as whoever loads it runs it."""
    return torch.export.load(file).module()


def run_onnx(file: Path) -> Runner:
    """The saved graph in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: what it could not fold is no one's concern
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        given = {name: value.numpy() for name, value in _named(inputs)}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


WRITE = {"torch": write_torch, "onnx": write_onnx}
RUN = {"torch": run_torch, "onnx": run_onnx}


def _named(inputs: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return list(zip(INPUTS, inputs, strict=False))


def _plain_sort(
    values: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """The exporter knows plain sort alone, which becomes TopK: there too the lower index wins a
    tie."""
    return torch.ops.aten.sort.default(values, dim, descending)


def _plain_index(values: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    """Rows along one dimension as Gather.

    The exporter makes GatherND between two Transposes of it; of float16, loading those ends the
    process with ONNX Runtime 1.32 on a CPU (in its NchwcTransformer).
    """
    chosen = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(chosen) != 1 or chosen[0][1].dim() != 1 or chosen[0][1].dtype == torch.bool:
        return NotImplemented
    return torch.ops.aten.index_select.default(values, *chosen[0])


def _last_products(graph) -> list[str]:
    """The names of the products behind which there is no other one."""
    maker = {name: node for node in graph.node for name in node.output}
    found, seen = [], set()
    waiting = [output.name for output in graph.output]
    while waiting:
        node = maker.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type in _PRODUCTS:
            found.append(node.name)
        else:
            waiting.extend(node.input)
    return found
