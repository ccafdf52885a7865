"""What the compiler for TPUs makes of the averages on one device: see `test_tpu_compiled.py`."""

import math

import jax
import pytest

from compiled import WORKLOADS
from tpu_compiler import GENERATIONS, Compiled, all_arguments, average, forward_arguments

pytestmark = pytest.mark.full


def gradients_of(pool):
    """Those of features and RoIs, for a given cotangent."""
    return lambda features, rois, cotangent: jax.vjp(pool, features, rois)[1](cotangent)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("sampling_ratio", (2, None))
def test_averages_neither_gather_nor_scatter(sampling_ratio, generation):
    for workload in ("vgg-train", "fpn-p2"):
        features, rois = WORKLOADS[workload]
        maps, pooled = (4 * math.prod(x) for x in (features, (rois, 7, 7, features[-1])))
        pool = average(sampling_ratio=sampling_ratio)
        forward = Compiled(pool, *forward_arguments(features, rois, generation=generation))
        arguments = all_arguments(features, rois, generation=generation)
        gradient = Compiled(lambda *x, pool=pool: gradients_of(pool)(*x)[0], *arguments)
        # Copies of the maps, or their sums, one of what is pooled, and a chunk of RoIs. With libtpu
        # 0.0.50 an adaptive gradient has two copies on a v5p as well.
        forward_copies = 2 if generation == "v5p" else 1
        gradient_copies = 2 if (generation, sampling_ratio) == ("v5p", None) else 1
        for compiled, copies in ((forward, forward_copies), (gradient, gradient_copies)):
            assert compiled.count("gather", "scatter", "dynamic-gather") == 0
            assert compiled.temporary_bytes < copies * maps + pooled + (64 << 20)


def test_nor_do_the_gradients_of_rois():
    arguments = all_arguments(*WORKLOADS["fpn"])
    compiled = Compiled(gradients_of(average("pr_roi_pool")), *arguments)
    assert compiled.count("gather", "scatter") == 0
