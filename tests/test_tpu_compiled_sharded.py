"""What the compiler for TPUs makes of the operators on four devices: kernels and collectives.

See `test_tpu_compiled.py`.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from compiled import COLLECTIVES, MOVES
from tpu_compiler import Compiled, average, mesh, nbytes, pool, pullback

pytestmark = pytest.mark.full

# Where XLA splits the program by itself, and types do not say how, compared cells stand in for the
# kernels.

MAPS, ROIS = (8, 38, 50, 512), (8, 64, 4)
ON_X = {
    "batch": (P("x"), P("x"), P("x")),
    "channels": (P(None, None, None, "x"), P(), P(None, None, None, None, "x")),
    "RoIs": (P(), P(None, "x"), P(None, "x")),
}
BOTH = (P("x", None, None, "y"), P("x"), P("x", None, None, None, "y"))


def sharded(mesh, specs):
    """Features, RoIs and cotangent, and how they are split."""
    shapes = (MAPS, ROIS, (8, 64, 7, 7, 512))
    return [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]


def assert_local(compiled, all_reduces=0):
    assert compiled.count("all-reduce") <= all_reduces
    assert compiled.count(*COLLECTIVES) == compiled.count("all-reduce")


@pytest.mark.parametrize("split", (*ON_X, "batch and channels"))
def test_automatic_partitioning_moves_no_features(split):
    specs, devices = (BOTH, mesh(2, 2)) if split not in ON_X else (ON_X[split], mesh(4))
    features, rois, cotangent = sharded(devices, specs)
    compiled = Compiled(pool(), features, rois)
    assert compiled.kernels == 0
    assert compiled.count("scatter", "gather") == 0
    assert_local(compiled)
    compiled = Compiled(pullback(), features, rois, cotangent)
    assert compiled.count("scatter", "gather") == 0
    # Where the features are whole on every device, so is their gradient, as a sum over devices.
    assert_local(compiled, all_reduces=1 if split == "RoIs" else 0)


@pytest.mark.parametrize("split", ("RoIs", "batch and channels"))
def test_shard_map_runs_the_kernels(split):
    specs, devices = (BOTH, mesh(2, 2)) if split not in ON_X else (ON_X[split], mesh(4))
    features, rois, cotangent = sharded(devices, specs)
    mapped = jax.shard_map(pool(), mesh=devices, in_specs=specs[:2], out_specs=specs[2])
    compiled = Compiled(mapped, features, rois)
    assert (compiled.kernels, compiled.count(*MOVES)) == (1, 0)
    assert_local(compiled)

    def gradient(features, rois, cotangent):
        return jax.vjp(lambda x: mapped(x, rois), features)[1](cotangent)

    compiled = Compiled(gradient, features, rois, cotangent)
    assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)
    assert_local(compiled, all_reduces=1 if split == "RoIs" else 0)


@pytest.mark.parametrize("split", (*ON_X, "batch and channels"))
def test_explicit_shardings_run_the_kernels(split):
    sizes = (4,) if split in ON_X else (2, 2)
    features, rois, cotangent = sharded(mesh(*sizes, kind=AxisType.Explicit), ON_X.get(split, BOTH))
    compiled = Compiled(pool(), features, rois)
    assert (compiled.kernels, compiled.count(*MOVES)) == (1, 0)
    assert_local(compiled)
    compiled = Compiled(pullback(), features, rois, cotangent)
    assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)
    assert_local(compiled, all_reduces=1 if split == "RoIs" else 0)


@pytest.mark.parametrize("split", ("batch", "channels", "batch and channels"))
def test_a_spec_brings_the_kernels_into_automatic_partitioning(split):
    specs, devices = (BOTH, mesh(2, 2)) if split not in ON_X else (ON_X[split], mesh(4))
    features, rois, cotangent = sharded(devices, specs)

    def pool(features, rois):
        return jax_roipool.roi_pool(features, rois, 7, features_spec=specs[0])

    def gradient(features, rois, cotangent):
        return jax.vjp(lambda x: pool(x, rois), features)[1](cotangent)[0]

    compiled = Compiled(pool, features, rois)
    assert (compiled.kernels, compiled.count(*MOVES)) == (1, 0)
    assert_local(compiled)
    compiled = Compiled(gradient, features, rois, cotangent)
    assert (compiled.kernels, compiled.count(*MOVES)) == (2, 0)
    assert_local(compiled)


def test_explicit_shardings_of_flat_rois_move_bins_and_no_maps():
    images, sharding = 8, NamedSharding(mesh(4, kind=AxisType.Explicit), P("x"))
    shapes = (images, 100, 168, 256), (512, 5), (512, 7, 7, 256)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes]
    bins = nbytes(shapes[2], jnp.float32)
    assert nbytes(shapes[0], jnp.float32) > 4 * bins
    for program, kernels in (
        (Compiled(pool(), *arguments[:2]), 1),
        (Compiled(pullback(), *arguments), 2),
    ):
        assert program.kernels == kernels
        assert 0 < program.largest(*COLLECTIVES) <= bins


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_averages_on_several_devices_move_no_features(kind):
    four = mesh(2, 2, kind=kind)
    shapes = ((4, 50, 60, 256), P("x", None, None, "y")), ((4, 64, 4), P("x"))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(four, spec))
        for shape, spec in shapes
    ]
    with jax.set_mesh(four) if kind == AxisType.Explicit else contextlib.nullcontext():
        compiled = Compiled(average(sampling_ratio=2), *arguments)
    assert compiled.count(*COLLECTIVES) == compiled.count("all-reduce") <= 2
    assert compiled.largest("all-reduce") <= 1  # whether all is finite
