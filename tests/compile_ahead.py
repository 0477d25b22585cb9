"""Compile the Triton kernels for GPUs that are not there, and tell what each would occupy.

The launchers run on tensors without data while their launches are recorded, so that what is
compiled is what would be launched. Run as a program it prints a table::

    python tests/compile_ahead.py [--full] [--only OP ...] [--target 80 90]
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lamp_fast.ops import dispatch

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: bytes of shared memory and of spills, registers a thread."""

    kernel: str
    case: str
    target: int
    warps: int
    shared: int
    registers: int
    spilled: int


def record(call) -> list[tuple]:
    """The launches (kernel, arguments, keywords) that a call makes, none of which runs."""
    launches = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *given, grid, warmup, **named: launches.append(
        (kernel, given, named)
    )
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def compile_launch(kernel, given, named, target: int):
    """As Triton's launcher does it: which arguments are constants, and what it knows of others."""
    names = kernel.arg_names
    values = dict(zip(names, given, strict=False)) | {n: v for n, v in named.items() if n in names}
    options = {name: value for name, value in named.items() if name not in names}
    constants, facts = {}, {}

    def describe(value, parameter, path):
        """The type of an argument, or of those in a tuple."""
        if isinstance(value, tuple):
            return tuple(describe(x, parameter, (*path, i)) for i, x in enumerate(value))
        known = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (known and value % 16 == 0):
            facts[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        return "i32" if abs(value) < 2**31 else "i64"

    signature = {
        parameter.name: describe(values[parameter.name], parameter, (index,))
        for index, parameter in enumerate(kernel.params)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=facts)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled, case: str, target: int) -> Compiled:
    """What the assembler reports."""
    cubin = Path(compiled.metadata_group[f"{compiled.metadata.name}.cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return Compiled(
        compiled.metadata.name,
        case,
        target,
        compiled.metadata.num_warps,
        compiled.metadata.shared,
        int(found["REG"]),
        int(found["STACK"]) + int(found["LOCAL"]),
    )


def _empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _retrieve(batch, pool_size, k, width):
    query, keys, bias = _empty(batch, width), _empty(pool_size, width), _empty(pool_size)
    indices, similarity, _ = torch.ops.lamp_fast.retrieve(query, keys, bias, k, "triton")
    _run("retrieve", query, keys, bias, k)
    _run("retrieve", query, keys, indices, similarity, similarity.clone(), backward=True)


def _prefix_attention(
    sequences, groups, heads, rows, length, prefix, width, dtype, *, causal=False, masked=False,
    indexed=False, needs=((True, True),),
):  # fmt: skip
    fused = _empty(sequences, length, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k, v = fused
    pool = _empty(groups, prefix, 2, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    tensors = q[:, :, length - rows :], k, v, *pool
    index = _empty(sequences, dtype=torch.int64) if indexed else None
    mask = _empty(rows, prefix + length, dtype=torch.bool) if masked else None
    options = index, mask, causal, int(causal), width**-0.5
    out, lse = torch.ops.lamp_fast.prefix_attention(*tensors, *options, "triton")
    _run("prefix_attention", *tensors, *options)
    for needed in needs:
        _run("prefix_attention", out, *tensors, out, lse, *options, *needed, backward=True)


def _gelu(op, dtype):
    x = _empty(25216, 3072, dtype=dtype)
    _run(op, x)
    _run(op, x, x, backward=True)


def _add_layer_norm(width, dtype):
    x, weight = _empty(25216, width, dtype=dtype), _empty(width, dtype=dtype)
    total, normed, mean, rstd = torch.ops.lamp_fast.add_layer_norm(
        x, x, weight, weight, 1e-5, "triton"
    )
    _run("add_layer_norm", x, x, weight, weight, 1e-5)
    for above in (None, total):
        _run("add_layer_norm", normed, above, total, weight, mean, rstd, backward=True)


def _run(op, *arguments, backward=False):
    """An implementation outside the dispatcher, which would not run it on tensors without data."""
    function = f"{op}_backward" if backward else op
    results = getattr(torch.ops.lamp_fast, function).default(*arguments, "triton")
    results = (results,) if isinstance(results, torch.Tensor) else results
    dispatch.load(op, "triton", function)(*arguments, *results)


def cases(full: bool) -> dict[str, object]:
    """Calls by name: the shapes of training ViT-B/16, or the product of what changes a launch."""
    some = torch.bfloat16
    chosen = {
        "retrieve M=20": lambda: _retrieve(128, 20, 6, 768),
        "retrieve M=256": lambda: _retrieve(128, 256, 32, 768),
        "attention vision": lambda: _prefix_attention(128, 128, 12, 197, 197, 8, 64, some),
        "attention tree": lambda: _prefix_attention(
            128, 128, 8, 200, 200, 9, 64, some, masked=True
        ),
        "attention short": lambda: _prefix_attention(
            6400, 128, 8, 12, 12, 8, 64, some, causal=True
        ),
        "attention float32": lambda: _prefix_attention(
            128, 128, 8, 200, 200, 9, 64, torch.float32, masked=True
        ),
        "quick_gelu": lambda: _gelu("quick_gelu", some),
        "gelu": lambda: _gelu("gelu", some),
        "add_layer_norm": lambda: _add_layer_norm(768, some),
    }
    if not full:
        return chosen
    product = {}
    for pool_size, k in ((1, 1), (64, 6), (128, 32), (256, 1)):
        product[f"retrieve M={pool_size} K={k}"] = (_retrieve, (32, pool_size, k, 768), {})
    for dtype in DTYPES:
        name = str(dtype)[6:]
        for op in ("quick_gelu", "gelu"):
            product[f"{op} {name}"] = (_gelu, (op, dtype), {})
        for width in (512, 768, 1024, 1280, 4096):
            product[f"add_layer_norm {width} {name}"] = (_add_layer_norm, (width, dtype), {})
        # float16 differs from bfloat16 in nothing that a launch depends on.
        for width in (64,) if dtype == torch.float16 else (32, 64, 80, 128):
            shapes = {
                "vision": ((16, 16, 12, 197, 197, 8), {}),
                "vision last row": ((16, 16, 12, 1, 197, 8), {}),
                "causal": ((16, 4, 8, 77, 77, 37), {"causal": True}),
                "tree": ((16, 16, 8, 200, 200, 9), {"masked": True}),
                "indexed": ((16, 4, 8, 77, 77, 9), {"indexed": True}),
                "short": ((160, 16, 8, 12, 12, 9), {"causal": True}),
                "short, wide prefix": ((160, 16, 8, 32, 32, 32), {"causal": True}),
                "short alone": ((16, 16, 8, 5, 5, 9), {"causal": True}),
                "frozen prompts": ((16, 16, 8, 77, 77, 0), {}),
                # Triton takes a size of 1 for a constant.
                "of ones, short": ((1, 1, 1, 1, 1, 1), {"causal": True}),
                "of ones, tree": ((1, 1, 1, 1, 1, 1), {"masked": True}),
                "of ones, long": ((1, 1, 1, 1, 77, 1), {"indexed": True, "causal": True}),
            }
            for shape, (sizes, options) in shapes.items():
                needs = [(True, sizes[5] > 0)]
                if shape in ("vision", "short"):
                    needs += [(True, False), (False, True)]
                product[f"attention {shape} d={width} {name}"] = (
                    _prefix_attention,
                    (*sizes, width, dtype),
                    options | {"needs": needs},
                )
    return chosen | {
        name: lambda call=call, given=given, named=named: call(*given, **named)
        for name, (call, given, named) in product.items()
    }


def compile_cases(full: bool, only: list[str], targets: list[int]) -> list[Compiled]:
    done, results = set(), []
    for case, call in cases(full).items():
        if only and not any(case.startswith(name) for name in only):
            continue
        for kernel, given, named in record(call):
            for target in targets:
                compiled = compile_launch(kernel, given, named, target)
                if compiled.hash not in done:
                    done.add(compiled.hash)
                    results.append(resources(compiled, case, target))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the product, minutes")
    parser.add_argument("--only", nargs="*", default=[], help="cases that begin so")
    parser.add_argument("--target", nargs="*", type=int, default=[80, 90])
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    results = compile_cases(chosen.full, chosen.only, chosen.target)
    if chosen.json:
        json.dump([asdict(each) for each in results], sys.stdout)
        return
    print(f"{'kernel':36} {'sm':>3} {'warps':>5} {'shared':>7} {'regs':>4} {'spilled':>7}  case")
    for each in results:
        print(
            f"{each.kernel:36} {each.target:3} {each.warps:5} {each.shared:7} {each.registers:4}"
            f" {each.spilled:7}  {each.case}"
        )


if __name__ == "__main__":
    main()
