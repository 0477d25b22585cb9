"""prefix_attention: implementations side by side, forward and forward with backward (medians).

Run with ``pytest benchmarks/bench_prefix_attention.py --benchmark-only``.
"""

import pytest
import torch

from lamp_fast import ops

CASES = {  # N, G, H, L, P, d, causal, blind
    "vision of the tiny CLIP, batch 32": (32, 32, 4, 17, 4, 32, False, 0),
    "text of the tiny CLIP, 32 images x 5 classes": (160, 32, 2, 12, 4, 32, True, 1),
    "vision of ViT-B/16, batch 4": (4, 4, 12, 197, 4, 64, False, 0),
    "text of ViT-B/16, 4 images x 50 classes": (200, 4, 8, 16, 4, 64, True, 1),
}


@pytest.mark.parametrize("impl", list(ops.implementations("prefix_attention")))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("case", CASES)
def bench_prefix_attention(benchmark, case, backward, impl):
    benchmark.group = f"{case}, {'forward-backward' if backward else 'forward'}"
    sequences, groups, heads, length, prefix, width, causal, blind = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = [(sequences, heads, length, width)] * 3 + [(groups, heads, prefix, width)] * 2
    tensors = [torch.randn(s, generator=generator, requires_grad=backward) for s in shapes]

    def attend(name):
        return ops.prefix_attention(*tensors, causal=causal, blind=blind, impl=name)

    def run():
        out = attend(impl)
        if backward:
            torch.autograd.grad(out.sum(), tensors)

    # float32 against float32: a few hundred roundings of values of size 1.
    assert torch.allclose(attend(impl), attend("reference"), rtol=0, atol=1e-4)
    benchmark(run)
