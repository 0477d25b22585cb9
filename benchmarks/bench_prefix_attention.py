"""prefix_attention on the CPU: the native code beside concatenate + torch's SDPA, the reference.

``pytest benchmarks/bench_prefix_attention.py --benchmark-only`` prints one table: medians over
rounds in which both run in turn, float32, forward without gradient and forward with backward. The
floor is what must be read and written (q, k, v, the output; in backward also its gradient and those
of q, k and v) at the speed of a large copy in the same rounds.
"""

import pytest
import torch

from benchmarks.side_by_side import Copy, medians, row
from lamp_fast import ops


def tree(rows: int, prefix: int) -> torch.Tensor:
    """bool [rows, P + rows]: the whole prefix and a row's ancestors, 4 to 9 with itself.

    Classes of 2 to 5 tokens, eot included, behind a template of 4.
    """
    generator = torch.Generator().manual_seed(0)
    visible = torch.eye(rows, dtype=torch.bool)
    visible[:, :4] = torch.ones(rows, 4).tril().bool()
    first = 4
    while first < rows:
        last = min(rows, first + int(torch.randint(2, 6, (1,), generator=generator)))
        visible[first:last, first:last] = visible.new_ones(last - first, last - first).tril()
        first = last
    return torch.cat([visible.new_ones(rows, prefix), visible], dim=1)


CASES = {  # N, G, H, R, L, P, d; the mask, or causal
    **{
        f"short rows N={n} L={length} P={prefix}": (n, g, 8, length, length, prefix, 64, "causal")
        for n, g in ((64, 4), (400, 4), (1600, 32), (6400, 128))
        for length, prefix in ((3, 9), (5, 9), (12, 8))
    },
    "causal rows N=64 L=32 P=8": (64, 4, 8, 32, 32, 8, 64, "causal"),
    "tiny CLIP's text N=160 L=12 P=4 H=2 d=32": (160, 32, 2, 12, 12, 4, 32, "causal"),
    "tree N=4 R=40 L=40 P=5": (4, 4, 8, 40, 40, 5, 64, "tree"),
    "tree N=4 R=170 L=170 P=5": (4, 4, 8, 170, 170, 5, 64, "tree"),
    "tree N=32 R=170 L=170 P=5": (32, 32, 8, 170, 170, 5, 64, "tree"),
    "last layer N=4 R=50 L=170 P=5": (4, 4, 8, 50, 170, 5, 64, "tree"),
    "last layer N=32 R=50 L=170 P=5": (32, 32, 8, 50, 170, 5, 64, "tree"),
    "vision N=4 L=197 P=4 H=12": (4, 4, 12, 197, 197, 4, 64, "all"),
    "tiny CLIP's vision N=32 L=17 P=4 H=4 d=32": (32, 32, 4, 17, 17, 4, 32, "all"),
}


class Case:
    """Inputs as a block has them: views of fused projections and of gathered prompts."""

    def __init__(self, name: str):
        sequences, groups, heads, rows, length, prefix, width, seen = CASES[name]
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator)

        q, k, v = normal(sequences, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        q = q if rows == length else normal(sequences, rows, heads, width).transpose(1, 2)
        prefixes = [normal(groups, prefix, heads, width).transpose(1, 2) for _ in range(2)]
        self.tensors = [each.detach().requires_grad_() for each in (q, k, v, *prefixes)]
        self.direction = normal(sequences, rows, heads, width).transpose(1, 2)
        self.options = {"causal": seen == "causal", "mask": None}
        if seen == "tree":
            ends = torch.linspace(length // rows, length - 1, rows).long()
            self.options["mask"] = tree(length, prefix)[ends]

    def forward(self, impl):
        with torch.no_grad():
            return ops.prefix_attention(*self.tensors, **self.options, impl=impl)

    def both(self, impl):
        out = ops.prefix_attention(*self.tensors, **self.options, impl=impl)
        return torch.autograd.grad(out, self.tensors, self.direction)

    def bytes(self, backward: bool) -> int:
        q, k, v, *_ = (each.numel() * each.element_size() for each in self.tensors)
        return 2 * q + k + v + (backward and 3 * q + 2 * (k + v))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("name", CASES)
def bench_prefix_attention(benchmark, tables, name, backward):
    case = Case(name)
    # float32 against float32: a few hundred roundings of values of size 1.
    torch.testing.assert_close(case.forward("cpp"), case.forward("reference"), rtol=0, atol=1e-4)
    work, copy = case.both if backward else case.forward, Copy()
    pieces = {"reference": lambda: work("reference"), "cpp": lambda: work("cpp"), "copy": copy}
    middle = medians(benchmark, pieces, rounds=7 if len(case.direction) > 1000 else 15)
    floor = case.bytes(backward) * middle["copy"] / copy.bytes
    direction = "forward + backward" if backward else "forward"
    tables["ops"].append(row(f"prefix_attention {name} {direction}", middle, floor))
