"""RoIAlign: values, gradients, layouts, bad values and errors, against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_taps import hostile_rois

import average_oracle as oracle
import jax_roipool
from harness import as_numpy, assert_same, assert_same_sums, random_rois

N, K, H, W, C = 2, 24, 9, 13, 3
BINS = (3, 4)
SCALE = np.float32(0.7)
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, H, W, C)).astype(np.float32)
ROIS = np.concatenate([random_rois(30, H, W) / SCALE, hostile_rois(N * K - 30, seed=1) / 2])
ROIS = RNG.permutation(ROIS).reshape(N, K, 4)
ROIS[0, 3, 1] = np.nan
ROIS[1, 5, 2] = np.inf
MASK = np.arange(N * K).reshape(N, K) % 7 > 0
COTANGENT = RNG.normal(size=(N, K, *BINS, C)).astype(np.float32)
WAYS = ((1, True), (2, True), (2, False), ((3, 1), True), (None, True), (None, False))
EVERY_WAY = [
    *((*way, None) for way in WAYS),
    (2, True, "gather"),
    *(pytest.param(*way, "gather", marks=pytest.mark.full) for way in WAYS if way != (2, True)),
    pytest.param(2, True, "matmul", marks=pytest.mark.full),
]


def align(features, rois, spatial_scale=1.0, *, sampling_ratio=2, **options):
    return jax_roipool.roi_align(
        features, rois, BINS, spatial_scale, sampling_ratio=sampling_ratio, **options
    )


@functools.cache
def align_and_grad(sampling_ratio=2, aligned=True, implementation=None):
    """The pooled features, and the features' gradient for a given cotangent."""

    @jax.jit
    def run(features, rois, cotangent, spatial_scale=1.0, roi_mask=None, image_index=None):
        def forward(features):
            return align(
                features,
                rois,
                spatial_scale,
                sampling_ratio=sampling_ratio,
                roi_mask=roi_mask,
                image_index=image_index,
                aligned=aligned,
                implementation=implementation,
            )

        pooled, pullback = jax.vjp(forward, features)
        return pooled, pullback(cotangent)[0]

    return run


def assert_close(actual, wanted, size):
    """To a few units in the last place of a sum whose terms are as large as `size`."""
    eps = jnp.finfo(actual.dtype).eps
    error = np.abs(as_numpy(actual).astype(float) - wanted)
    assert (error <= 2 * eps * size + 1e-30).all(), np.max(error / (2 * eps * size + 1e-30))


def check(pooled, gradient, features, cotangent, weights):
    """Against sums in float64; the sizes are those of sums of absolute values."""
    features, cotangent = (as_numpy(x).astype(float) for x in (features, cotangent))
    assert_close(pooled, oracle.pool(features, weights), np.abs(features).max())
    size = oracle.pool_grad(np.abs(cotangent), features.shape, weights)
    assert_close(gradient, oracle.pool_grad(cotangent, features.shape, weights), 4 * size)


@pytest.mark.parametrize(("sampling_ratio", "aligned", "implementation"), EVERY_WAY)
def test_values_and_gradients(sampling_ratio, aligned, implementation):
    pooled, gradient = align_and_grad(sampling_ratio, aligned, implementation)(
        FEATURES, ROIS, COTANGENT, SCALE, MASK
    )
    how = (SCALE, sampling_ratio, aligned, MASK)
    weights = oracle.roi_align_weights(FEATURES.shape, ROIS, BINS, *how)
    check(pooled, gradient, FEATURES, COTANGENT, weights)
    assert not np.asarray(pooled)[~MASK].any()
    assert np.asarray(pooled).any(axis=(2, 3, 4)).mean() > 0.4
    if sampling_ratio in (1, 2) and implementation != "matmul":
        wanted = oracle.roi_align_grad_in_order(COTANGENT, FEATURES.shape, ROIS, *how)
        assert_same_sums(gradient, jnp.asarray(wanted))


FLAT = ROIS.reshape(-1, 4)
INDEX = np.repeat(np.arange(N), K)


def test_flat_layouts_are_the_one_with_images():
    wanted = align_and_grad()(FEATURES, ROIS, COTANGENT, SCALE, MASK)
    rest = COTANGENT.reshape(-1, *COTANGENT.shape[2:]), SCALE, MASK.reshape(-1)
    with_index = np.concatenate([INDEX[:, None], FLAT], axis=1).astype(np.float32)
    for pooled, gradient in (
        align_and_grad()(FEATURES, with_index, *rest),
        align_and_grad()(FEATURES, FLAT, *rest, INDEX),
        align_and_grad()(FEATURES, FLAT, *rest, INDEX.astype(np.uint8)),
    ):
        assert_same(pooled.reshape(wanted[0].shape), wanted[0])
        assert_same_sums(gradient, wanted[1])


def test_one_image():
    wanted = align_and_grad()(FEATURES[:1], ROIS[:1], COTANGENT[:1])
    one = align_and_grad()(FEATURES[0], ROIS[0], COTANGENT[0])
    for actual, expected in zip(one, wanted, strict=True):
        assert_same_sums(actual, expected[0])


def test_an_index_of_no_image_pools_nothing_and_passes_no_gradient():
    rois = np.nan_to_num(FLAT, posinf=9)
    cotangent = np.where((INDEX == 0)[:, None, None, None], COTANGENT.reshape(-1, *BINS, C), np.nan)
    for bad in (-1, N, 127, -128):
        index = np.where(INDEX == 0, 0, bad).astype(np.int8)
        pooled, gradient = align_and_grad()(FEATURES, rois, cotangent, SCALE, None, index)
        assert not np.asarray(pooled)[INDEX > 0].any()
        assert np.isfinite(gradient).all()
        assert not np.asarray(gradient)[1].any()
    for bad in (2**32, -(2**32), 2**63 - 1):  # an int32 would wrap these into an image's index
        index = np.where(INDEX == 0, 0, bad)
        pooled = align(FEATURES, rois, SCALE, image_index=index)
        assert not np.asarray(pooled)[INDEX > 0].any()


@pytest.mark.parametrize("sampling_ratio", (2, None))
def test_nothing_leaks_from_cells_outside_of_a_roi(sampling_ratio):
    rois = np.float32([[[2, 2, 6, 7], [20, 20, 30, 30], [3, 3, 5, 5], [np.nan] * 4]])
    mask = np.array([[True, True, False, True]])
    inside = np.zeros((1, H, W, 1), bool)
    inside[:, 1:8, 1:8] = True
    cotangent = np.full((1, 4, *BINS, C), np.nan, np.float32)
    cotangent[:, 0] = 1
    for bad in (np.nan, np.inf, -np.inf):
        features = np.where(inside, FEATURES[:1], np.float32(bad))
        pooled, gradient = align_and_grad(sampling_ratio)(features, rois, cotangent, 1.0, mask)
        good, _ = align_and_grad(sampling_ratio)(FEATURES[:1], rois, cotangent, 1.0, mask)
        assert_same(pooled, good)
        assert not np.asarray(pooled)[0, 1:].any()
        assert not np.asarray(gradient)[~np.broadcast_to(inside, gradient.shape)].any()
        assert np.isfinite(gradient).all()


def test_not_a_number_inside_is_seen():
    features = FEATURES.copy()
    features[0, 4, 4, 1] = np.nan
    pooled = align_and_grad()(features, ROIS, COTANGENT)[0]
    weights = oracle.roi_align_weights(features.shape, ROIS, BINS, 1.0, 2)
    wanted = np.isnan(oracle.pool(features, weights))
    assert wanted.any()
    np.testing.assert_array_equal(np.isnan(pooled), wanted)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_narrow_floats(dtype):
    features, cotangent = jnp.asarray(FEATURES, dtype), jnp.asarray(COTANGENT, dtype)
    pooled, gradient = align_and_grad()(features, ROIS, cotangent, SCALE, MASK)
    assert (pooled.dtype, gradient.dtype) == (dtype, dtype)
    weights = oracle.roi_align_weights(FEATURES.shape, ROIS, BINS, SCALE, 2, True, MASK)
    check(pooled, gradient, features, cotangent, weights)


def test_float64(x64):
    features, cotangent = FEATURES.astype(np.float64) / 3, COTANGENT.astype(np.float64) / 3
    pooled, gradient = align_and_grad()(features, ROIS, cotangent, SCALE, MASK)
    weights = oracle.roi_align_weights(FEATURES.shape, ROIS, BINS, SCALE, 2, True, MASK)
    check(pooled, gradient, features, cotangent, weights)


def test_rois_masks_and_scales_have_no_gradient():
    def total(rois, spatial_scale):
        return align(FEATURES, rois, spatial_scale).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.nan_to_num(ROIS), 0.5):
        assert not np.asarray(gradient).any()


def test_it_is_linear_in_the_features_in_every_mode():
    @jax.jit
    def modes(features):
        pooled, dot = jax.jvp(lambda x: align(x, ROIS, SCALE), (features,), (2 * features,))
        _, linear = jax.linearize(lambda x: align(x, ROIS, SCALE), features)

        def half_square(x):
            return (align(x, ROIS, SCALE) ** 2).sum() / 2

        curvature = jax.jvp(jax.grad(half_square), (features,), (features,))[1]
        return pooled, dot, jax.vmap(linear)(jnp.stack([features, -features]))[1], curvature

    pooled, dot, minus, curvature = modes(FEATURES)
    assert_same(dot, 2 * pooled)
    assert_same(minus, -pooled)
    gradient = align_and_grad()(FEATURES, ROIS, pooled, SCALE)[1]
    np.testing.assert_allclose(curvature, gradient, rtol=1e-5, atol=1e-5)


def test_vmap_of_everything():
    wanted = align_and_grad()(FEATURES, ROIS, COTANGENT)
    for actual, expected in zip(
        jax.jit(jax.vmap(align_and_grad()))(FEATURES, ROIS, COTANGENT), wanted, strict=True
    ):
        assert_same_sums(actual, expected)


def test_vmap_of_rois_does_not_copy_the_maps():
    many = jnp.stack([ROIS, ROIS[::-1], ROIS])
    program = jax.vmap(lambda rois: align(FEATURES, rois))
    assert_same(jax.jit(program)(many)[2], jax.jit(align)(FEATURES, ROIS))
    text = str(jax.make_jaxpr(program)(many))
    assert f"f32[{N},1,{H},{W},{C}]" in text
    assert f"f32[{3 * N},1," not in text


def test_a_traced_scale_that_is_not_finite_pools_nothing():
    for scale in (np.nan, np.inf):
        pooled, gradient = align_and_grad()(FEATURES, ROIS, COTANGENT, np.float32(scale))
        assert not np.asarray(pooled).any()
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize("shape", ((2, 0, 4), (0, 3, 4)))
def test_nothing_to_pool(shape):
    features = np.ones((shape[0], H, W, C), np.float32)
    for sampling_ratio in (2, None):
        pool = functools.partial(align, rois=np.ones(shape), sampling_ratio=sampling_ratio)
        pooled, pullback = jax.vjp(pool, features)
        assert pooled.shape == (*shape[:2], *BINS, C)
        assert not np.asarray(pullback(pooled)[0]).any()


BATCH = {"features": np.ones((2, 4, 5, 1))}
INTEGERS = {"features": np.ones((4, 5, 1), np.int32)}
ERRORS = {
    "integers": (TypeError, INTEGERS, "features", "int32", "float32"),
    "ratio of zero": (ValueError, {"sampling_ratio": 0}, "sampling_ratio", "None", "got 0"),
    "ratio of zero along H": (ValueError, {"sampling_ratio": (0, 2)}, "got (0, 2)"),
    "torchvision's ratio": (ValueError, {"sampling_ratio": -1}, "torchvision's -1", "got -1"),
    "ratio past the most": (ValueError, {"sampling_ratio": 4097}, "4096", "4097"),
    "ratio of a half": (TypeError, {"sampling_ratio": 0.5}, "sampling_ratio", "0.5"),
    "ratio of three axes": (ValueError, {"sampling_ratio": (1, 2, 3)}, "(1, 2, 3)"),
    "boolean ratio": (ValueError, {"sampling_ratio": True}, "sampling_ratio", "True"),
    "aligned by name": (TypeError, {"aligned": "half_pixel"}, "aligned", "'half_pixel'"),
    "unknown implementation": (ValueError, {"implementation": "abacus"}, "'gather'", "'matmul'"),
    "scale of zero": (ValueError, {"spatial_scale": 0}, "spatial_scale", "0"),
    "output size of zero": (ValueError, {"output_size": 0}, "output_size", "0"),
    "an index with one image": (ValueError, {"image_index": np.zeros(2, int)}, "[R, 4] and an"),
    "flat without an index": (ValueError, BATCH, "without an image_index"),
    "flat with two indices": (
        ValueError,
        BATCH | {"rois": np.ones((2, 5)), "image_index": np.zeros(2, int)},
        *("and an image_index", "[2, 5]"),
    ),
    "index of another length": (
        ValueError,
        BATCH | {"image_index": np.zeros(3, int)},
        *("image_index", "[2]", "[3]"),
    ),
    "index of floats": (
        TypeError,
        BATCH | {"image_index": np.zeros(2)},
        *("image_index", "float32", "integer"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    error, wrong, *mentions = ERRORS[case]
    arguments = {"features": np.ones((4, 5, 1)), "rois": np.ones((2, 4)), "output_size": 2} | wrong
    with pytest.raises(error) as raised:
        jax_roipool.roi_align(**arguments)
    for mention in mentions:
        assert mention in str(raised.value)


def test_the_maximum_takes_an_image_index_too():
    for function in (jax_roipool.roi_pool, jax_roipool.roi_pool_with_argmax):
        wanted = function(FEATURES, ROIS, BINS, SCALE)
        flat = function(FEATURES, FLAT, BINS, SCALE, image_index=INDEX)
        for actual, expected in zip(jax.tree.leaves(flat), jax.tree.leaves(wanted), strict=True):
            assert_same(actual.reshape(expected.shape), expected)
    with pytest.raises(TypeError, match="image_index must be of an integer dtype"):
        jax_roipool.roi_pool(FEATURES, FLAT, BINS, image_index=INDEX / 2)
