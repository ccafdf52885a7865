"""The native CPU backend's own seams: vectors, tiles, threads, large maps, and what it refuses."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved, whole_cotangent
from jax_roipool._backends.rectangle_max import cpu as maxima
from jax_roipool._backends.weighted_sum import cpu as sums

pytestmark = pytest.mark.usefixtures("native")


def pool(features, rois, output_size, convention="torchvision"):
    return jax_roipool.roi_pool_with_argmax(
        features, rois, output_size, convention=convention, implementation="cpu"
    )


@pytest.mark.parametrize("channels", (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100))
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16, jnp.int8))
def test_channels_that_do_not_fill_a_vector(channels, dtype):
    features = (distinct_features((2, 6, 7, channels)) % 100).astype(dtype)
    rois = random_rois(5, 6, 7, images=2)
    wanted = oracle.roi_pool(features, rois, (2, 3), resolved("torchvision"))
    for actual, expected in zip(pool(features, rois, (2, 3)), wanted, strict=True):
        assert_same(actual, expected)


# So many bins of so many cells and channels are pooled from tiles of 2x2, 4x4 and 8x8 cells, made
# once for all. With few values there are ties in every bin, which tiles do not meet in row-major
# order. The oracle takes three channels, which are repeated.

REPEATS = 24


def large_bins(images=2, count=100):
    rng = np.random.default_rng(0)
    features = rng.integers(0, 3, (images, 53, 45, 3)).astype(np.float32)
    features[rng.random(features.shape) < 0.001] = np.nan
    start = rng.uniform(-9, 9, (count, 2))
    stop = start + rng.uniform(40, 70, (count, 2))
    index = rng.integers(-1, images + 1, count)
    return features, np.column_stack([index, start, stop]).astype(np.float32)


def repeated(array):
    return np.tile(array, REPEATS)


@pytest.mark.parametrize("convention", ("partition", "torchvision"))
@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("output_size", ((1, 1), (2, 3)))
def test_large_bins(output_size, dtype, convention):
    features, rois = large_bins()
    features = features.astype(dtype)
    wanted = oracle.roi_pool(features, rois, output_size, resolved(convention))
    pooled, argmax = pool(repeated(features), rois, output_size, convention)
    assert_same(pooled, repeated(wanted[0]))
    assert_same(argmax, repeated(wanted[1]))
    without_argmax = jax_roipool.roi_pool(
        repeated(features), rois, output_size, convention=convention, implementation="cpu"
    )
    assert_same(without_argmax, repeated(wanted[0]))


def test_gradient_of_large_bins():
    features, rois = large_bins()
    cotangent = whole_cotangent((len(rois), 2, 2, features.shape[-1]))

    def value(features):
        pooled = jax_roipool.roi_pool(features, rois, 2, implementation="cpu")
        return jnp.vdot(jnp.where(jnp.isnan(pooled), 0, pooled), repeated(cotangent))

    pooled, argmax = oracle.roi_pool(features, rois, (2, 2), resolved("partition"))
    wanted = oracle.roi_pool_grad(
        np.where(np.isnan(pooled), 0, cotangent), argmax, features.shape, rois
    )
    assert_same(jax.grad(value)(repeated(features)), repeated(wanted.astype(np.float32)))


@pytest.mark.full
def test_a_map_of_more_elements_than_an_int32_counts():
    features = np.zeros((3, 4096, 4096, 45), np.int8)  # 2.1 GiB
    features[2, 4094, 4095] = np.arange(1, 46)
    assert features.size > 2**31
    rois = np.array([[0, 0, 0, 4095, 10], [2, 4094, 4093, 4096, 4096]], np.float32)
    pooled, argmax = pool(features, rois, 1, "partition")
    assert not pooled[0].any()
    assert_same(pooled[1].ravel(), np.arange(1, 46, dtype=np.int8))
    assert (argmax[1] == 4094 * 4096 + 4095).all()


def test_a_vmap_is_one_call():
    features, rois = distinct_features((3, 8, 9, 4)), random_rois(6, 8, 9).reshape(3, 2, 4)
    gradient = jax.grad(lambda x, r: jnp.sum(pool(x, r, 2)[0]))
    for axes in ((0, 0), (None, 0)):
        mapped = jax.jit(jax.vmap(gradient, axes))
        text = mapped.lower(features if axes[0] == 0 else features[0], rois).compile().as_text()
        assert text.count('custom_call_target="jax_roipool_cpu_argmax_v2"') == 1
        assert text.count('custom_call_target="jax_roipool_cpu_scatter_v2"') == 1
        assert " while(" not in text


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_rois_without_an_image_keep_what_is_there(dtype):
    features = jnp.ones((1, 2, 4, 5, 3), dtype)
    index = jnp.asarray([0, -1, 1, 2, -(2**31), 2**31 - 1], jnp.int32)
    kept = (index < 0) | (index > 1)
    values = [-0.0, 1e-40, -jnp.inf, jnp.nan, 0.5, 7]
    onto = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None, None, None], (1, 6, 1, 2, 3))
    onto *= jnp.where(kept, 1, 0).astype(dtype)[:, None, None, None]
    before = np.asarray(onto)

    def pool(onto):
        # One bin of rows and two of columns; and for sums one tap each.
        edges = jnp.stack([index, *[0 * index + x for x in (0, 4, 0, 2, 2, 5)]], axis=-1)[None]
        cells = jnp.stack([index, *[0 * index + x for x in (1, 1, 0, 0, 2)]], axis=-1)[None]
        ones = jnp.ones((1, 6, 2, 1), jnp.float32)
        static = {"output_size": (1, 2), "empty_value": 0}
        argmax = np.dtype(np.int32)
        return (
            *maxima.rectangle_max(features, edges, onto, argmax_dtype=None, **static),
            *maxima.rectangle_max(features, edges, onto, argmax_dtype=argmax, **static),
            *sums.weighted_sum(features, cells, ones[:, :, :1], ones, onto, run=(1, 1)),
        )

    jax_roipool.register_custom_calls()
    wanted = np.where(kept[:, None, None, None], before, 1).astype(dtype)
    maximum, again, argmax, average = jax.jit(pool)(onto)
    for pooled in (maximum, again, average):
        assert_same(pooled, wanted)
    wanted = np.where(kept[:, None, None], -1, np.array([[[0], [2]]])).reshape(1, 6, 1, 2, 1)
    assert_same(argmax, np.broadcast_to(wanted, argmax.shape).astype(np.int32))
    assert_same(onto, before)  # of the caller, who still has it


def test_the_residual_of_a_small_map_is_narrow():
    rois = random_rois(6, 8, 9)

    def argmax_dtypes(shape):
        gradient = jax.grad(lambda x: jnp.sum(jax_roipool.roi_pool(x, rois, 2)))
        jaxpr = str(jax.make_jaxpr(gradient)(jnp.zeros(shape, jnp.float32)))
        return {name for name in ("i16", "i32") if f"{name}[1,6,2,2,1]" in jaxpr}

    assert argmax_dtypes((8, 9, 1)) == {"i16"}
    assert argmax_dtypes((128, 256, 1)) == {"i16"}  # as many cells as int16 has indices
    assert argmax_dtypes((129, 255, 1)) == {"i32"}


def test_the_gradient_is_the_same_bits_every_time():
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 30, 40, 64)), jnp.float32)
    rois = random_rois(200, 30, 40, images=2)
    cotangent = jnp.asarray(rng.normal(size=(200, 7, 7, 64)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(pool(x, rois, 7)[0], cotangent)))
    first = gradient(features)
    assert all((gradient(features) == first).all() for _ in range(10))


@pytest.mark.parametrize("wrong", ("features", "edges"))
def test_a_wrong_shape_is_an_error_that_names_it(wrong):
    shapes = {"features": (1, 2, 4, 5, 3), "edges": (1, 6, 9)}
    operands = [
        jnp.zeros((*shape[:-1], shape[-1] + (name == wrong)), jnp.int32)
        for name, shape in shapes.items()
    ]
    result = jax.ShapeDtypeStruct((1, 6, 2, 2, 3), jnp.int32)
    target = jax.ffi.ffi_call("jax_roipool_cpu_max_v2", result)
    jax_roipool.register_custom_calls()
    named = {"features": "pooled", "edges": "edges"}[wrong]
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=f"jax_roipool_cpu_max_v2: {named} must be .*, got"
    ):
        jax.block_until_ready(target(*operands, empty_is_lowest=False))


def test_an_argmax_that_has_no_room_for_every_cell_is_an_error_that_says_so():
    def gather(cells):
        operands = (
            jnp.zeros((1, 1, 1, cells, 1)),
            jnp.zeros((1, 1, 1, 1, 1), jnp.int16),
            jnp.zeros((1, 1, 5), jnp.int32),
        )
        target = jax.ffi.ffi_call(
            "jax_roipool_cpu_gather_v2", jax.ShapeDtypeStruct((1, 1, 1, 1, 1), jnp.float32)
        )
        return jax.block_until_ready(target(*operands))

    jax_roipool.register_custom_calls()
    assert gather(2**15).shape == (1, 1, 1, 1, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"argmax must be S32.*, got S16"):
        gather(2**15 + 1)


def run(program, **environment):
    """What a Python process prints, as JSON."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_the_baseline_vectors_give_the_same_bits():
    program = f"""
    import json, sys
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    import jax_roipool, numpy as np, test_cpu
    from jax_roipool._backends import native
    features, rois = test_cpu.large_bins()
    pooled, argmax = test_cpu.pool(features, rois, 2)
    print(json.dumps([native.vectors(), np.asarray(pooled).tolist(), argmax.tolist()]))
    """
    vectors, pooled, argmax = run(program, JAX_ROIPOOL_CPU_VECTORS="baseline")
    assert vectors == "baseline"
    want = pool(*large_bins(), 2)
    np.testing.assert_array_equal(np.float32(pooled), want[0])
    np.testing.assert_array_equal(argmax, want[1])


def test_vectors_that_there_are_not_are_an_error_that_lists_those_there_are():
    program = f"""
    import json, sys
    sys.path.insert(0, {os.path.dirname(__file__)!r})
    import jax, numpy as np, test_cpu
    from jax_roipool._backends import native
    try:
        jax.block_until_ready(test_cpu.pool(np.ones((4, 4, 1)), np.ones((1, 4)), 2))
    except jax.errors.JaxRuntimeError as error:
        print(json.dumps([native.vectors(), str(error)]))
    """
    for wrong in "sse9", "AVX2":
        for said in run(program, JAX_ROIPOOL_CPU_VECTORS=wrong):
            assert "JAX_ROIPOOL_CPU_VECTORS must be unset or one of " in said
            assert "baseline" in said
            assert f"got {wrong}" in said


def test_eight_devices_pool_at_the_same_time():
    # They share one pool of threads, and each pools while the others wait for theirs.
    program = """
    import json, re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, PartitionSpec as P
    import jax_roipool

    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(8, 16, 20, 32)), jnp.float32)
    rois = jnp.asarray(rng.uniform(0, 16, (8, 64, 4)), jnp.float32)
    def loss(features, rois):
        return jnp.sum(jax_roipool.roi_pool(features, rois, 7) ** 2)
    gradient = jax.grad(loss)
    want = jax.vmap(gradient)(features, rois)
    mapped = jax.pmap(gradient)
    results = [mapped(features, rois) for _ in range(30)]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    compiled = sharded.lower(features, rois).compile()
    results += [compiled(features, rois) for _ in range(30)]
    print(json.dumps({
        "same": all(bool((result == want).all()) for result in results),
        "native": set(re.findall("jax_roipool_cpu_[a-z0-9_]+", compiled.as_text()))
        == {"jax_roipool_cpu_argmax_v2", "jax_roipool_cpu_scatter_v2"},
    }))
    """
    said = run(program, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert said == {"same": True, "native": True}
