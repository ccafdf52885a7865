"""What becomes of the pooling on eight host devices, as JSON: for `test_sharding.py`.

A program of its own, as host devices are counted when JAX starts. With `--full` it tries every
pair of shardings, and not one of each.
"""

import functools
import itertools
import json
import os
import re
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_roipool
import toy
from compiled import COLLECTIVES, Program
from harness import distinct_features, random_rois, whole_cotangent

N, K, H, W, C, BINS = 8, 16, 9, 10, 8, 2
# NumPy's, which go to the devices of a mesh without a program that splits them.
FEATURES = np.asarray(distinct_features((N, H, W, C)))
ROIS = np.stack([random_rois(K, H, W, seed) for seed in range(N)])
FLAT = np.asarray(random_rois(2 * K, H, W, images=N))
COTANGENT = np.asarray(whole_cotangent((N, K, BINS, BINS, C)))
NATIVE = "jax_roipool_cpu"
FULL = "--full" in sys.argv

# Features, RoIs, what is pooled: over the axes "x" (4 devices) and "y" (2) of the mesh.
BATCH = P("x"), P("x"), P("x")
CHANNELS = P(None, None, None, "y"), P(), P(None, None, None, None, "y")
LAYOUTS = {
    "batch": BATCH,
    "batch over all devices": (P(("x", "y")),) * 3,
    "channels": CHANNELS,
    "rois": (P(), P(None, "x"), P(None, "x")),
    "batch and channels": (P("x", None, None, "y"), P("x"), P("x", None, None, None, "y")),
    "batch and rois": (P("x"), P("x", "y"), P("x", "y")),
    "rois and channels": (
        P(None, None, None, "y"),
        P(None, "x"),
        P(None, "x", None, None, "y"),
    ),
}
FLAT_LAYOUTS = {
    "rois": (P(), P("x"), P("x")),
    "channels": (P(None, None, None, "y"), P(), P(None, None, None, "y")),
    "batch and rois": (P("x"), P("x"), P("x")),
    "batch": (P("x"), P(), P()),
    "batch, rois elsewhere": (P("x"), P("y"), P("y")),
    "batch, rois on some of its axes": (P(("x", "y")), P("x"), P("x")),
}


def pool(features, rois, output_size=BINS, **options):
    return jax_roipool.roi_pool_with_argmax(features, rois, output_size, **options)


def gradient(features, rois, cotangent):
    _, pullback = jax.vjp(lambda x: jax_roipool.roi_pool(x, rois, cotangent.shape[-2]), features)
    return pullback(cotangent)[0]


def same(actual, wanted):
    return all(
        bool((np.asarray(a) == np.asarray(b)).all())
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True)
    )


def run(function, *arguments, wanted=None):
    """Whether the result is that of one device; collectives, as shapes; types; and the backend."""
    if wanted is None:
        wanted = jax.jit(function)(*map(np.asarray, arguments))
    program = Program("cpu", function, *arguments)
    moves = re.findall(rf"= (\S+) ({'|'.join(COLLECTIVES)})(?:-start)?\(", program.text)
    result = program.program(*arguments)
    return {
        "same": same(result, wanted),
        "moves": sorted(f"{operation} {shape.split('{')[0]}" for shape, operation in moves),
        "native": NATIVE in program.text,
        "types": [str(jax.typeof(x)) for x in jax.tree.leaves(result)],
    }


def everything(mesh):
    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def sharded(layouts, rois, cotangent):
        for name, (features_spec, rois_spec, pooled_spec) in layouts.items():
            arguments = put(FEATURES, features_spec), put(rois, rois_spec)
            yield name, run(pool, *arguments)
            yield f"{name}, gradient", run(gradient, *arguments, put(cotangent, pooled_spec))

    cases = dict(sharded(LAYOUTS, ROIS, COTANGENT))
    # 32 RoIs of 4 bins are smaller than 8 maps of 90 cells, of 49 bins they are larger.
    few, many = (np.asarray(whole_cotangent((2 * K, bins, bins, C))) for bins in (2, 7))
    cases |= {f"flat, {name}": case for name, case in sharded(FLAT_LAYOUTS, FLAT, few)}
    arguments = put(FEATURES, P("x")), put(FLAT, P("x"))
    cases["flat, large bins"] = run(lambda *args: pool(*args, 7), *arguments)
    cases["flat, large bins, gradient"] = run(gradient, *arguments, put(many, P("x")))
    arguments = put(FEATURES, P("x")), put(FLAT, P("x"))
    cases["flat, without argmax"] = run(lambda *args: jax_roipool.roi_pool(*args, BINS), *arguments)
    for dtype in ("bfloat16", "int16"):
        arguments = put(FEATURES.astype(dtype), P("x")), put(FLAT, P("x"))
        cases[f"flat, {dtype}"] = run(pool, *arguments)

    mapped_layouts = LAYOUTS if FULL else {"batch and rois": LAYOUTS["batch and rois"]}
    for name, (features_spec, rois_spec, pooled_spec) in mapped_layouts.items():
        mapped = jax.shard_map(
            lambda x, rois: jax_roipool.roi_pool(x, rois, BINS),
            mesh=mesh,
            in_specs=(features_spec, rois_spec),
            out_specs=pooled_spec,
        )

        def mapped_gradient(features, rois, cotangent, mapped=mapped):
            return jax.vjp(lambda x: mapped(x, rois), features)[1](cotangent)[0]

        arguments = put(FEATURES, features_spec), put(ROIS, rois_spec)
        wanted = jax_roipool.roi_pool(FEATURES, ROIS, BINS)
        cases[f"shard_map, {name}"] = run(mapped, *arguments, wanted=wanted)
        arguments = *arguments, put(COTANGENT, pooled_spec)
        wanted = gradient(FEATURES, ROIS, COTANGENT)
        cases[f"shard_map, {name}, gradient"] = run(mapped_gradient, *arguments, wanted=wanted)
    return cases


FEATURES_SPLIT = (P(), P("x"), P(("x", "y")), P("y", None, None, "x"), P(None, None, "y"))
ROIS_SPLIT = (P(), P("x"), P("y", "x"), P(None, ("x", "y")), P("x", None, "y"))
MASK_SPLIT = (None, P("x"), P(), P("y", "x"), P(None, "x"))
SPECS = (P(), P("x"), P(("x", "y")), P("y", None, None, "x"))


def pairs(first, second):
    """All of them or, unless all is wanted, those that have each of both once."""
    every = list(itertools.product(first, second))
    if FULL:
        return every
    return [(a, second[i % len(second)]) for i, a in enumerate(first)] + [(first[1], second[-1])]


def product(mesh, specs=(None,)):
    """Features, RoIs and masks, each split in its own way, against one device: what goes wrong.

    `specs` are what `features_spec` says instead, to a mesh of automatic axes.
    """
    mask = np.arange(N * K).reshape(N, K) % 5 > 0

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def both(features, rois, roi_mask, **options):
        def pool(features):
            return jax_roipool.roi_pool(features, rois, BINS, roi_mask=roi_mask, **options)

        pooled, pullback = jax.vjp(pool, features)
        return pooled, pullback(jnp.round(pooled / 64))[0]

    def of_sets(features, rois, **options):
        def pool(features):
            return jax.vmap(lambda rois: jax_roipool.roi_pool(features, rois, BINS, **options))(
                rois
            )

        pooled, pullback = jax.vjp(pool, features)
        return pooled, pullback(jnp.round(pooled / 64))[0]

    def problem(function, wanted, *arguments, features_spec):
        try:
            program = jax.jit(functools.partial(function, features_spec=features_spec))
            results = program(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if not same(results, wanted):
            return "other values"
        if features_spec is not None:
            text = program.lower(*arguments).as_text()
            if "CustomSPMDPartitioning" in text or NATIVE not in text:
                return "no kernel, or one that XLA is to split"
            pooled, gradient = (x.sharding.spec for x in results)
            if function is both and (*pooled, None)[0] != (*features_spec, None)[0]:
                return f"what is pooled is split as {pooled}"
            if gradient != features_spec:
                return f"the gradient is split as {gradient}"
        like = jax.typeof(arguments[0])
        if "Explicit" in str(mesh) and jax.typeof(results[1]) != like:
            return f"the gradient of {like} is {jax.typeof(results[1])}"
        return None

    problems = {}
    plain = {masked: both(FEATURES, ROIS, mask if masked else None) for masked in (False, True)}
    for i, (features, rois) in enumerate(pairs(FEATURES_SPLIT, ROIS_SPLIT)):
        for j, features_spec in enumerate(specs if FULL else [specs[i % len(specs)]]):
            split = MASK_SPLIT[(i + i // 5 + j) % 5]  # over and over, with another pair each time
            masks = None if split is None else put(mask, split)
            arguments = put(FEATURES, features), put(ROIS, rois), masks
            case = f"{features}, {rois}, {split}, {features_spec}"
            wanted = plain[split is not None]
            problems[case] = problem(both, wanted, *arguments, features_spec=features_spec)
    plain = both(FEATURES, FLAT, None)
    for rois, features_spec in pairs((P(), P("x")), specs):
        arguments = put(FEATURES, P("x")), put(FLAT, rois), None
        case = f"flat, {rois}, {features_spec}"
        problems[case] = problem(both, plain, *arguments, features_spec=features_spec)
    plain = of_sets(FEATURES[0], ROIS)
    for features, rois in pairs((P(), P(None, None, "y")), ROIS_SPLIT):
        features_spec = None if specs == (None,) else P(None, None, "y")
        arguments = put(FEATURES[0], features), put(ROIS, rois)
        case = f"vmap, {features}, {rois}, {features_spec}"
        problems[case] = problem(of_sets, plain, *arguments, features_spec=features_spec)
    return problems


def toys(mesh):
    """The toy primitive, its images and RoIs split over other devices than each other, or alike."""
    rng = np.random.default_rng(0)
    images = rng.integers(-9, 9, (1, 8, 4096)).astype(np.float32)
    packed = rng.integers(-1, 9, (1, 16, 2), np.int32)
    values = rng.integers(-9, 9, (1, 16, 4096)).astype(np.float32)
    problems = {}
    for n, k in itertools.product((None, "x", "y"), repeat=2):

        def put(x, name):
            return jax.device_put(x, NamedSharding(mesh, P(None, name)))

        scaled = jax.jit(toy.apply_scale)(put(images, n), put(packed, k))
        total = jax.jit(lambda *x: toy.apply_total(*x, 8))(put(values, k), put(packed, k))
        problems[f"{n}, {k}"] = (
            None
            if same(
                (scaled, total),
                (toy.apply_scale(images, packed), toy.apply_total(values, packed, 8)),
            )
            else "other values"
        )
    return problems


def others():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    def pooled(features, rois, **options):
        return jax_roipool.roi_pool(features, rois, BINS, **options)

    def squared(features, rois):
        return (pooled(features, rois) ** 2).sum()

    features, rois = put(FEATURES, "x"), put(ROIS, "x")
    wanted = pooled(FEATURES, ROIS)
    wanted_gradient = jax.grad(squared)(FEATURES, ROIS)

    def of_pairs(function):  # each device has an image, as a batch of one
        return jax.pmap(function)(FEATURES[:, None], ROIS[:, None])[:, 0]

    partly = jax.shard_map(
        pooled, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"), axis_names={"x"}
    )
    donated = put(FEATURES, "x")
    jax.jit(lambda x, rois: (pooled(x, rois), x + 1), donate_argnums=0)(donated, rois)
    abstract = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh.abstract_mesh, P("x")))
        for x in (features, rois)
    ]
    by_name = jax.jit(lambda x, rois: pooled(x, rois, implementation="dense"))

    def hessian_vector_product(x, rois):
        return jax.jvp(lambda x: jax.grad(squared)(x, rois), (x,), (x,))[1]

    kinds = (AxisType.Auto, AxisType.Explicit)
    both_kinds = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    split = [
        jax.device_put(x, NamedSharding(both_kinds, spec))
        for x, spec in ((FEATURES, P("x", None, None, "y")), (ROIS, P("x")))
    ]
    on_both_kinds = Program("cpu", pooled, *split)

    claims = {
        "a mesh of both kinds of axes": same(on_both_kinds.program(*split), wanted)
        and on_both_kinds.count(*COLLECTIVES) == 0,
        "pmap": same(of_pairs(pooled), wanted),
        "pmap, gradient": same(of_pairs(jax.grad(squared)), wanted_gradient),
        "a donated argument": donated.is_deleted(),
        "outside of jit": same(pooled(features, rois), wanted),
        "vmap over a sharded batch": same(jax.jit(jax.vmap(pooled))(features, rois), wanted),
        "a second derivative": same(
            jax.jit(hessian_vector_product)(features, rois), wanted_gradient
        ),
        "a mesh without devices": "stablehlo"
        in by_name.trace(*abstract).lower(lowering_platforms=("tpu",)).as_text(),
        "a program for tpus": "CustomSPMDPartitioning"
        not in jax.jit(pooled).trace(features, rois).lower(lowering_platforms=("tpu",)).as_text(),
        "an exported program": export.export(jax.jit(pooled), platforms=("cuda",))(
            features, rois
        ).nr_devices
        == 8,
    }
    partly_gradient = jax.grad(lambda x: (partly(x, rois) ** 2).sum())
    return claims | {
        "shard_map over one axis of two": same(jax.jit(partly)(features, rois), wanted),
        "shard_map over one axis of two, gradient": same(
            jax.jit(partly_gradient)(features), wanted_gradient
        ),
    }


def main():
    modes = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    results = {}
    for name, kind in modes.items():
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
        results[name] = everything(mesh)
        results[f"product, {name}"] = product(mesh)
        results[f"toys, {name}"] = toys(mesh)
        if kind == AxisType.Auto:
            results["product, named"] = product(mesh, SPECS)
    print(json.dumps(results | {"others": others()}))


if __name__ == "__main__":
    main()
