"""The Flax modules: the function's arguments as configuration, and nothing else."""

import functools
import inspect

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_average_oracle import assert_gradient, load, named, tolerance_of

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
    lists = linen.MultiScaleRoIAlign([2, 3], [1 / 4, 1 / 8], sampling_ratio=[1, 2])
    assert hash(lists) == hash(linen.MultiScaleRoIAlign((2, 3), (1 / 4, 1 / 8), (1, 2)))


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


@pytest.mark.parametrize("modules", (linen, nnx), ids=("linen", "nnx"))
@pytest.mark.parametrize("name", ("RoIAlign", "MultiScaleRoIAlign"))
def test_a_ratio_is_refused_at_once(modules, name):
    with pytest.raises(ValueError, match="torchvision's -1"):
        getattr(modules, name)(2, 1, sampling_ratio=-1)


@pytest.mark.parametrize("modules", (linen, nnx), ids=("linen", "nnx"))
@pytest.mark.parametrize(("name", "function"), (("RoIPool", "roi_pool"), ("RoIAlign", "roi_align")))
def test_fields_are_the_functions_keywords(modules, name, function):
    def settings(function):
        calls = ("self", "features", "rois", "roi_mask", "image_index", "parent", "name")
        return {
            name: parameter.default
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in calls
        }

    wanted = settings(getattr(jax_roipool, function)) | {"spatial_scale": inspect.Parameter.empty}
    assert settings(getattr(modules, name).__init__) == wanted


def layer_of(modules, name):
    """Makes a layer, and of it a function, as both kinds of Flax do."""

    def make(*args, **kwargs):
        module = getattr(modules, name)(*args, **kwargs)
        return functools.partial(module.apply, {}) if modules is linen else module

    return make


@pytest.mark.parametrize("modules", (linen, nnx), ids=("linen", "nnx"))
def test_roi_align_equals_the_function(modules):
    options = {"sampling_ratio": [2, 1], "aligned": False, "implementation": "xla"}
    averaged = layer_of(modules, "RoIAlign")([2, 3], 1 / 16, **options)(FEATURES, ROIS, MASK)
    want = jax_roipool.roi_align(
        FEATURES, ROIS, (2, 3), spatial_scale=1 / 16, roi_mask=MASK, **options
    )
    assert_same(averaged, want)
    assert np.abs(want).max() > 0


@pytest.mark.parametrize("modules", (linen, nnx), ids=("linen", "nnx"))
@pytest.mark.parametrize("name", ("RoIPool", "RoIAlign"))
def test_the_images_of_rois_can_be_an_array(modules, name):
    layer = layer_of(modules, name)(2, 1 / 16)
    images = jnp.repeat(jnp.arange(2), 5)
    flat = layer(FEATURES, ROIS.reshape(10, 4), MASK.reshape(10), image_index=images)
    assert_same(flat.reshape(2, 5, 2, 2, 3), layer(FEATURES, ROIS, MASK))


@pytest.mark.parametrize(
    ("modules", "recording"),
    (
        pytest.param(linen, *named("multiscale-n2"), id="linen, defaults"),
        pytest.param(nnx, *named("multiscale-n-1"), id="nnx, adaptive", marks=pytest.mark.full),
    ),
)
def test_multi_scale_roi_align_is_torchvisions(modules, recording):
    recorded = load(recording)
    size, level = recorded["canonical"].tolist()
    options = {
        "sampling_ratio": recorded["sampling_ratio"],
        "aligned": recorded["aligned"],
        "canonical_size": size,
        "canonical_level": level,
    }
    if recording in named("multiscale-n2"):  # torchvision's defaults
        options = {}
    make = layer_of(modules, "MultiScaleRoIAlign")
    layer = make(recorded["output_size"], recorded["spatial_scales"].tolist(), **options)

    @jax.jit
    def values_and_gradients(features, rois, cotangent):
        averaged, backward = jax.vjp(lambda features: layer(features, rois), features)
        return averaged, backward(cotangent)[0]

    features = [recorded[f"x{i}"] for i in range(4)]
    averaged, grads = values_and_gradients(features, recorded["rois"], recorded["g"])
    np.testing.assert_allclose(averaged, recorded["out"], rtol=0, atol=tolerance_of(recording))
    for i, grad in enumerate(grads):
        assert_gradient(np.asarray(grad), recorded[f"grad{i}"])


def test_a_mask_reaches_every_level():
    layer = nnx.MultiScaleRoIAlign(2, (1 / 4, 1 / 8), canonical_size=64, canonical_level=3)
    features = [FEATURES, FEATURES[:, ::2, ::2]]
    rois = jnp.array([[[0, 0, 20, 20], [0, 0, 70, 70]]] * 2)
    both, first = layer(features, rois), layer(features, rois, np.array([[True, False]] * 2))
    assert_same(first[:, 0], both[:, 0])
    assert not first[:, 1].any()
    of_second = jax_roipool.roi_align(
        features[1], rois, 2, spatial_scale=1 / 8, sampling_ratio=2, aligned=False
    )
    assert_same(both[:, 1], of_second[:, 1])
    assert np.abs(of_second[:, 1]).max() > 0


@pytest.mark.parametrize("name", ("RoIPool", "RoIAlign", "MultiScaleRoIAlign"))
def test_the_packages_modules_are_linens(name):
    assert getattr(jax_roipool, name) is getattr(linen, name)


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
