"""Feature pyramids: the level of a RoI, and pooling each RoI from its own level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_average_oracle import load, named

import average_oracle
from compiled import Program
from harness import assert_same, distinct_features, some_by_default, whole_cotangent
from jax_roipool import (
    assign_levels,
    nnx,
    pool_levels,
    pr_roi_pool,
    ps_roi_align,
    roi_align,
    roi_average_pool,
    roi_pool,
    roi_pool_with_argmax,
)

SCALES = (1 / 4, 1 / 8, 1 / 16)
pool_two = functools.partial(roi_pool, output_size=2)

# Levels are written into one result by the kernels, chosen where there is none, and chosen for an
# operator that is not known.
WAYS = {
    "written": lambda pool: pool,
    "chosen below": lambda pool: functools.partial(pool, implementation="xla"),
    "chosen above": lambda pool: lambda *args, **options: pool(*args, **options),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def maps(lead=(2,), channels=3, dtype=np.float32):
    return [
        distinct_features((*lead, 16 >> i, 20 >> i, channels), seed=i, dtype=dtype)
        for i in range(3)
    ]


def per_image_rois(N=2, K=6, seed=0):
    """RoIs of all three levels, for an image of 64 x 80 pixels and a canonical size of 32."""
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 50, (N, K, 2)), np.resize([9, 17, 40], (N, K, 1))
    return np.concatenate([corner, corner + side], axis=-1).astype(np.float32)


def of_size(rois):
    return assign_levels(rois, SCALES, canonical_size=32, canonical_level=4)


def joined(pool, features, rois, levels):
    scales = SCALES[: len(features)]
    return pool_levels(pool, features, rois, spatial_scales=scales, levels=levels)


def each_from_its_own(features, rois, levels, roi_mask=True, pool=pool_two):
    of_each_level = [
        np.asarray(pool(x, rois, spatial_scale=scale))
        for x, scale in zip(features, SCALES, strict=True)
    ]
    return average_oracle.pool_levels(of_each_level, np.where(roi_mask, levels, -1))


# The level ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named("multiscale"), ids=lambda name: name[:-4])
def test_recorded_levels(name):
    recorded = load(name)
    size, level = recorded["canonical"].tolist()
    found = assign_levels(
        recorded["rois"], recorded["spatial_scales"], canonical_size=size, canonical_level=level
    )
    expected = np.where(recorded["level"] > 3, -1, recorded["level"])
    assert_same(found, expected.astype(np.int32))


def around(canonical_size, steps):
    """Squares from 30 floats below to 10 above each step, as floats of the side."""
    sides = [np.float32(canonical_size * 2.0**k) for k in steps]
    bits = np.array(sides)[:, None].view(np.int32) + np.arange(-30, 10, dtype=np.int32)
    side = bits.view(np.float32).ravel()
    return np.stack([0 * side, 0 * side, side, side], axis=-1)


@pytest.mark.parametrize(
    ("canonical_size", "canonical_level"), ((224, 4), (56, 4), (99.5, 3), (1, 5))
)
def test_levels_at_the_very_steps(canonical_size, canonical_level):
    scales = [2.0**-k for k in range(2, 7)]
    rois = around(canonical_size, range(-5, 6))
    found = assign_levels(
        rois, scales, canonical_size=canonical_size, canonical_level=canonical_level
    )
    expected = average_oracle.assign_levels(rois, scales, canonical_size, canonical_level)
    assert set(expected) == set(range(5))
    assert_same(found, expected)


def test_a_plain_comparison_would_miss_the_steps():
    # Else the test above shows nothing: torchvision's steps lie about 11 floats below.
    rois = around(224, [0])
    expected = average_oracle.assign_levels(rois, (1 / 8, 1 / 16))
    assert 0 < (expected != (rois[:, 2] >= 224)).sum() < 15


coordinates = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 224.0, 448.0, 3e38, np.inf, np.nan, 1e-30])
)


@given(st.lists(st.lists(coordinates, min_size=4, max_size=4), min_size=8, max_size=8))
def test_any_numbers_have_the_level_of_the_formula(rois):
    rois = np.array(rois, np.float32)
    scales = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    assert_same(assign_levels(rois, scales), average_oracle.assign_levels(rois, scales))


@pytest.mark.parametrize(
    ("roi", "level"),
    (
        ([5, 2, 3, 5], -1),  # one side is inverted
        ([500, 500, 3, 2], 2),  # both are, and torchvision gives it its area's level
        ([3, 3, 3, 3], 0),
        ([0, 0, np.nan, 5], -1),
        ([0, 0, np.inf, 5], -1),
        ([-np.inf, 0, np.inf, np.inf], -1),
        ([-3e38, 0, 3e38, 1], 2),
    ),
)
def test_levels_of_unusual_rois(roi, level):
    assert assign_levels([roi], SCALES).tolist() == [level]


def test_levels_of_every_layout_and_under_jit_and_vmap():
    rois = per_image_rois()
    expected = average_oracle.assign_levels(rois, SCALES, 32)
    assert set(expected.ravel()) == {0, 1, 2}
    flat = np.concatenate([np.full((6, 1), 1e9), rois[0]], axis=1)
    assert_same(of_size(rois), expected)
    assert_same(of_size(rois[0]), expected[0])
    assert_same(of_size(flat), expected[0])
    assert_same(jax.jit(of_size)(rois), expected)
    assert_same(jax.vmap(of_size)(rois), expected)
    assert_same(of_size(rois.astype(np.float64)), expected)
    assert_same(of_size(jnp.asarray(rois, jnp.bfloat16)), expected)
    assert of_size(rois[:, :0]).shape == (2, 0)


def test_one_level():
    assert assign_levels([[0, 0, 9, 9], [0, 0, 900, 900], [9, 0, 0, 9]], [1 / 16]).tolist() == [
        *(0, 0, -1)
    ]


# Pooling ------------------------------------------------------------------------------------------


@every_way
def test_each_roi_is_pooled_from_its_own_level(way):
    features, rois = maps(), per_image_rois()
    levels = of_size(rois)
    roi_mask = np.arange(6) < [[5], [6]]
    pool = way(pool_two)
    run = jax.jit(
        lambda *x: pool_levels(pool, x[0], x[1], spatial_scales=SCALES, levels=x[2], roi_mask=x[3])
    )
    expected = each_from_its_own(features, rois, levels, roi_mask)
    assert_same(run(features, rois, levels, roi_mask), expected)
    assert not expected[0, 5].any()
    assert expected[1, 5].any()


def test_flat_rois_single_images_and_levels_of_their_own():
    features, rois = maps(), per_image_rois()
    flat = np.concatenate([[[1.0]] * 6, rois[0]], axis=1).astype(np.float32)
    one = [x[1] for x in features]
    of_flat = pool_levels(pool_two, features, flat, spatial_scales=SCALES)
    of_one = pool_levels(pool_two, one, rois[0], spatial_scales=SCALES)
    assert_same(of_flat, np.asarray(of_one))
    # All of these are small, for a canonical size of 224.
    assert_same(of_one, np.asarray(roi_pool(one[0], rois[0], 2, SCALES[0])))
    levels = [0, 2, -1, 3, 1, 7]
    expected = each_from_its_own(one, rois[0], np.array(levels))
    assert_same(pool_levels(pool_two, one, rois[0], spatial_scales=SCALES, levels=levels), expected)
    assert not expected[[2, 3, 5]].any()


@every_way
def test_nothing_is_lost_on_the_way(way):
    # A sum would lose the first on a CPU.
    values = [1e-40, -np.inf, np.nan, -3.0]
    features = [np.full((2, 2, 1), 7, np.float32), np.float32(values).reshape(1, 4, 1)]
    rois = np.float32([[i, 0, i + 1, 1] for i in range(4)])
    pool = way(functools.partial(roi_pool, output_size=1))
    pooled = pool_levels(pool, features, rois, spatial_scales=(1, 1), levels=np.ones(4, int))
    assert_same(pooled.ravel(), np.float32(values))
    chainer = way(functools.partial(roi_pool, output_size=2, convention="chainer"))
    pooled = pool_levels(chainer, features, rois + 9, spatial_scales=(1, 1), levels=[0, 1, 0, -1])
    assert_same(pooled[:3], np.full((3, 2, 2, 1), -np.inf, np.float32))
    assert not pooled[3].any()


@pytest.mark.parametrize("dtype", (np.int8, np.uint32, jnp.bfloat16, np.float16))
def test_dtypes(dtype):
    features = [(x % 100).astype(dtype) for x in maps()]
    rois = per_image_rois()
    pooled = pool_levels(pool_two, features, rois, spatial_scales=SCALES)
    assert pooled.dtype == dtype
    assert_same(pooled, roi_pool(features[0], rois, 2, SCALES[0]))


@every_way
def test_integers_have_no_tangents(way):
    features, rois = [x.astype(np.int8) for x in maps()], per_image_rois()
    _, tangent = jax.jvp(
        lambda rois: pool_levels(way(pool_two), features, rois, spatial_scales=SCALES),
        (rois,),
        (rois,),
    )
    assert tangent.dtype == jax.dtypes.float0


@every_way
def test_every_levels_gradient_is_that_of_its_own_rois(way):
    features, rois = maps(), per_image_rois()
    levels = of_size(rois)
    cotangent = whole_cotangent((2, 6, 2, 2, 3))

    @jax.jit
    def gradient(features):
        def forward(features):
            return joined(way(pool_two), features, rois, levels)

        return jax.vjp(forward, features)[1](cotangent)[0]

    for i, grad in enumerate(gradient(features)):
        own = np.asarray(levels == i)[..., None, None, None]
        _, backward = jax.vjp(lambda x, i=i: roi_pool(x, rois, 2, SCALES[i]), features[i])
        assert_same(grad, np.asarray(backward(jnp.where(own, cotangent, 0))[0]))
        assert np.abs(grad).max() > 0


def test_forward_mode_and_vmap():
    features, rois = maps(), per_image_rois()
    pool = functools.partial(roi_pool, output_size=2, forward_mode=True)

    def run(features, rois):
        return pool_levels(pool, features, rois, spatial_scales=SCALES, levels=of_size(rois))

    expected = each_from_its_own(features, rois, of_size(rois))
    tangents = [3 * x for x in features]
    values, tangent = jax.jit(lambda f, t: jax.jvp(lambda f: run(f, rois), (f,), (t,)))(
        features, tangents
    )
    assert_same(values, expected)
    assert_same(tangent, 3 * expected)
    assert_same(jax.jit(jax.vmap(run))(features, rois), expected)


# What is written into the other levels' result, and what is chosen afterwards --------------------

OPERATORS = {
    "max": functools.partial(roi_pool, output_size=2),
    "max, forward mode": functools.partial(roi_pool, output_size=2, forward_mode=True),
    "align": functools.partial(roi_align, output_size=2, sampling_ratio=2),
    "whole cells": functools.partial(roi_average_pool, output_size=2),
    "precise": functools.partial(pr_roi_pool, output_size=2),
    "own channels": functools.partial(ps_roi_align, output_size=2, sampling_ratio=1),
}
LEVELS = np.array([[0, 1, 1, 1, -1, 3], [1, 0, 0, 1, 1, 1]])


def chosen(pool, features, rois, levels):
    """The definition: every level pools every RoI, of which each is taken from one."""
    pooled = 0.0
    for i, (x, scale) in enumerate(zip(features, SCALES, strict=False)):
        own = (levels == i)[..., None, None, None]
        pooled = jnp.where(own, pool(x, rois, spatial_scale=scale), pooled)
    return pooled


def in_every_mode(join, forward_mode):
    """Values, both modes of derivatives, a second one, and `vmap` of all arguments or of one."""

    def function(features, rois, levels):
        def pool(features, rois):
            return join(features, rois, levels)

        pooled, pullback = jax.vjp(pool, features, rois)
        results = {"pooled": pooled, "gradients": pullback(whole_cotangent(pooled.shape))}
        results["second"] = jax.grad(
            lambda c: sum(jnp.vdot(x, x) for x in pullback(c)[0])  # linear, so twice as large
        )(pooled)
        if forward_mode:
            tangents = [x[::-1] for x in features], jnp.cos(rois)
            results["tangent"] = jax.jvp(pool, (features, rois), tangents)[1]
        results["vmap"] = jax.vmap(join)(features, rois, levels)
        one = [x[0] for x in features]
        results["vmap of rois"] = jax.vmap(join, (None, 0, 0))(one, rois, levels)
        results["vmap of levels"] = jax.vmap(join, (None, None, 0))(one, rois[0], levels)
        results["vmap of maps"] = jax.vmap(join, (0, None, None))(features, rois[0], levels[0])
        return results

    return jax.jit(function)


@pytest.mark.parametrize(
    "case",
    some_by_default([*OPERATORS, "max, xla"], ("max",)),
)
def test_every_operator_in_every_mode(case):
    name = case.removesuffix(", xla")
    implementation = None if case in OPERATORS else "xla"
    pool = functools.partial(OPERATORS[name], implementation=implementation)
    rois = per_image_rois()
    rois[0, 1] = np.nan  # which its level leaves as it is
    arguments = maps(channels=4)[:2], rois, LEVELS
    actual, wanted = (
        in_every_mode(functools.partial(join, pool), forward_mode=name != "max")(*arguments)
        for join in (joined, chosen)
    )
    assert np.any(wanted["second"])
    for mode in wanted:
        pairs = zip(*map(jax.tree.leaves, (actual[mode], wanted[mode])), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=mode)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "own channels"])
def test_levels_are_written_into_one_result(name):
    rois = np.resize(per_image_rois(), (2, 400, 4))
    pooled_bytes = 4 * 2 * 400 * 2 * 2 * 256

    def forward(*features):
        return joined(OPERATORS[name], features, rois, of_size(rois))

    def backward(*features):
        pooled, pullback = jax.vjp(forward, *features)
        return pooled, pullback(pooled)

    for function in (forward, backward):
        program = Program("cpu", function, *maps(channels=256))
        assert len(program.find(r'"jax_roipool_cpu_\w+_onto_v1"')) == 2
        # An argmax for each level, of half the size, is kept for the gradient.
        argmax_bytes = 3 * pooled_bytes // 2 if function is backward and "max" in name else 0
        assert program.temporary_bytes < pooled_bytes / 2 + argmax_bytes


@every_way
@pytest.mark.parametrize("spec", (P("x"), P(None, None, None, "x")), ids=("batch", "channels"))
def test_explicit_axes(spec, way):
    # RoIs are split along K, and what is pooled is not: a mask has to follow that.
    devices = min(2, jax.device_count())
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Explicit,))
    features, rois = maps(channels=4), per_image_rois()
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in features]
        pooled = jax.jit(lambda f, r: pool_levels(way(pool_two), f, r, spatial_scales=SCALES))(
            split, jax.device_put(rois, NamedSharding(mesh, P(None, "x")))
        )
    assert_same(pooled, np.asarray(roi_pool(features[0], rois, 2, SCALES[0])))


# Errors -------------------------------------------------------------------------------------------

ROIS = np.ones((4, 4), np.float32)
FEATURES = [np.ones((4 >> i, 4 >> i, 2), np.float32) for i in range(2)]


@pytest.mark.parametrize(
    ("scales", "error", "mentions"),
    (
        ((1 / 8, 1 / 4), ValueError, "finest first"),
        ((1 / 4, 1 / 16), ValueError, "half of the one before"),
        ((0.3, 0.15), ValueError, "powers of two"),
        ((), ValueError, "got []"),
        ((0.0,), ValueError, "got [0.0]"),
        ((float("nan"),), ValueError, "nan"),
        ((float("inf"),), ValueError, "inf"),
        (0.25, TypeError, "got 0.25"),
        ((None,), TypeError, "None"),
    ),
)
def test_scales_that_are_no_pyramid(scales, error, mentions):
    with pytest.raises(error, match="spatial_scales must be") as info:
        assign_levels(ROIS, scales)
    assert mentions in str(info.value)


def test_traced_scales():
    with pytest.raises(TypeError, match="known when a program is traced"):
        jax.jit(lambda s: assign_levels(ROIS, [s]))(0.25)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"canonical_size": 0}, ValueError, "canonical_size must be positive and finite, got 0"),
        ({"canonical_size": np.inf}, ValueError, "got inf"),
        ({"canonical_size": "s"}, TypeError, "canonical_size must be a number, got 's'"),
        ({"canonical_level": 4.0}, TypeError, "canonical_level must be an int, got 4.0"),
    ),
)
def test_canonical_values_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        assign_levels(ROIS, SCALES, **options)


@pytest.mark.parametrize("shape", ((4,), (4, 3), (2, 4, 5), (2, 3, 4, 4)))
def test_shapes_that_are_no_rois(shape):
    with pytest.raises(ValueError, match=r"rois must be \[K, 4\], \[N, K, 4\] or \[R, 5\]"):
        assign_levels(np.ones(shape), SCALES)


def test_rois_that_are_no_numbers():
    with pytest.raises(TypeError, match="rois must be of a real floating or integer dtype"):
        assign_levels(ROIS.astype(complex), SCALES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        ({"pool": 7}, TypeError, "pool must be an operator with its arguments bound.*got a int"),
        (
            {"pool": functools.partial(roi_pool, output_size=2, spatial_scale=1 / 4)},
            ValueError,
            "a spatial_scale bound.*pool_levels the spatial_scales",
        ),
        (
            {"pool": functools.partial(roi_pool, output_size=2, roi_mask=None)},
            ValueError,
            "a roi_mask bound.*pool_levels the roi_mask",
        ),
        (
            {"pool": functools.partial(roi_pool_with_argmax, output_size=2)},
            TypeError,
            "one array.*tuple",
        ),
        ({"pool": roi_pool}, TypeError, "other arguments bound.*'output_size'"),
        (
            {"pool": nnx.RoIPool(2, 1 / 4)},
            TypeError,
            "'spatial_scale'; in the place of a layer",
        ),
        (
            {"pool": lambda features, rois: rois},
            TypeError,
            r"called as pool\(features",
        ),
        ({"features": FEATURES[0]}, TypeError, "list or tuple of maps.*ndarray"),
        (
            {"features": {"p2": FEATURES[0]}},
            TypeError,
            r"\[features\[name\] for name in",
        ),
        ({"features": []}, ValueError, "at least one map.*got none"),
        ({"features": FEATURES[:1]}, ValueError, "one for each level, got 2 for 1 maps"),
        ({"spatial_scales": 1 / 4}, TypeError, "a sequence.*got 0.25"),
        (
            {"features": [FEATURES[0], FEATURES[1].astype(np.float16)]},
            ValueError,
            r"of one dtype.*float32\[4, 4, 2\], float16\[2, 2, 2\]",
        ),
        ({"features": [FEATURES[0], FEATURES[1][..., :1]]}, ValueError, "differ in H and W alone"),
        ({"features": [FEATURES[0], FEATURES[1][None]]}, ValueError, "differ in H and W alone"),
        ({"levels": np.zeros(4)}, TypeError, "levels must be of an integer dtype.*float32"),
        (
            {"levels": np.zeros(3, int)},
            ValueError,
            r"levels must have one entry a RoI, shape \[4\]",
        ),
        ({"roi_mask": np.ones(4, int)}, TypeError, "roi_mask must be of dtype bool"),
        ({"roi_mask": np.ones((1, 4), bool)}, ValueError, "roi_mask must have one entry a RoI"),
        ({"spatial_scales": (1 / 4, 1 / 16)}, ValueError, "half of the one before"),
    ),
)
def test_calls_that_cannot_be_right(changes, error, message):
    call = {"pool": pool_two, "features": FEATURES, "rois": ROIS, "spatial_scales": (1 / 4, 1 / 8)}
    with pytest.raises(error, match=message):
        pool_levels(**call | changes)
