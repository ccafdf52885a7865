"""The choice of an implementation: by name, by platform, and the errors that list what there is."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_roipool
from jax_roipool import _backends
from jax_roipool._backends.rectangle_max import FAMILY
from jax_roipool._backends.rectangle_max.cuda import nvrtc

pytestmark = pytest.mark.usefixtures("on_the_cpu")

FEATURES, ROIS = jnp.ones((4, 4, 1)), jnp.array([[0, 0, 4, 4]])
# What gives an implementation away, forward.
SEGMENTS, BLOCKS = "stablehlo.scatter", "stablehlo.gather"
NATIVE, KERNEL = "jax_roipool_cpu_max", "tpu_custom_call"


@pytest.fixture
def no_library(monkeypatch):
    """As where the package was installed without a C++ compiler."""
    cpu, *others = FAMILY.backends
    assert cpu.name == "cpu"
    missing = cpu._replace(unavailable_reason=lambda: "there is no library")
    monkeypatch.setattr(FAMILY, "backends", (missing, *others))
    _backends._warn_once.cache_clear()
    jax.clear_caches()
    yield
    jax.clear_caches()


def pool(implementation=None):
    return jax.jit(lambda x: jax_roipool.roi_pool(x, ROIS, 2, implementation=implementation))


def exported(platforms, implementation=None):
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in jax_roipool.CUSTOM_CALLS]
    program = export.export(pool(implementation), platforms=platforms, disabled_checks=allowed)
    return program(FEATURES).mlir_module()


def test_unknown_name_lists_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"'xla' \(plain XLA\).*'cpu' \(cpu\), .*'tpu' \(tpu\), .*'dense' \(every platform\)"
        r".*; got 'caffe'",
    ):
        pool("caffe")(FEATURES)


def test_platform_that_cannot_run_it_lists_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"'tpu' is not to be had on cpu: .*'tpu' cannot be used: it is for other platforms"
        r".*'cpu' \(cpu\)",
    ):
        pool("tpu")(FEATURES)


def test_none_is_the_best_that_the_platform_has():
    assert KERNEL in exported(["tpu"])
    assert BLOCKS in exported(["rocm"])
    assert SEGMENTS not in exported(["rocm"])


@pytest.mark.parametrize("platform", ("rocm", "oneapi", "METAL"))
def test_platforms_without_a_kernel_take_the_portable_one(platform):
    def both(features):
        pooled, pullback = jax.vjp(pool(), features)
        return pooled, *pullback(pooled)

    lowered = jax.jit(both).trace(FEATURES).lower(lowering_platforms=(platform,)).as_text()
    assert f'"{BLOCKS}"(' in lowered
    assert lowered.count(f'"{SEGMENTS}"(') == 1  # the gradient
    assert "custom_call" not in lowered


@pytest.mark.parametrize("platform", ("cpu", "cuda", "rocm"))
def test_xla_is_the_best_without_a_kernel(platform):
    program = exported([platform], "xla")
    assert BLOCKS in program
    assert "custom_call" not in program


def test_xla_on_a_tpu_has_neither_gather_nor_scatter():
    program = exported(["tpu"], "xla")
    assert KERNEL not in program
    assert BLOCKS not in program
    assert SEGMENTS not in program


def test_a_program_that_xla_splits_by_itself_has_what_it_can_split():
    for platform in ("cpu", "cuda", "tpu"):
        for implementation in (None, "xla"):
            assert FAMILY.select(implementation, [platform], partitioned=True).is_partitionable


def test_kernel_is_one_written_by_hand(native):
    assert NATIVE in exported(["cpu"], "kernel")
    assert KERNEL in exported(["tpu"], "kernel")


def test_kernel_is_an_error_where_there_is_none():
    with pytest.raises(
        ValueError, match="'kernel' is not to be had on rocm: no kernel was written for it"
    ):
        exported(["rocm"], "kernel")


def test_kernel_is_an_error_where_xla_splits_the_program():
    with pytest.raises(ValueError, match=r"'tpu' cannot be used: XLA splits .* jax.shard_map"):
        FAMILY.select("kernel", ["tpu"], partitioned=True)


def test_a_kernel_that_xla_cannot_split_is_named_in_the_log_once(caplog):
    _backends._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "jax_roipool"):
        for implementation in (None, None, "xla", "dense"):
            assert FAMILY.select(implementation, ["tpu"], partitioned=True).name == "dense"
        assert FAMILY.select(None, ["rocm"], partitioned=True).name == "segment_max"
    (record,) = caplog.records
    assert "'tpu' cannot be used: XLA splits this program" in record.getMessage()
    assert "name the axes in features_spec" in record.getMessage()
    assert record.getMessage().endswith("'dense' is used instead")


def test_kernel_is_an_error_without_the_library(no_library):
    with pytest.raises(ValueError, match="'cpu' cannot be used: there is no library"):
        pool("kernel")(FEATURES)


def test_a_name_overrules_the_best():
    assert SEGMENTS in exported(["tpu"], "segment_max")
    assert KERNEL not in exported(["tpu"], "segment_max")


def test_native_on_the_cpu_and_nowhere_else(native):
    assert NATIVE in exported(["cpu"])
    assert BLOCKS not in exported(["cpu"])
    for platform in ("cuda", "rocm", "tpu"):
        assert NATIVE not in exported([platform])


def test_a_program_for_several_platforms_has_the_best_for_each(native):
    every = exported(["cpu", "rocm", "tpu"])
    assert NATIVE in every
    assert BLOCKS in every
    assert KERNEL in every


def test_a_name_must_suit_every_platform_of_the_program(native):
    with pytest.raises(
        ValueError, match=r"'cpu' is not to be had on rocm, METAL: .* it is for other"
    ):
        exported(["cpu", "rocm", "METAL"], "cpu")


def test_without_the_library_a_portable_path_serves_and_it_is_said_once(no_library, caplog):
    with caplog.at_level(logging.WARNING, "jax_roipool"):
        assert (pool()(FEATURES) == 1).all()
        assert (pool()(2 * FEATURES) == 2).all()
        assert BLOCKS in exported(["cpu"])
    (record,) = caplog.records
    assert "'cpu' cannot be used: there is no library" in record.getMessage()


def test_without_the_library_its_name_is_an_error(no_library):
    with pytest.raises(ValueError, match="'cpu' cannot be used: there is no library"):
        pool("cpu")(FEATURES)


def test_without_the_library_other_platforms_say_nothing(no_library, caplog):
    exported(["rocm"])
    assert not caplog.records


def test_the_diagnosis_names_what_each_platform_uses():
    command = [sys.executable, "-m", "jax_roipool"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert f"jax_roipool {jax_roipool.__version__}" in said
    assert f"jax {jax.__version__}\n" in said
    assert f"cpu: {FAMILY.select(None, ['cpu'], partitioned=False).name!r}" in said
    assert "tpu: 'tpu', 'dense' where XLA splits it over devices" in said
    assert f"cuda: {FAMILY.select(None, ['cuda'], partitioned=False).name!r}" in said
    assert f"NVRTC, for CUDA kernels: {nvrtc.description()}" in said
