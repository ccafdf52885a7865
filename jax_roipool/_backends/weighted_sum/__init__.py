"""The backends of the weighted sum: one form, linear in four arrays, and what it is made of.

    sum over RoIs, bins, taps and channels of
    pooled[k, p, q, c] * rows[k, p, t] * columns[k, q, v] * features[y, x, c]

in which `features[y, x]` is the cell of tap `t` of the row of bins `p`, and of tap `v` of the
column of bins `q`, in the RoI's image. Every primitive of `_weighted_sum.py` has three of the four
arrays, and gives what stands beside the fourth:

- features: floating `[G, n, H, W, C]`, G groups of n images.
- pooled: the same dtype, `[G, K, P, Q, C]`, or a cotangent of it.
- rows, columns: float32 `[G, K, P, T]` and `[G, K, Q, V]`, the weights of taps.
- cells: int32 `[G, K, 3 + P*S + Q*U]`: the index of the RoI's image in its group; how many taps of
  a row of bins are to be read, and of a column, as none of those after has a weight; and the first
  cells of runs, S of each row of bins, then U of each column. A run has `run` cells, `(T/S, V/U)`,
  one after the other; what of it is outside of the map is at the border instead. `cells.py` takes
  them apart.

A backend is four functions, each of which returns a list of one array:

- `weighted_sum(features, cells, rows, columns, *, run)`: pooled. With one operand more, `onto`, of
  its shape and dtype, a RoI without an image keeps what it has there. Only a backend that says so
  (`takes_onto`) is given it.
- `weighted_scatter(pooled, cells, rows, columns, *, run, map_shape)`: features, `map_shape` being
  (n, H, W).
- `row_weights(features, pooled, cells, columns, *, run, taps)`: rows, `taps` being `(T,)`; what it
  is for taps that are not to be read is left open.
- `column_weights(features, pooled, cells, rows, *, run, taps)`: columns, `taps` being `(V,)`,
  likewise.

Sums are float32 at least, and rounded once; their order is the backend's. Every one but a portable
scatter on a GPU is the same from run to run. A RoI whose image index is outside of `[0, n)` counts
for nothing, and so does a tap of weight 0, whatever is in its cell; but see `matmul` for cotangents
that are not finite. A bin that has a weight for an infinity is infinite or NaN. Nothing is read or
written outside of an array. Any axis but H and W can be of size 0.
"""

from __future__ import annotations

from collections.abc import Callable

from jax_roipool._backends import Backend, Family, native
from jax_roipool._backends.weighted_sum import cpu, gather, matmul

_NAMES = ("weighted_sum", "weighted_scatter", "row_weights", "column_weights")


def _functions(module) -> dict[str, Callable]:
    return {name: getattr(module, name) for name in _NAMES}


FAMILY = Family(
    backends=(
        Backend(
            "cpu",
            _functions(cpu),
            frozenset({"cpu"}),
            native.load,
            takes_symbolic_shapes=True,
            takes_onto=frozenset({"weighted_sum"}),
        ),
        Backend("gather", _functions(gather), takes_symbolic_shapes=True),
        Backend("matmul", _functions(matmul), is_partitionable=True),
    ),
    kernels={"cpu": ("cpu",)},
    portable={"tpu": ("matmul", "gather"), "*": ("gather", "matmul")},
)
