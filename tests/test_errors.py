"""Wrong arguments are refused while tracing, with what came and what was expected."""

import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from harness import assert_same, distinct_features, random_rois

IMAGE, BATCH = (6, 7, 2), (3, 6, 7, 2)
FOUR_CELLS = np.arange(4, dtype=np.float32).reshape(2, 2, 1)


class Call(NamedTuple):
    """A wrong call, and what its message has to mention."""

    mentions: tuple[Any, ...]
    features: Any = IMAGE
    rois: Any = (5, 4)
    output_size: Any = 2
    options: Mapping[str, Any] = MappingProxyType({})


def array(spec):
    """An array of ones: `spec` is a shape, for float32, or a shape and a dtype."""
    shape, dtype = spec if isinstance(spec[-1], (type, np.dtype)) else (spec, np.float32)
    return jnp.ones(shape, dtype)


SHAPES = {
    "features without channels": Call([(6, 7)], (6, 7)),
    "features of rank 1": Call([(6,)], (6,)),
    "features of rank 0": Call([()], ((), np.float32)),
    "features of rank 5": Call([(2, 3, 6, 7, 2)], (2, 3, 6, 7, 2)),
    "rois of rank 1": Call([(4,)], IMAGE, (4,)),
    "rois of rank 3 on one image": Call([IMAGE, (2, 5, 4)], IMAGE, (2, 5, 4)),
    "rois of rank 4": Call([BATCH, (3, 2, 5, 4)], BATCH, (3, 2, 5, 4)),
    "rois with an index on one image": Call([IMAGE, (5, 5)], IMAGE, (5, 5)),
    "rois without an index on a batch": Call([BATCH, (5, 4)], BATCH, (5, 4)),
    "rois per image with an index": Call([BATCH, (3, 5, 5)], BATCH, (3, 5, 5)),
    "rois of three coordinates": Call([(5, 3)], IMAGE, (5, 3)),
    "rois of six values": Call([(5, 6)], BATCH, (5, 6)),
    "rois of another batch size": Call([BATCH, (2, 5, 4)], BATCH, (2, 5, 4)),
    "rois of batch size one": Call([BATCH, (1, 5, 4)], BATCH, (1, 5, 4)),
    "map without rows": Call([(0, 7, 2)], (0, 7, 2)),
    "map without columns": Call([(6, 0, 2)], (6, 0, 2)),
    "maps without rows": Call([(3, 0, 7, 2)], (3, 0, 7, 2), (3, 5, 4)),
}
DTYPES = {
    "complex features": Call(["complex64"], (IMAGE, np.complex64)),
    "boolean features": Call(["bool"], (IMAGE, np.bool_)),
    "complex rois": Call(["complex64"], IMAGE, ((5, 4), np.complex64)),
    "boolean rois": Call(["bool"], IMAGE, ((5, 4), np.bool_)),
}
OUTPUT_SIZES = {
    "output size of zero": Call([0], output_size=0),
    "negative output size": Call([-3], output_size=-3),
    "output size with a zero": Call([0], output_size=(4, 0)),
    "output size with a zero in front": Call([0], output_size=(0, 4)),
    "output size past the most": Call([4097, 4096], output_size=(4, 4097)),
    "output size past the most in front": Call([4097, 4096], output_size=(4097, 4)),
    "output size with a negative": Call([-3], output_size=(-3, 4)),
    "fractional output size": Call([2.5], output_size=2.5),
    "whole float output size": Call([2.0], output_size=2.0),
    "fractional length in output size": Call([2.5], output_size=(2, 2.5)),
    "boolean output size": Call(["True"], output_size=True),
    "output size of one": Call([7], output_size=(7,)),
    "output size of three": Call([7, 8, 9], output_size=(7, 8, 9)),
    "output size of none": Call([], output_size=()),
    "textual output size": Call(["seven"], output_size="seven"),
    "no output size": Call(["None"], output_size=None),
}
OPTIONS = {
    "unknown convention": Call(
        ["caffe2", *jax_roipool.CONVENTIONS], options={"convention": "caffe2"}
    ),
    "convention of a wrong type": Call(["int"], options={"convention": 7}),
    "no convention": Call(["None"], options={"convention": None}),
    "unknown implementation": Call(["abacus", "'xla'"], options={"implementation": "abacus"}),
    "implementation of a wrong type": Call(["7"], options={"implementation": 7}),
    "scale of zero": Call(["spatial_scale", 0.0], options={"spatial_scale": 0.0}),
    "negative scale": Call(["spatial_scale", -0.5], options={"spatial_scale": -0.5}),
    "infinite scale": Call(["spatial_scale", "inf"], options={"spatial_scale": float("inf")}),
    "scale that is not a number": Call(
        ["spatial_scale", "nan"], options={"spatial_scale": float("nan")}
    ),
    "scale past float32": Call(["spatial_scale", "1e+39"], options={"spatial_scale": 1e39}),
    "scale past every float": Call(["spatial_scale"], options={"spatial_scale": 10**400}),
    "scale that float32 takes for zero": Call(
        ["spatial_scale", "1e-50"], options={"spatial_scale": 1e-50}
    ),
    "scale per axis": Call(
        ["spatial_scale", (2,)], options={"spatial_scale": np.float32([0.5, 0.5])}
    ),
    "scale of rank 1": Call(["spatial_scale", (1,)], options={"spatial_scale": np.float32([0.5])}),
    "textual scale": Call(["spatial_scale"], options={"spatial_scale": "half"}),
    "no scale": Call(["spatial_scale"], options={"spatial_scale": None}),
}
MASKS = {
    "mask of another length": Call(["mask", (4,), (5,)], options={"roi_mask": np.ones(4, bool)}),
    "mask of another rank": Call(["mask", (5, 1)], options={"roi_mask": np.ones((5, 1), bool)}),
    "mask of no rank": Call(["mask"], options={"roi_mask": np.array(True)}),
    "mask per coordinate": Call(["mask", (5, 4)], options={"roi_mask": np.ones((5, 4), bool)}),
    "mask of a batch, flat": Call(
        ["mask", (15,), (3, 5)], BATCH, (3, 5, 4), options={"roi_mask": np.ones(15, bool)}
    ),
    "mask of a batch, transposed": Call(
        ["mask", (5, 3), (3, 5)], BATCH, (3, 5, 4), options={"roi_mask": np.ones((5, 3), bool)}
    ),
    "mask of flat rois, per image": Call(
        ["mask", (3, 5)], BATCH, (5, 5), options={"roi_mask": np.ones((3, 5), bool)}
    ),
    "mask of floats": Call(
        ["mask", "float32", "bool"], options={"roi_mask": np.ones(5, np.float32)}
    ),
    "mask of integers": Call(["mask", "int32", "bool"], options={"roi_mask": np.ones(5, np.int32)}),
}
# NumPy arrays among the options are arguments of the traced function, the rest is static.
CALLS = SHAPES | DTYPES | OUTPUT_SIZES | OPTIONS | MASKS
FUNCTIONS = (jax_roipool.roi_pool, jax_roipool.roi_pool_with_argmax)


def pattern(mention):
    """A shape in any notation (`(5, 4)`, `[5,4]`, `float32[5,4]`), or the text itself."""
    if isinstance(mention, tuple):
        return r"[\[(]" + ", ?".join(map(str, mention)) + r",?[\])]"
    return re.escape(str(mention))


def assert_mentions(message, mentions):
    for mention in mentions:
        assert re.search(pattern(mention), message), f"{mention!r} is not in: {message}"


def call(function, arguments, case, static):
    features, rois, options = arguments
    return function(features, rois, case.output_size, **options, **static)


def split(case):
    traced = {k: v for k, v in case.options.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in case.options.items() if k not in traced}
    return (array(case.features), array(case.rois), traced), static


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_wrong_call_is_refused(function, name):
    case = CALLS[name]
    arguments, static = split(case)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(function, arguments, case, static)
    assert_mentions(str(caught.value), case.mentions)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call_is_refused_while_tracing(name):
    case = CALLS[name]
    arguments, static = split(case)
    # No values at all: nothing but shapes and dtypes can be looked at.
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    traced = jax.jit(lambda *arguments: call(jax_roipool.roi_pool, arguments, case, static))
    with pytest.raises((TypeError, ValueError)) as caught:
        traced.trace(*arguments)
    assert_mentions(str(caught.value), case.mentions)


@pytest.mark.parametrize("features", (None, "features", {}))
def test_features_that_are_no_array_are_refused(features):
    with pytest.raises((TypeError, ValueError)):
        jax_roipool.roi_pool(features, jnp.ones((5, 4)), 2)


@pytest.mark.parametrize("rois", (None, "rois", {}))
def test_rois_that_are_no_array_are_refused(rois):
    with pytest.raises((TypeError, ValueError)):
        jax_roipool.roi_pool(jnp.ones(IMAGE), rois, 2)


@pytest.mark.parametrize("value", (1.0, -1.0, 1e-30, -1e30, np.nan, np.inf, "0", None, np.zeros(2)))
def test_convention_refuses_other_empty_values(value):
    with pytest.raises(ValueError, match="empty_value"):
        jax_roipool.Convention(empty_value=value)


@pytest.mark.parametrize("field", ("inclusive_end", "overlapping_bins", "float32_edges"))
def test_convention_is_frozen_and_takes_keywords_only(field):
    convention = jax_roipool.Convention(**{field: True})
    assert convention != jax_roipool.Convention()
    assert hash(convention) == hash(jax_roipool.Convention(**{field: True}))
    with pytest.raises(AttributeError):
        setattr(convention, field, False)
    with pytest.raises(TypeError):
        jax_roipool.Convention(True)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        jax_roipool.CONVENTIONS["partition"] = jax_roipool.Convention(inclusive_end=True)


def test_the_scale_has_torchvisions_place_and_all_else_a_name():
    features, rois = distinct_features(IMAGE), random_rois(5, 6, 7)
    pooled = jax_roipool.roi_pool(features, rois, 2, 0.5)
    assert_same(pooled, jax_roipool.roi_pool(features, rois, 2, spatial_scale=0.5))
    with pytest.raises(TypeError, match="positional"):
        jax_roipool.roi_pool(features, rois, 2, 0.5, None)


@pytest.mark.parametrize("output_size", (2, [2, 2], (np.int64(2), 2)), ids=repr)
def test_output_size_may_be_any_integers(output_size):
    # The refusals above must not refuse these.
    pooled = jax_roipool.roi_pool(
        jnp.arange(16.0).reshape(4, 4, 1), jnp.asarray([[0.0, 0, 4, 4]]), output_size
    )
    assert pooled.ravel().tolist() == [5, 7, 13, 15]


@pytest.mark.parametrize("end", (2, 2.0, 4_000_000_000, 2**40, -(2**40), 10**30))
def test_coordinates_of_every_size(end):
    """Of Python's numbers and NumPy's, also where int32 has no room for them."""
    rois = [[[0, 0, end, 2]], ((0, 0, end, 2),)]
    if end < 2**63:
        rois.append(np.array(rois[0]))
    expected = [2 if end < 0 else 3]
    for boxes in rois:
        assert jax_roipool.roi_pool(FOUR_CELLS, boxes, 1).ravel().tolist() == expected
    traced = jax.jit(lambda x: jax_roipool.roi_pool(FOUR_CELLS, [[x, 0, end, 2]], 1))(0)
    assert traced.ravel().tolist() == expected


def test_coordinates_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="rois must be numbers that 32 bits can hold"):
        jax_roipool.roi_pool(FOUR_CELLS, [[0, 0, 10**400, 2]], 1)


@pytest.mark.parametrize(
    "scale", (Fraction(1, 2), 0.5, np.float16(0.5), jnp.float16(0.5)), ids=repr
)
def test_scales_of_every_type(scale):
    pooled = jax_roipool.roi_pool(FOUR_CELLS, [[0, 0, 2, 4]], 1, spatial_scale=scale)
    assert pooled.ravel().tolist() == [2]


@pytest.mark.parametrize("scale", (Fraction(-1, 2), Fraction(0), Fraction(10**50), False), ids=repr)
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="spatial_scale must be positive and finite"):
        jax_roipool.roi_pool(FOUR_CELLS, [[0, 0, 2, 4]], 1, spatial_scale=scale)


def test_a_scale_of_another_kind_is_told_how_to_become_one():
    with pytest.raises(
        TypeError, match=r"spatial_scale .*got Decimal\('0.5'\); convert it by float"
    ):
        jax_roipool.roi_pool(FOUR_CELLS, [[0, 0, 2, 4]], 1, spatial_scale=Decimal("0.5"))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("output_size", (7, (7, 7), [7, 7]), ids=repr)
def test_a_traced_output_size_is_told_to_be_static(function, output_size):
    with pytest.raises(TypeError, match=r"output_size.*static_argnames='output_size'"):
        jax.jit(function)(FOUR_CELLS, jnp.ones((1, 4)), output_size)


@pytest.mark.parametrize("scale", (np.float32(-1), np.float64(np.nan), np.int32(0)), ids=repr)
def test_numpy_scale_is_checked_as_pythons_is(scale):
    with pytest.raises(ValueError, match="spatial_scale"):
        jax_roipool.roi_pool(np.ones(IMAGE, np.float32), np.ones((5, 4)), 2, spatial_scale=scale)


def test_lists_of_different_lengths_are_told_to_pad():
    with pytest.raises(TypeError, match=r"rois must be an array.*pad"):
        jax_roipool.roi_pool(np.ones(BATCH, np.float32), [[[0, 0, 4, 4]], [], []], 2)


@pytest.mark.parametrize("spec", (P(None, "x"), P(None, None, "x"), P(*5 * [None])), ids=repr)
def test_a_spec_that_splits_rows_or_columns(spec):
    with pytest.raises(ValueError, match="features_spec must split no axes but the batch and the"):
        jax_roipool.roi_pool(jnp.ones(BATCH), jnp.ones((5, 5)), 2, features_spec=spec)


def test_a_spec_that_is_none():
    with pytest.raises(TypeError, match=r"features_spec must be a jax.sharding.PartitionSpec.*'x'"):
        jax_roipool.roi_pool(jnp.ones(BATCH), jnp.ones((5, 5)), 2, features_spec="x")


def test_a_spec_without_a_mesh_and_one_of_another_mesh():
    def pool(features):
        return jax_roipool.roi_pool(features, jnp.ones((5, 5)), 2, features_spec=P("x"))

    with pytest.raises(ValueError, match=r"names? axes of a mesh.*'x'.*shard them, or .*set_mesh"):
        pool(jnp.ones(BATCH))
    mesh = jax.make_mesh((1,), ("y",), axis_types=(AxisType.Auto,))
    on_another_mesh = jax.device_put(jnp.ones(BATCH), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"'x'.*the arrays has \('y',\)"):
        pool(on_another_mesh)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_a_spec_on_one_device(kind):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    features, rois = distinct_features(BATCH), random_rois(5, 6, 7, images=3)
    with jax.set_mesh(mesh):
        pooled = jax.jit(lambda x: jax_roipool.roi_pool(x, rois, 2, features_spec=P("x")))(features)
    assert_same(pooled, np.asarray(jax_roipool.roi_pool(features, rois, 2)))


@pytest.mark.parametrize("implementation", (["xla"], 1))
def test_implementation_that_is_no_name(implementation):
    with pytest.raises(ValueError, match="implementation must be None"):
        jax_roipool.roi_pool(
            np.ones(IMAGE, np.float32), np.ones((5, 4)), 2, implementation=implementation
        )
