"""The backends of the rectangle max. All of them return the same values.

Features are `[G, n, H, W, C]`, G groups of n images. `edges`, int32 `[G, K, 1 + 2P + 2Q]`, has
P x Q rectangles of cells for each of K RoIs: the index of the RoI's image in its group, the first
rows of its P rows of bins, the rows after their last ones, and likewise the columns of its Q
columns of bins; `portable.split_edges` takes them apart. Rows and columns lie inside the map.
No end lies before its start, starts do not decrease from bin to bin, and a bin reaches at most one
cell into the next: `start[i + 1] <= end[i] <= start[i + 1] + 1` wherever bin `i` is not empty. Any
axis but H and W can be of size 0.

A backend is three functions, named as the primitives of `_rectangle_max.py` are. Each returns a
list of arrays:

- `rectangle_max(features, edges, *, output_size, argmax_dtype, empty_value)`: the maxima,
  `[G, K, P, Q, C]`, `output_size` being (P, Q), and unless `argmax_dtype` is None their cells,
  `row * W + column`, of that dtype: int32 or, if every cell of a map has an index in it, int16. NaN
  is larger than any number, zeros are equal, and the first of several maxima, or of several NaNs,
  in row-major order is the argmax. A rectangle without cells gives `empty_value`, 0 or -inf (for
  integers the smallest), and argmax -1.
  With one operand more, `onto`, `[G, K, P, Q, C]`, a RoI without an image has the maxima that it
  has there. Only a backend that says so (`takes_onto`) is given it.
- `gather_at_argmax(features, argmax, edges)`: the features there, 0 where argmax is -1.
- `scatter_at_argmax(cotangent, argmax, edges, *, map_shape)`: `[G, n, H, W, C]`, `map_shape` being
  (n, H, W), the sum over all cotangents that go to a cell, in float32 at least. On a GPU the
  portable ones add in no fixed order; all others do in the same from run to run.

An image index outside `[0, n)` gives 0 and argmax -1 whatever the edges in the map, gathers 0, and
scatters nothing. An argmax is one that `rectangle_max` gives for these edges and some features.
"""

from __future__ import annotations

from collections.abc import Callable

from jax_roipool._backends import Backend, Family, native
from jax_roipool._backends.rectangle_max import blocks, cpu, cuda, dense, segment_max, tpu


def _functions(module) -> dict[str, Callable]:
    return {
        "rectangle_max": module.rectangle_max,
        "gather_at_argmax": module.gather_at_argmax,
        "scatter_at_argmax": module.scatter_at_argmax,
    }


FAMILY = Family(
    backends=(
        Backend(
            "cpu",
            _functions(cpu),
            frozenset({"cpu"}),
            native.load,
            takes_symbolic_shapes=True,
            takes_onto=frozenset({"rectangle_max"}),
        ),
        Backend("cuda", _functions(cuda), frozenset({"cuda"}), cuda.unavailable_reason),
        Backend("tpu", _functions(tpu), frozenset({"tpu"})),
        Backend("blocks", _functions(blocks), takes_symbolic_shapes=True),
        Backend("dense", _functions(dense), is_partitionable=True),
        Backend("segment_max", _functions(segment_max), is_partitionable=True),
    ),
    kernels={"cpu": ("cpu",), "cuda": ("cuda",), "tpu": ("tpu",)},
    portable={"tpu": ("dense", "blocks"), "*": ("blocks", "segment_max")},
)

CUSTOM_CALLS = (*native.CUSTOM_CALLS, cuda.CUSTOM_CALL)
"""The names of the custom calls in programs for CPUs and CUDA: `jax.export` is to let them pass."""
