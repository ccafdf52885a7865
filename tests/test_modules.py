"""The Flax modules: the function's arguments as configuration, and nothing else."""

import inspect

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_roipool
import oracle
from harness import assert_same, distinct_features, random_rois, resolved
from jax_roipool import linen, nnx

FEATURES = distinct_features((2, 8, 9, 3))
ROIS = jnp.stack([16 * random_rois(5, 8, 9, seed) for seed in (1, 2)])
MASK = jnp.array([[True, True, False, True, False], [False, True, True, True, True]])
OPTIONS = {"spatial_scale": 1 / 16, "convention": "chainer", "implementation": "xla"}


def expected(rois, output_size, convention, **options):
    pooled, _ = oracle.roi_pool(FEATURES, rois, output_size, resolved(convention), **options)
    return pooled


def linen_layer(*args, **kwargs):
    module = linen.RoIPool(*args, **kwargs)
    return lambda *inputs: module.apply({}, *inputs)


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_module_equals_the_function(layer):
    pooled = layer((2, 3), **OPTIONS)(FEATURES, ROIS, MASK)
    want = expected(ROIS, (2, 3), "chainer", spatial_scale=1 / 16, roi_mask=MASK)
    assert_same(pooled, want)


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_defaults_are_the_functions(layer):
    assert_same(layer(2, 1)(FEATURES, ROIS / 16), expected(ROIS / 16, (2, 2), "partition"))


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_an_output_size_may_be_a_list_and_is_checked_at_once(layer):
    pooled = jax.jit(layer([2, 3], 1))(FEATURES, ROIS / 16)
    assert_same(pooled, expected(ROIS / 16, (2, 3), "partition"))
    with pytest.raises(ValueError, match="output_size must be"):
        layer([2, 3, 4], 1)


def test_linen_module_is_hashed_with_a_list():
    assert hash(linen.RoIPool([2, 3], 1)) == hash(linen.RoIPool((2, 3), 1))


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_forward_mode(layer):
    module = layer(2, 1, forward_mode=True)
    _, tangent = jax.jvp(lambda x: module(x, ROIS / 16), (FEATURES,), (FEATURES,))
    assert_same(tangent, expected(ROIS / 16, (2, 2), "partition"))


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_the_scale_has_no_default(layer):
    with pytest.raises(TypeError, match="spatial_scale"):
        layer(2)


@pytest.mark.parametrize("layer", (linen_layer, nnx.RoIPool), ids=("linen", "nnx"))
def test_module_keeps_the_functions_errors(layer):
    with pytest.raises(ValueError, match="unknown convention 'caffe'"):
        layer(2, 1, convention="caffe")(FEATURES, ROIS)


@pytest.mark.parametrize("module", (linen.RoIPool, nnx.RoIPool), ids=("linen", "nnx"))
def test_fields_are_the_functions_keywords(module):
    def settings(function):
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in ("self", "features", "rois", "roi_mask", "parent", "name")
        }

    wanted = settings(jax_roipool.roi_pool) | {"spatial_scale": inspect.Parameter.empty}
    assert settings(module.__init__) == wanted


def test_the_packages_module_is_linens():
    assert jax_roipool.RoIPool is linen.RoIPool


def test_linen_module_has_no_variables():
    assert linen.RoIPool(2, 1).init(jax.random.key(0), FEATURES, ROIS) == {}


def test_nnx_module_has_no_state():
    assert not jax.tree.leaves(flax.nnx.state(nnx.RoIPool(2, 1)))


def train(loss_and_gradient, parameters):
    """Gradient descent on a convolution before the pooling; the losses."""
    optimizer = optax.sgd(0.01)
    state, losses = optimizer.init(parameters), []
    for _ in range(4):
        loss, gradient = loss_and_gradient(parameters)
        updates, state = optimizer.update(gradient, state)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(float(loss))
    return losses


def test_linen_model_learns_through_the_pooling():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, features, rois, roi_mask):
            features = flax.linen.Conv(4, (3, 3))(features)
            return jax_roipool.RoIPool(2, spatial_scale=1 / 16)(features, rois, roi_mask)

    model, features = Model(), FEATURES / 100
    parameters = model.init(jax.random.key(0), features, ROIS, MASK)
    losses = train(
        jax.jit(
            jax.value_and_grad(lambda p: ((model.apply(p, features, ROIS, MASK) - 1) ** 2).mean())
        ),
        parameters,
    )
    assert np.all(np.diff(losses) < 0)


def test_nnx_model_learns_through_the_pooling():
    class Model(flax.nnx.Module):
        def __init__(self, rngs):
            self.conv = flax.nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.pool = nnx.RoIPool(2, spatial_scale=1 / 16)

        def __call__(self, features, rois, roi_mask):
            return self.pool(self.conv(features), rois, roi_mask)

    features = FEATURES / 100
    graph, parameters = flax.nnx.split(Model(flax.nnx.Rngs(0)))

    @jax.jit
    @jax.value_and_grad
    def loss(parameters):
        model = flax.nnx.merge(graph, parameters)
        return ((model(features, ROIS, MASK) - 1) ** 2).mean()

    assert np.all(np.diff(train(loss, parameters)) < 0)
