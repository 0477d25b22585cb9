"""What the kernels share: reading and writing rows, who sees whom, and the steps of a softmax."""

import triton
import triton.language as tl

# Numbers that change from call to call; a kernel compiled for each would gain nothing.
UNSPECIALIZED = ["heads", "rows", "length", "prefix_length", "share", "blind"]
UNSPECIALIZED += ["packing", "chunks", "tiles_a_chunk", "pieces"]


@triton.jit
def head_of(rows, sequence, head):
    """Where one head of one sequence, or of one prefix, begins."""
    return rows[0] + sequence * rows[1] + head * rows[2]


@triton.jit
def load_rows(rows, sequence, head, row, count, column, WIDTH: tl.constexpr):
    """[rows, columns] of one head; zeros beyond `count` rows and WIDTH."""
    inside = (row < count)[:, None]
    if column.shape[0] != WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    at = head_of(rows, sequence, head) + row.to(tl.int64)[:, None] * rows[3] + column[None, :]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def store_rows(base, stride, row, count, column, tile, WIDTH: tl.constexpr):
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def sees_prefix(row, column, mask, rows, length, prefix_length, blind, MASKED: tl.constexpr):
    """Which prefix rows each query row sees; `row` and `column` broadcast against each other."""
    inside = (row < rows) & (column < prefix_length)
    if MASKED:
        at = row.to(tl.int64) * (prefix_length + length) + column
        return tl.load(mask + at, mask=inside, other=0) != 0
    else:
        return inside & (row + (length - rows) >= blind)


@triton.jit
def sees_sequence(
    row, column, mask, rows, length, prefix_length, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """Which rows of its sequence each query row sees; the query rows are the last ones."""
    inside = (row < rows) & (column < length)
    if MASKED:
        at = row.to(tl.int64) * (prefix_length + length) + prefix_length + column
        return tl.load(mask + at, mask=inside, other=0) != 0
    elif CAUSAL:
        return inside & (column <= row + (length - rows))
    else:
        return inside


@triton.jit
def absorb(queries, keys, values, sees, scale, peak, total, attended):
    """Online softmax in powers of two: take more keys into peak, total [R] and attended [R, d].

    Live beside the operands: the scores, then the weights, [R, L] in float32.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(sees, scores, float("-inf"))
    above = tl.maximum(peak, tl.max(scores, axis=1))
    # A row that saw nothing so far must not form -inf - -inf.
    shift = tl.where(above == float("-inf"), 0.0, above)
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(peak - shift)
    total = total * kept + tl.sum(weights, axis=1)
    attended = tl.dot(
        weights.to(values.dtype), values, attended * kept[:, None], input_precision="ieee"
    )
    return above, total, attended


@triton.jit
def weigh(rows_of, columns_of, grad_rows, grad_columns, sees, lse, scale):
    """The weights p, formed again from each row's log2-sum-exp2, and their gradients dp = grad v.

    (queries, keys, grad, values) give [R, L] with lse [R, 1]; (keys, queries, values, grad) give
    the transposed with [1, R].
    """
    scores = tl.dot(rows_of, tl.trans(columns_of), input_precision="ieee") * scale
    weights = tl.where(sees, tl.exp2(scores - lse), 0.0)
    return weights, tl.dot(grad_rows, tl.trans(grad_columns), input_precision="ieee")


@triton.jit
def slopes_of(weights, above, sees, delta):
    """The gradients of the scores, p (dp - delta), with delta = sum p dp over a row's keys."""
    return tl.where(sees, weights * (above - delta), 0.0)
