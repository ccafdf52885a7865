"""Averages and levels on eight host devices, in both modes, `shard_map` and `pmap`: what is moved.

How any primitive is split is in `test_sharding.py` and `test_partitioning.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

# The sums over the RoIs of all devices, and over the channels of all devices; and how many samples
# and cells the longest bin has.
SUMS = {
    "adaptive, batch and channels, gradient": ["all-reduce f32[]", "all-reduce s32[]"],
    "align, rois, gradient": ["all-reduce f32[4,1,9,10,8]"],
    "precise, batch and channels, gradient": [
        "all-reduce f32[1,8,2,10]",
        "all-reduce f32[1,8,2,9]",
    ],
}
for _operator in ("max", "align"):
    SUMS[f"levels, {_operator}, rois, gradient"] = [
        "all-reduce f32[4,1,5,5,8]",
        "all-reduce f32[4,1,9,10,8]",
    ]
SUMS["precise, batch and channels, named, gradient"] = SUMS["precise, batch and channels, gradient"]


@pytest.fixture(scope="module")
def results():
    process = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name("sharded_averages.py")],
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.fixture(params=("auto", "explicit"))
def cases(results, request):
    return results[request.param]


def test_results_are_those_of_one_device(cases):
    assert {name: case["error"] for name, case in cases.items() if case["error"] > 1e-6} == {}


def test_nothing_is_left_out(results):
    assert len(results["explicit"]) == 21
    assert len(results["auto"]) == 22  # one more, with axes that are named


def test_pmap_gives_one_devices_results(results):
    assert len(results["pmap"]) == 8
    assert max(results["pmap"]) <= 2e-6


def test_no_features_are_moved(cases):
    for name, case in cases.items():
        if "flat" not in name and "matmul" not in name:
            assert case["moves"] == SUMS.get(name, []), name


def test_flat_rois_on_a_split_batch_move_bins(cases):
    assert cases["align, flat rois"]["moves"] == []
    assert cases["align, flat on a split batch"]["moves"] == [
        "all-gather f32[1,32,2,4]",
        "all-gather f32[1,32,2,4]",
        "all-gather s32[1,32,11]",
        "reduce-scatter f32[1,8,2,2,8]",
    ]


def test_matrix_products_agree_on_whether_all_is_finite(results):
    assert set(results["auto"]["matmul, batch and channels"]["moves"]) == {"all-reduce pred[]"}
    assert results["explicit"]["matmul, batch and channels"]["moves"] == []
