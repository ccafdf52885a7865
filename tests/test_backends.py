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

FEATURES, ROIS = jnp.ones((4, 4, 1)), jnp.array([[0, 0, 4, 4]])
# What gives an implementation away.
PORTABLE, LOOKUP = "stablehlo.scatter", "stablehlo.reduce_window"
NATIVE, KERNEL = "jax_roipool_cpu_max", "tpu_custom_call"


@pytest.fixture
def no_library(monkeypatch):
    """As where the package was installed without a C++ compiler."""
    cpu, *others = _backends.BACKENDS
    assert cpu.name == "cpu"
    missing = cpu._replace(what_keeps_it_from_use=lambda: "there is no library")
    monkeypatch.setattr(_backends, "BACKENDS", (missing, *others))
    _backends._say_once.cache_clear()
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
        ValueError, match=r"'caffe'.*'cpu' \(cpu\), 'tpu' \(tpu\), .*'xla' \(every platform\)"
    ):
        pool("caffe")(FEATURES)


def test_platform_that_cannot_run_it_lists_what_there_is():
    with pytest.raises(
        ValueError,
        match=r"'tpu' cannot be used on cpu: it is for other platforms.*'cpu' \(cpu\)",
    ):
        pool("tpu")(FEATURES)


def test_none_is_the_best_that_the_platform_has():
    assert KERNEL in exported(["tpu"])
    assert PORTABLE not in exported(["tpu"])
    assert PORTABLE in exported(["cuda"])


@pytest.mark.parametrize("platform", ("cuda", "rocm", "oneapi", "METAL"))
def test_platforms_without_a_backend_of_their_own_take_the_portable_one(platform):
    def both(features):
        pooled, pullback = jax.vjp(pool(), features)
        return pooled, *pullback(pooled)

    lowered = jax.jit(both).trace(FEATURES).lower(lowering_platforms=(platform,)).as_text()
    # Maxima and their cells, of rows and of columns, and the gradient.
    assert lowered.count(f'"{PORTABLE}"(') == 5
    assert "custom_call" not in lowered


def test_a_name_overrules_the_best():
    assert PORTABLE in exported(["tpu"], "xla")
    assert KERNEL not in exported(["tpu"], "xla")


def test_native_on_the_cpu_and_nowhere_else(native):
    assert NATIVE in exported(["cpu"])
    assert PORTABLE not in exported(["cpu"])
    for platform in ("cuda", "rocm", "tpu"):
        assert NATIVE not in exported([platform])


def test_a_program_for_several_platforms_has_the_best_for_each(native):
    every = exported(["cpu", "cuda", "tpu"])
    assert NATIVE in every
    assert PORTABLE in every
    assert KERNEL in every


def test_a_name_must_suit_every_platform_of_the_program(native):
    with pytest.raises(ValueError, match="'cpu' cannot be used on cuda, rocm: it is for other"):
        exported(["cpu", "cuda", "rocm"], "cpu")


def test_without_the_library_a_portable_path_serves_and_it_is_said_once(no_library, caplog):
    with caplog.at_level(logging.WARNING, "jax_roipool"):
        assert (pool()(FEATURES) == 1).all()
        assert (pool()(2 * FEATURES) == 2).all()
        assert LOOKUP in exported(["cpu"])
    (record,) = caplog.records
    assert "'cpu' cannot be used: there is no library" in record.getMessage()


def test_without_the_library_its_name_is_an_error(no_library):
    with pytest.raises(ValueError, match="'cpu' cannot be used on cpu: there is no library"):
        pool("cpu")(FEATURES)


def test_without_the_library_other_platforms_say_nothing(no_library, caplog):
    exported(["cuda"])
    assert not caplog.records


def test_the_diagnosis_names_what_each_platform_uses():
    command = [sys.executable, "-m", "jax_roipool"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert f"jax_roipool {jax_roipool.__version__}" in said
    assert f"jax {jax.__version__}\n" in said
    assert f"cpu: {_backends.select(None, ['cpu'], False).name!r}" in said
    assert "tpu: 'tpu', 'dense' where XLA splits it over devices" in said
    assert "cuda: 'xla'" in said
