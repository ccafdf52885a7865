"""What is lowered for CUDA: when it is the kernels, with which operands, and what the errors say.

Nothing is compiled here: NVRTC's place is taken by a stand-in, so that these tests need none.
"""

import ctypes
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jax_roipool
from jax_roipool._backends.rectangle_max import FAMILY, cuda
from jax_roipool._backends.rectangle_max.cuda import nvrtc, xla_call

FEATURES = jnp.ones((2, 6, 7, 4))
ROIS = jnp.array([[0.0, 0, 0, 4, 4], [1, 1, 2, 6, 5]])
LARGE_MAP = jnp.ones((1, 40, 40, 4))
KERNELS = re.compile(r"jax_roipool_([a-z_]+?)_(?:float|bfloat|u?int)\d+_[0-9a-f]{12}")


class StandIn:
    """NVRTC as far as it is asked for its version."""

    _name = "libnvrtc.so.0"

    def __init__(self, *version):
        self.version = version

    def nvrtcVersion(self, *pointers):  # noqa: N802
        for pointer, number in zip(pointers, self.version, strict=True):
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = number


@pytest.fixture
def compiler(monkeypatch):
    """NVRTC is there, and makes of each kernel the text "PTX of" it."""
    monkeypatch.setattr(nvrtc, "_library", lambda: StandIn(13, 0))
    monkeypatch.setattr(nvrtc, "ptx", lambda kernel: f"PTX of {kernel.name}")
    jax.clear_caches()
    yield
    jax.clear_caches()


def pool(features, implementation="cuda", output_size=2):
    rois = ROIS if features.shape[1] == 6 else ROIS * jnp.array([0, 9, 9, 9, 9])
    return jax_roipool.roi_pool(features, rois, output_size, implementation=implementation)


def both(features, **options):
    pooled, pullback = jax.vjp(lambda x: pool(x, **options), features)
    return pooled, *pullback(pooled)


def lowered(function, *arguments, platforms=("cuda",)):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def kernels(text):
    """Their names, each as often as it is launched."""
    calls = [line for line in text.splitlines() if f"@{xla_call.TARGET}" in line.replace('"', "")]
    return [KERNELS.search(line)[1] for line in calls]


def test_the_kernels_are_the_default(compiler):
    for name in (None, "cuda", "kernel"):
        text = lowered(functools.partial(pool, implementation=name), FEATURES)
        assert kernels(text) == ["rectangle_max"]
    for name in ("xla", "blocks"):
        text = lowered(functools.partial(pool, implementation=name), FEATURES)
        assert xla_call.TARGET not in text


def test_the_gradient_is_a_kernel(compiler):
    assert kernels(lowered(both, FEATURES)) == ["rectangle_max", "scatter_at_argmax"]


def test_large_bins_have_windows(compiler):
    expected = ["windows", "rectangle_max", "scatter_at_argmax"]
    assert kernels(lowered(both, LARGE_MAP)) == expected


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16", "int8", "uint16", "int32"))
def test_every_dtype_has_a_kernel(compiler, dtype):
    assert kernels(lowered(pool, FEATURES.astype(dtype))) == ["rectangle_max"]


def test_no_other_platform_has_the_kernels(compiler):
    for platform in ("cpu", "rocm", "tpu"):
        with pytest.raises(ValueError, match=rf"'cuda' is not to be had on {platform}: .*other"):
            lowered(pool, FEATURES, platforms=(platform,))


def test_transformations_launch_once(compiler):
    """Mapped axes join those that the kernels have anyway; a loop's body has one call."""
    many = jnp.ones((3, *FEATURES.shape))
    assert kernels(lowered(jax.vmap(pool), many)) == ["rectangle_max"]
    assert kernels(lowered(jax.vmap(both), many)) == ["rectangle_max", "scatter_at_argmax"]

    def loop(features):
        return lax.scan(lambda total, x: (total + pool(x).sum(), None), 0.0, features)[0]

    assert kernels(lowered(loop, many)) == ["rectangle_max"]


def test_second_derivatives_are_a_gather_of_xlas_own(compiler):
    def squares(features):
        return (pool(features) ** 2).sum()

    def product(features):
        return jax.grad(lambda x: jax.grad(squares)(x).sum())(features)

    assert set(kernels(lowered(product, FEATURES))) <= {"rectangle_max", "scatter_at_argmax"}


def test_what_has_no_kernel_is_left_to_xla(compiler, monkeypatch):
    empty = FEATURES[..., :0]
    assert xla_call.TARGET not in lowered(both, empty)
    monkeypatch.setattr(cuda.plans, "INDEX_LIMIT", 8)
    text = lowered(both, FEATURES)
    assert kernels(text) == ["rectangle_max"]  # which has fewer blocks
    assert '"stablehlo.scatter"(' in text
    jax.clear_caches()
    monkeypatch.setattr(cuda.plans, "INDEX_LIMIT", 1)
    assert xla_call.TARGET not in lowered(both, FEATURES)


def test_shapes_must_be_known(compiler):
    shape = export.symbolic_shape("n, 6, 7, 4")
    program = export.export(jax.jit(pool), platforms=["cuda"])
    with pytest.raises(ValueError, match="'cuda' cannot be used: it has to know every shape"):
        program(jax.ShapeDtypeStruct(shape, jnp.float32))


def test_an_exported_program_names_the_call(compiler):
    assert xla_call.TARGET in jax_roipool.CUSTOM_CALLS
    with pytest.raises(ValueError, match=re.escape(xla_call.TARGET)):
        export.export(jax.jit(pool), platforms=["cuda"])(FEATURES)
    allowed = [export.DisabledSafetyCheck.custom_call(xla_call.TARGET)]
    exported = export.export(jax.jit(pool), platforms=["cuda"], disabled_checks=allowed)(FEATURES)
    assert kernels(export.deserialize(exported.serialize()).mlir_module()) == ["rectangle_max"]


def test_every_process_lowers_the_same(compiler):
    first = lowered(both, LARGE_MAP)
    jax.clear_caches()
    assert lowered(both, LARGE_MAP) == first


def test_kernels_of_other_problems_have_other_names(compiler):
    """XLA finds a kernel in what it has loaded by its name, where texts can take turns."""
    texts = [
        lowered(functools.partial(pool, output_size=size), features)
        for size in (1, 2)
        for features in (FEATURES, FEATURES[..., :2], FEATURES.astype(jnp.bfloat16))
    ]
    names = [re.search(KERNELS, text)[0] for text in texts]
    assert len(set(names)) == len(names) == 6


# What is missing.


def test_without_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(()))
    nvrtc._library.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"'cuda' cannot be used: .*pip install .jax.cuda13"):
            lowered(pool, FEATURES)
        assert "run-time compiler" in nvrtc.description()
        assert xla_call.TARGET not in lowered(lambda x: pool(x, None), FEATURES)
    finally:
        nvrtc._library.cache_clear()


@pytest.mark.parametrize("version", ((11, 8), (12, 0)))
def test_an_nvrtc_that_is_too_old(monkeypatch, version):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([("/here/libnvrtc.so.11", [])]))
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode=0: StandIn(*version))
    nvrtc._library.cache_clear()
    try:
        problem = nvrtc.problem()
    finally:
        nvrtc._library.cache_clear()
    if version >= nvrtc.OLDEST:
        assert problem is None
    else:
        assert "/here/libnvrtc.so.11 is of CUDA 11.8, 12.0 is the oldest that will do" in problem


def test_builtins_are_loaded_first(monkeypatch):
    """NVRTC 13.0 finds its own only if they are there already."""
    loaded = []

    def load(name, mode=ctypes.DEFAULT_MODE):
        loaded.append((name, mode))
        return StandIn(13, 0)

    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([("/a/libnvrtc.so.13", ["builtins"])]))
    monkeypatch.setattr(ctypes, "CDLL", load)
    nvrtc._library.cache_clear()
    try:
        assert nvrtc.problem() is None
    finally:
        nvrtc._library.cache_clear()
    assert loaded == [("builtins", ctypes.RTLD_GLOBAL), ("/a/libnvrtc.so.13", ctypes.DEFAULT_MODE)]


def test_the_kernels_have_no_headers_but_their_own():
    """The compiler comes without any."""
    own = {path.name for path in nvrtc.KERNELS.glob("*.cuh")}
    for path in nvrtc.KERNELS.iterdir():
        included = re.findall(r"#include (\S+)", path.read_text())
        assert {name.strip('"') for name in included} <= own


def test_the_launch_is_one_of_the_plan(compiler):
    text = lowered(pool, FEATURES)
    problem = cuda.plans.Problem(1, 2, 6, 7, 4, 2, 2, 2)
    plan = cuda.plans.rectangle_max(problem, np.dtype(np.float32), None, empty_is_least=False)
    for name, number in (("grid_x", plan.pool.blocks), ("block_x", plan.pool.threads)):
        assert re.search(rf"{name} = {number} : i32", text)
    assert f'name = "{plan.pool.name}"' in text
    assert FAMILY.named("cuda").platforms == {"cuda"}
