"""The choice of an implementation: by name, by platform, and the errors that list what there is."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_roipool
from jax_roipool import _backends

FEATURES, ROIS = jnp.ones((4, 4, 1)), jnp.array([[0, 0, 4, 4]])


@pytest.fixture
def only_tpu(monkeypatch):
    """A backend, better than the portable one, that gives sevens and runs on TPUs."""

    def sevens(features, image_index, row_start, row_end, col_start, col_end, **params):
        return [jnp.full((1, 1, 2, 2, 1), 7, features.dtype)]

    backend = _backends.Backend("only_tpu", frozenset({"tpu"}), sevens, sevens, sevens)
    monkeypatch.setattr(_backends, "BACKENDS", (backend, *_backends.BACKENDS))
    jax.clear_caches()
    yield
    jax.clear_caches()


def pool(implementation=None):
    return jax.jit(lambda x: jax_roipool.roi_pool(x, ROIS, 2, implementation=implementation))


def exported(platform, implementation=None):
    return export.export(pool(implementation), platforms=[platform])(FEATURES).mlir_module()


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'caffe'.*'xla' \(every platform\)"):
        pool("caffe")(FEATURES)


def test_platform_that_cannot_run_it_lists_what_there_is(only_tpu):
    with pytest.raises(
        ValueError, match=r"'only_tpu' does not run on cpu.*'only_tpu' \(tpu\), 'xla'"
    ):
        pool("only_tpu")(FEATURES)


def test_none_is_the_best_that_the_platform_has(only_tpu):
    assert (pool()(FEATURES) == 1).all()
    assert "scatter" in exported("cpu")
    assert "scatter" not in exported("tpu")


def test_a_name_overrules_the_best(only_tpu):
    assert "scatter" in exported("tpu", "xla")
    assert "scatter" not in exported("tpu", "only_tpu")
