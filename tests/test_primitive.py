"""What `_primitive.py` gives to a primitive from its axes, tried with a toy: see `toy.py`.

How it is split over devices is in `test_partitioning.py` and `test_sharding.py`.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import toy
from harness import assert_same
from jax_roipool import _backends
from jax_roipool._manual_axes import _varying

G, N, K, C, E, SIZE = 2, 3, 4, 5, 2, 3


def images(*lead):
    shape = (*lead, G, N, C)
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape) - 20, jnp.float32)


def packed(*lead):
    rng = np.random.default_rng(0)
    index = rng.integers(-1, N + 1, (*lead, G, K, 1))
    return jnp.asarray(np.concatenate([index, rng.integers(1, 9, index.shape)], -1), jnp.int32)


def values(*lead):
    shape = (*lead, G, K, C)
    return jnp.asarray(np.arange(np.prod(shape)).reshape(shape), jnp.float32)


def want_scale(images, packed):
    result = np.zeros((G, K, C), np.float32)
    sign = np.full((G, K, C), -1, np.int32)
    for g, k in np.ndindex(G, K):
        index, weight = packed[g, k]
        if 0 <= index < N:
            result[g, k] = images[g, index] * weight
            sign[g, k] += result[g, k] > 0
    return result, sign


def want_total(values, packed):
    result = np.zeros((G, N, C), np.float32)
    for g, k in np.ndindex(G, K):
        if 0 <= packed[g, k][0] < N:
            result[g, packed[g, k][0]] += values[g, k]
    return (result,)


def scale(images, packed):
    return toy.apply_scale(images, packed)


def total(values, packed):
    return toy.apply_total(values, packed, N)


CASES = {"scale": (scale, want_scale, images), "total": (total, want_total, values)}
cases = pytest.mark.parametrize("case", CASES)


def check(actual, wanted):
    for a, b in zip(actual, wanted, strict=True):
        assert_same(a, np.asarray(b))


@cases
def test_eager_and_compiled(case):
    function, want, first = CASES[case]
    wanted = want(np.asarray(first()), np.asarray(packed()))
    check(function(first(), packed()), wanted)
    check(jax.jit(function)(first(), packed()), wanted)
    with jax.disable_jit():
        check(function(first(), packed()), wanted)


@cases
def test_types_are_those_of_the_results(case):
    function, _, first = CASES[case]
    for result, shape in zip(
        function(first(), packed()), jax.eval_shape(function, first(), packed()), strict=True
    ):
        assert (result.shape, result.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("in_axes", ((0, None), (None, 0), (0, 0), (1, 2), (-1, 0)), ids=str)
@cases
def test_vmap_is_a_loop(case, in_axes):
    function, want, first = CASES[case]
    makers = (first, packed)
    operands = [
        make() if axis is None else jnp.moveaxis(make(SIZE), 0, axis)
        for make, axis in zip(makers, in_axes, strict=True)
    ]
    slices = [
        [np.asarray(x if axis is None else jnp.take(x, i, axis)) for i in range(SIZE)]
        for x, axis in zip(operands, in_axes, strict=True)
    ]
    wanted = zip(*(want(*each) for each in zip(*slices, strict=True)), strict=True)
    check(jax.vmap(function, in_axes)(*operands), map(np.stack, wanted))


@cases
def test_nested_vmap_and_sizes_of_zero_and_one(case):
    function, want, first = CASES[case]
    pairs = jax.vmap(jax.vmap(function, (None, 0)), (0, None))(first(2), packed(SIZE))
    for i, j in np.ndindex(2, SIZE):
        wanted = want(np.asarray(first(2)[i]), np.asarray(packed(SIZE)[j]))
        check([x[i, j] for x in pairs], wanted)
    one = jax.vmap(function)(first(1), packed(1))
    check([x[0] for x in one], want(np.asarray(first(1)[0]), np.asarray(packed(1)[0])))
    none = jax.vmap(function)(first(1)[:0], packed(1)[:0])
    assert all(x.shape == (0, *y.shape[1:]) for x, y in zip(none, one, strict=True))


def joined_shapes(function, in_axes, *operands):
    return str(jax.make_jaxpr(jax.vmap(function, in_axes))(*operands))


def test_rois_that_alone_are_mapped_join_k_and_copy_nothing():
    jaxpr = joined_shapes(scale, (None, 0), images(), packed(SIZE))
    assert f"f32[{G},{SIZE * K},{C}]" in jaxpr
    assert f"f32[{SIZE * G}," not in jaxpr


def test_mapped_images_join_g():
    assert f"f32[{SIZE * G},{K},{C}]" in joined_shapes(scale, (0, None), images(SIZE), packed())


def test_sums_over_rois_join_g():
    jaxpr = joined_shapes(total, (None, 0), values(), packed(SIZE))
    assert f"f32[{SIZE * G},{N},{C}]" in jaxpr


def test_under_shard_map_results_vary_as_operands_do():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    varying = jax.shard_map(scale, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"))
    check(jax.jit(varying)(images(), packed()), want_scale(*map(np.asarray, (images(), packed()))))


def lowered(platform, implementation=None):
    def function(images, packed):
        return toy.apply_scale(images, packed, implementation)

    traced = jax.jit(function).trace(images(), packed())
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_each_platform_has_its_backend():
    assert "stablehlo" in lowered("cpu")
    assert "stablehlo" in lowered("rocm")
    assert "stablehlo" in lowered("tpu", "xla")
    with pytest.raises(AssertionError, match="not to be lowered here"):
        lowered("tpu")


def test_a_kernel_that_cannot_be_used_is_named_once(caplog):
    _backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "jax_roipool"):
        lowered("cuda")
        lowered("cuda")
        lowered("cuda", "xla")
    (record,) = caplog.records
    assert "'broken' cannot be used: it is broken" in record.getMessage()
    with pytest.raises(
        ValueError, match=r"'kernel' is not to be had on cuda: .*'broken' cannot be"
    ):
        lowered("cuda", "kernel")
    with pytest.raises(ValueError, match="'kernel' is not to be had on rocm: no kernel was"):
        lowered("rocm", "kernel")


@pytest.mark.parametrize("specs", ((P(), P("x")), (P("x"), P()), (P("x"), P("x"))), ids=str)
def test_operands_may_vary_over_other_mesh_axes_than_each_other(specs):
    images, packed = np.ones((1, 3, 2), np.float32), np.ones((1, 4, 2), np.int32)

    def scale(*operands):
        result, _ = toy.apply_scale(*operands)
        assert _varying(result) == {"x"}
        return result

    mapped = jax.shard_map(
        scale,
        mesh=jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)),
        in_specs=specs,
        out_specs=P("x"),
    )
    np.testing.assert_array_equal(jax.jit(mapped)(images, packed), np.ones((1, 4, 2)))
