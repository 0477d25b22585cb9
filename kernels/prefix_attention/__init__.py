"""prefix_attention, forward and backward, for long sequences and for many short ones.

A *long* launch (:mod:`.long`) gives a block of one sequence's rows to each program, which walks
over the prefix and then over the sequence's keys with an online softmax. A *short* launch
(:mod:`.short`) packs several sequences of one group into a tile whose mask is block-diagonal, so
that tensor cores see full tiles, and its backward is a single pass. Both write what they find for a
shared prefix into float32 partial sums, which one kernel (:mod:`.sums`) adds in the order of the
sequences: two runs give the same bits.

A tensor comes as a tuple with its strides of sequence, head and row; d is contiguous. In shapes, R
is a tile's query rows, L its keys of the sequence, P its rows of the prefix, and d the padded width
of a head.
"""

from lamp_fast.kernels.prefix_attention.launch import prefix_attention, prefix_attention_backward

__all__ = ["prefix_attention", "prefix_attention_backward"]
