"""Several devices: `jit` over a mesh in both modes, `shard_map`, `pmap`, on eight host devices.

`sharded.py` does it all in one process; here it is claim by claim.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import some_by_default

MODES = ("auto", "explicit")
# What the features are sharded over, if at all, and so their gradient, and what is pooled.
TYPES = {
    "batch": ("float32[8@x,9,10,8]", "float32[8@x,16,2,2,8]"),
    "batch over all devices": ("float32[8@(x,y),9,10,8]", "float32[8@(x,y),16,2,2,8]"),
    "channels": ("float32[8,9,10,8@y]", "float32[8,16,2,2,8@y]"),
    "rois": ("float32[8,9,10,8]", "float32[8,16@x,2,2,8]"),
    "batch and channels": ("float32[8@x,9,10,8@y]", "float32[8@x,16,2,2,8@y]"),
    "batch and rois": ("float32[8@x,9,10,8]", "float32[8@x,16@y,2,2,8]"),
    "rois and channels": ("float32[8,9,10,8@y]", "float32[8,16@x,2,2,8@y]"),
}
FLAT_TYPES = {
    "rois": ("float32[8,9,10,8]", "float32[32@x,2,2,8]"),
    "channels": ("float32[8,9,10,8@y]", "float32[32,2,2,8@y]"),
    "batch and rois": ("float32[8@x,9,10,8]", "float32[32@x,2,2,8]"),
    "batch": ("float32[8@x,9,10,8]", "float32[32,2,2,8]"),
    "batch, rois elsewhere": ("float32[8@x,9,10,8]", "float32[32@y,2,2,8]"),
    "batch, rois on some of its axes": ("float32[8@(x,y),9,10,8]", "float32[32@x,2,2,8]"),
}
# The gradient of a device's part of the maps, where its RoIs are not all: the only thing to sum.
SUMMED = {
    "rois": "f32[8,1,9,10,8]",
    "batch and rois": "f32[2,1,9,10,8]",
    "rois and channels": "f32[8,1,9,10,4]",
}
MAPS_OF_ALL = "f32[1,8,9,10,8]"


@pytest.fixture(scope="module")
def results(request):
    full = ["--full"] if request.config.getoption("--full") else []
    process = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name("sharded.py"), *full],
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def cases(results, mode):
    return results[mode]


def test_all_equal_one_device_to_the_bit(cases, request):
    assert not [name for name, case in cases.items() if not case["same"]]
    assert len(cases) > (40 if request.config.getoption("--full") else 30)


@pytest.mark.parametrize("layout", TYPES)
def test_pooling_moves_nothing(layout, cases):
    assert cases[layout]["moves"] == []


@pytest.mark.parametrize("layout", TYPES)
def test_the_gradient_moves_nothing_but_the_sum_over_rois(layout, cases):
    wanted = [f"all-reduce {SUMMED[layout]}"] if layout in SUMMED else []
    assert cases[f"{layout}, gradient"]["moves"] == wanted


def test_every_device_uses_the_native_kernel(native, cases):
    assert not [name for name, case in cases.items() if not case["native"]]


@pytest.mark.parametrize("layout", some_by_default(TYPES, ("batch and rois",)))
def test_shard_map_uses_the_native_kernel_and_moves_no_more(native, layout, cases):
    forward, gradient = cases[f"shard_map, {layout}"], cases[f"shard_map, {layout}, gradient"]
    assert forward["native"]
    assert gradient["native"]
    assert forward["moves"] == []
    assert gradient["moves"] == ([f"all-reduce {SUMMED[layout]}"] if layout in SUMMED else [])


@pytest.mark.parametrize("layout", TYPES)
def test_types_say_how_results_are_sharded(layout, results):
    gradient, pooled = TYPES[layout]
    argmax = pooled.replace("float32", "int32")
    assert results["explicit"][layout]["types"] == [pooled, argmax]
    assert results["explicit"][f"{layout}, gradient"]["types"] == [gradient]


@pytest.mark.parametrize("layout", FLAT_TYPES)
def test_types_say_how_results_of_flat_rois_are_sharded(layout, results):
    gradient, pooled = FLAT_TYPES[layout]
    argmax = pooled.replace("float32", "int32")
    assert results["explicit"][f"flat, {layout}"]["types"] == [pooled, argmax]
    assert results["explicit"][f"flat, {layout}, gradient"]["types"] == [gradient]


def moves(case):
    """Without the RoIs' own edges, which are small."""
    return [move for move in case["moves"] if not move.startswith("all-gather s32[1,32")]


@pytest.mark.parametrize("layout", ("rois", "channels"))
def test_flat_rois_on_whole_features_move_nothing(layout, cases):
    assert cases[f"flat, {layout}"]["moves"] == []
    wanted = [f"all-reduce {MAPS_OF_ALL}"] if layout == "rois" else []
    assert cases[f"flat, {layout}, gradient"]["moves"] == wanted


def test_flat_rois_on_a_split_batch_move_bins_where_these_are_smaller(cases):
    bins = "[1,8,2,2,8]"  # of a device's RoIs
    assert moves(cases["flat, batch and rois"]) == [
        f"reduce-scatter f32{bins}",
        f"reduce-scatter s32{bins}",
    ]


def test_so_does_their_gradient(results):
    # The cell of a bin goes to where the RoI is, and comes back with the cotangent. Maps stay.
    assert moves(results["explicit"]["flat, batch and rois, gradient"]) == [
        "all-gather f32[1,32,2,2,8]",
        "all-gather s16[1,32,2,2,8]",
        "reduce-scatter s32[1,8,2,2,8]",
    ]


def test_flat_rois_on_a_split_batch_move_maps_where_these_are_smaller(results):
    for mode in MODES:
        assert moves(results[mode]["flat, large bins"]) == [f"all-gather {MAPS_OF_ALL}"]
    assert moves(results["explicit"]["flat, large bins, gradient"]) == [
        f"all-gather {MAPS_OF_ALL}",
        "reduce-scatter f32[1,2,9,10,8]",
    ]


def test_flat_rois_on_all_devices_sum_their_bins(cases):
    assert moves(cases["flat, batch"]) == [
        "all-reduce f32[1,32,2,2,8]",
        "all-reduce s32[1,32,2,2,8]",
    ]


@pytest.mark.parametrize(
    "group",
    [f"{group}, {mode}" for group in ("product", "toys") for mode in MODES] + ["product, named"],
)
def test_arrays_that_are_split_apart_give_one_devices_bits(group, results):
    problems = results[group]
    assert len(problems) >= 9
    assert not {case: problem for case, problem in problems.items() if problem}


@pytest.mark.full
@pytest.mark.parametrize("how", ("spec", "explicit", "switch", "xla", "auto", "align"))
def test_the_persistent_cache(how, tmp_path):
    def hits(empty_value):
        script = Path(__file__).with_name("cached.py")
        command = [sys.executable, "-W", "error", script, tmp_path, how, empty_value]
        return int(subprocess.check_output(command, text=True, timeout=300))

    assert hits("0") == 0
    # JAX's key of a program with custom_partitioning has an address in it: a limit of JAX's.
    assert hits("0") == (how != "auto")
    assert hits("-inf") == 0  # is another program, if not by its operations


@pytest.mark.parametrize(
    "claim",
    (
        "a mesh of both kinds of axes",
        "pmap",
        "pmap, gradient",
        "shard_map over one axis of two",
        "shard_map over one axis of two, gradient",
        "a donated argument",
        "outside of jit",
        "vmap over a sharded batch",
        "a second derivative",
        "a mesh without devices",
        "a program for tpus",
        "an exported program",
    ),
)
def test_others(claim, results):
    assert results["others"][claim]
