"""What becomes of the averages on eight host devices, as JSON: for `test_averages_sharded.py`.

A program of its own, as host devices are counted when JAX starts.
"""

import functools
import json
import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
from compiled import COLLECTIVES, Program
from harness import random_rois

N, K, H, W, C, BINS = 4, 8, 9, 10, 8, 2
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(N, H, W, C)).astype(np.float32)
ROIS = np.stack([random_rois(K, H, W, seed) for seed in range(N)])
FLAT, INDEX = ROIS.reshape(-1, 4), np.repeat(np.arange(N), K)
COTANGENT = RNG.normal(size=(N, K, BINS, BINS, C)).astype(np.float32)

# Features, RoIs, what is pooled: over the axes "x" (4 devices) and "y" (2) of the mesh.
LAYOUTS = {
    "batch": (P("x"), P("x"), P("x")),
    "channels": (P(None, None, None, "y"), P(), P(None, None, None, None, "y")),
    "rois": (P(), P(None, "x"), P(None, "x")),
    "batch and channels": (P("x", None, None, "y"), P("x"), P("x", None, None, None, "y")),
}
OPERATORS = {
    "align": lambda x, rois: jax_roipool.roi_align(x, rois, BINS, sampling_ratio=2),
    "adaptive": lambda x, rois: jax_roipool.roi_align(x, rois, BINS),
    "whole cells": lambda x, rois: jax_roipool.roi_average_pool(x, rois, BINS),
    "precise": lambda x, rois: jax_roipool.pr_roi_pool(x, rois, BINS),
}


# On a pyramid, of which the second level has every other cell of the first.
ON_LEVELS = {
    "max": functools.partial(jax_roipool.roi_pool, output_size=BINS),
    "align": functools.partial(jax_roipool.roi_align, output_size=BINS, sampling_ratio=2),
}
LEVEL = np.arange(N * K).reshape(N, K) % 3


def on_levels(pool):
    def pool_both(features, rois):
        return jax_roipool.pool_levels(
            pool,
            (features, features[:, ::2, ::2]),
            rois,
            spatial_scales=(1, 1 / 2),
            levels=LEVEL.reshape(rois.shape[:-1]),
        )

    return pool_both


def both_gradients(pool):
    def gradients(features, rois, cotangent):
        return jax.vjp(pool, features, rois)[1](cotangent)

    return gradients


def run(function, *arguments, on_one=None):
    """How far the result is from one device's, as a part of it, and what was moved."""
    wanted = jax.jit(on_one or function)(*map(np.asarray, arguments))
    program = Program("cpu", function, *arguments)
    found = re.findall(rf"= (\([^)]*\)|\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program.text)
    pairs = zip(jax.tree.leaves(program.program(*arguments)), jax.tree.leaves(wanted), strict=True)
    return {
        "error": max(
            float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(b).max() + 1e-9))
            for a, b in pairs
        ),
        "moves": sorted(
            f"{operation} {array}"
            for types, operation in found
            for array in re.findall(r"\w+\[[\d,]*\]", types)
        ),
    }


def everything(mesh):
    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    cases = {}
    for name, (features_spec, rois_spec, pooled_spec) in LAYOUTS.items():
        arguments = put(FEATURES, features_spec), put(ROIS, rois_spec)
        cases[f"align, {name}"] = run(OPERATORS["align"], *arguments)
        for operator in OPERATORS if name == "batch and channels" else ("align",):
            gradients = both_gradients(OPERATORS[operator])
            with_cotangent = *arguments, put(COTANGENT, pooled_spec)
            cases[f"{operator}, {name}, gradient"] = run(gradients, *with_cotangent)

    for operator, pool in ON_LEVELS.items():
        for name in ("rois", "batch and channels"):
            features_spec, rois_spec, pooled_spec = LAYOUTS[name]
            cases[f"levels, {operator}, {name}, gradient"] = run(
                both_gradients(on_levels(pool)),
                *(put(FEATURES, features_spec), put(ROIS, rois_spec), put(COTANGENT, pooled_spec)),
            )
        flat = np.concatenate([INDEX[:, None], FLAT], axis=1, dtype=np.float32)
        cases[f"levels, {operator}, flat on a split batch"] = run(
            on_levels(pool), put(FEATURES, P("x")), put(flat, P("x"))
        )

    if AxisType.Auto in mesh.axis_types:
        features_spec, rois_spec, pooled_spec = LAYOUTS["batch and channels"]

        def named(features, rois):
            return jax_roipool.pr_roi_pool(features, rois, BINS, features_spec=features_spec)

        cases["precise, batch and channels, named, gradient"] = run(
            both_gradients(named),
            *(put(FEATURES, features_spec), put(ROIS, rois_spec), put(COTANGENT, pooled_spec)),
            on_one=both_gradients(OPERATORS["precise"]),
        )

    def flat(features, rois, index):
        return jax_roipool.roi_align(features, rois, BINS, image_index=index, sampling_ratio=2)

    arguments = put(FEATURES, P("x")), put(FLAT, P("x")), put(jnp.asarray(INDEX), P("x"))
    cases["align, flat on a split batch"] = run(flat, *arguments)
    arguments = put(FEATURES, P()), put(FLAT, P("x")), put(jnp.asarray(INDEX), P())
    cases["align, flat rois"] = run(flat, *arguments)

    def matmul(features, rois):
        return jax_roipool.roi_align(
            features, rois, BINS, sampling_ratio=2, implementation="matmul"
        )

    features_spec, rois_spec, _ = LAYOUTS["batch and channels"]
    cases["matmul, batch and channels"] = run(
        matmul, put(FEATURES, features_spec), put(ROIS, rois_spec)
    )
    features_spec, rois_spec, pooled_spec = LAYOUTS["batch"]
    mapped = jax.shard_map(
        OPERATORS["precise"],
        mesh=mesh,
        in_specs=(features_spec, rois_spec),
        out_specs=pooled_spec,
    )
    cases["precise, shard_map, gradient"] = run(
        both_gradients(mapped),
        *(put(FEATURES, features_spec), put(ROIS, rois_spec), put(COTANGENT, pooled_spec)),
        on_one=both_gradients(OPERATORS["precise"]),
    )
    return cases


def pmapped():
    """How far `pmap` over images is from one device, in both passes."""
    arguments = FEATURES, ROIS, COTANGENT
    return [
        float(np.abs(np.asarray(actual) - np.asarray(wanted)).max())
        for pool in OPERATORS.values()
        for actual, wanted in zip(
            jax.pmap(both_gradients(pool))(*arguments),
            jax.jit(both_gradients(pool))(*arguments),
            strict=True,
        )
    ]


def main():
    results = {}
    for mode, kind in (("auto", AxisType.Auto), ("explicit", AxisType.Explicit)):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            results[mode] = everything(mesh)
    results["pmap"] = pmapped()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
