"""MaPLe, MMRL and LIFT by their equations in plain torch: as fast as anyone could make them.

Nothing of this package's ops is in them. Sequences are batch-first; attention is torch's SDPA,
causal where text is; text ends at the longest prompt of the class list; the frozen towers compute
in the CLIP's dtype, bfloat16 if that is asked for; what is frozen and the same in every step is
computed once; the optimiser is torch's fused one, with the published rates; and
``Contest(..., compiled=True)`` puts forward and backward through torch.compile (max-autotune on a
GPU, which also captures CUDA graphs; its default mode on a CPU). Adapters and prompts are float32,
or float64 over a float64 CLIP.
"""

from benchmarks.rivals.contest import RIVALS, Contest

__all__ = ["RIVALS", "Contest"]
