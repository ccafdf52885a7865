"""Who has what and what is summed, by the plan alone: nothing is compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_roipool._partitioning import Axes, mesh_axes, plan

MESH = AbstractMesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
POOL = Axes(("gnhwc", "gke"), ("gkpqc", "gkpqc"), packed_index=1)
SCATTER = Axes(("gkpqc", "gkpqc", "gke"), ("gnhwc",), packed_index=2)
SIZES = {"g": 8, "n": 8, "h": 9, "w": 10, "c": 8, "k": 16, "p": 2, "q": 2, "e": 9}


def types(axes, sizes=None, **split):
    """A type for each array, its axes split as the letters say."""
    sizes = SIZES | (sizes or {})
    return [
        jax.ShapeDtypeStruct(
            [sizes[axis] for axis in array],
            jnp.float32,
            sharding=NamedSharding(MESH, P(*(split.get(axis) for axis in array))),
        )
        for array in (*axes.operands, *axes.results)
    ]


def planned(axes, sizes=None, **split):
    return plan(axes, types(axes, sizes, **split), MESH)


@pytest.mark.parametrize("axes", (POOL, SCATTER))
@pytest.mark.parametrize("axis", "gc")
def test_groups_and_channels_are_independent(axes, axis):
    made = planned(axes, **{axis: "x"})
    arrays = (*axes.operands, *axes.results)
    for array, spec in zip(arrays, (*made.in_specs, *made.out_specs), strict=True):
        assert spec == P(*("x" if letter == axis else None for letter in array))
    assert (made.images_over, made.summed_over, made.summed_onto) == ((), (), None)


def test_rois_are_pooled_apart_and_their_gradients_summed():
    made = planned(POOL, k=("x", "y"))
    assert made.in_specs == (P(*[None] * 5), P(None, ("x", "y"), None))
    assert made.out_specs[0] == P(None, ("x", "y"), None, None, None)
    assert made.summed_over == ()
    made = planned(SCATTER, k=("x", "y"))
    assert made.in_specs[0] == P(None, ("x", "y"), None, None, None)
    assert made.out_specs == (P(*[None] * 5),)
    assert (made.summed_over, made.summed_onto, made.images_over) == (("x", "y"), None, ())


MAPS, BINS = {"n": 8, "k": 16}, {"n": 8, "k": 16, "p": 20, "q": 20}  # what is larger


@pytest.mark.parametrize(
    ("axes", "n", "k", "larger", "wanted"),
    (
        # Images stay: a device pools what is in its own, and the bins are summed to where RoIs are.
        (POOL, "x", "y", MAPS, ("x", "y", ("x",), ("x",), None)),
        (POOL, "x", None, MAPS, ("x", None, ("x",), ("x",), None)),
        (POOL, "x", "x", MAPS, ("x", None, ("x",), ("x",), "k")),
        (SCATTER, "x", "y", MAPS, ("x", "y", ("x",), ("y",), None)),
        (SCATTER, "x", None, MAPS, ("x", None, ("x",), (), None)),
        (SCATTER, "x", "x", MAPS, ("x", None, ("x",), (), None)),
        # Maps are gathered, and the sums of a gradient go to where its images are.
        (POOL, "x", "y", BINS, (None, "y", (), (), None)),
        (POOL, "x", "x", BINS, (None, "x", (), (), None)),
        (SCATTER, "x", "x", BINS, ("x", "x", (), ("x",), "n")),
        # A sum over some of the axes that RoIs are split over would mix them.
        (POOL, ("x", "y"), "x", MAPS, (None, "x", (), (), None)),
        (SCATTER, ("x", "y"), "x", MAPS, (None, "x", (), ("x",), None)),
        # A gradient whose bins need not move keeps its maps where they are, whatever their size.
        (SCATTER, "x", "y", BINS, ("x", "y", ("x",), ("y",), None)),
    ),
)
def test_flat_rois_on_a_split_batch(axes, n, k, larger, wanted):
    made = planned(axes, {"g": 1} | larger, n=n, k=k)
    maps_spec = made.in_specs[0] if axes is POOL else made.out_specs[0]
    edges_spec = made.in_specs[-1]
    got = (maps_spec[1], edges_spec[1], made.images_over, made.summed_over, made.summed_onto)
    assert got == wanted
    if axes is POOL:
        assert {spec[1] for spec in made.out_specs} == {k}


def test_without_an_image_index_maps_are_gathered():
    made = planned(POOL._replace(packed_index=None), {"g": 1} | MAPS, n="x", k="y")
    assert made.in_specs[0] == P(*[None] * 5)
    assert made.images_over == ()


def test_one_mesh_axis_splits_one_axis():
    bins = types(POOL)[2:]
    maps, edges = types(POOL, g="x", c="y")[0], types(POOL, k="x")[1]
    made = plan(POOL, [maps, edges, *bins], MESH)
    assert made.in_specs == (P("x", None, None, None, "y"), P("x", None, None))
    assert made.out_specs[0] == P("x", None, None, None, "y")


def test_rows_columns_and_what_does_not_divide_are_not_split():
    made = planned(POOL, h="x", w="y")
    assert made.in_specs[0] == P(*[None] * 5)
    made = planned(POOL, {"k": 15}, k="x")
    assert made.in_specs[1] == P(None, None, None)


def test_the_first_array_that_is_split_says_how():
    one, other = types(POOL, g="x")[0], types(POOL, g="y")[1]
    whole = types(POOL)[0]
    assert mesh_axes([("gnhwc", one), ("gke", other)])["g"] == ("x",)
    assert mesh_axes([("gnhwc", whole), ("gke", other)])["g"] == ("y",)


def test_groups_come_before_channels_and_both_before_rois():
    maps = types(POOL, c="x")[0]
    assert mesh_axes([("gnhwc", maps), ("gke", types(POOL, k="x")[1])])["k"] == ()
    split = mesh_axes([("gnhwc", maps), ("gke", types(POOL, g="x")[1])])
    assert (split["g"], split["c"]) == (("x",), ())


WEIGHTS = Axes(("gnhwc", "gkpqc", "gke", "gkqv"), ("gkpt",), packed_index=2)


def test_results_without_channels_are_summed_over_them():
    sizes = {"t": 4, "v": 4}
    made = planned(WEIGHTS, sizes, g="x", c="y")
    assert made.in_specs[0] == P("x", None, None, None, "y")
    assert made.in_specs[1] == P("x", None, None, None, "y")
    assert made.out_specs == (P("x", None, None, None),)
    assert (made.channels_over, made.summed_over) == (("y",), ())
    assert planned(WEIGHTS, sizes, k="x").channels_over == ()
    assert planned(POOL, c="y").channels_over == planned(SCATTER, c="y").channels_over == ()
