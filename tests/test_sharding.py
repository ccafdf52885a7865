"""Several devices: `shard_map` with its default checks, and `jit` over a mesh."""

import json
import subprocess
import sys
import textwrap

import pytest

# Host devices are counted when JAX starts, so this runs in a process of its own.
PROGRAM = textwrap.dedent(
    """
    import json
    import re

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    import jax_roipool

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.permutation(4 * 6 * 7 * 8).reshape(4, 6, 7, 8), jnp.float32)
    rois = jnp.asarray(rng.uniform(-1, 7, (4, 8, 4)), jnp.float32)
    cotangent = jnp.asarray(rng.integers(1, 9, (4, 8, 2, 2, 8)), jnp.float32)

    def pool(features, rois):
        return jax_roipool.roi_pool(features, rois, 2)

    def gradient(pool):
        return jax.grad(lambda features: (pool(features, rois) * cotangent).sum())(features)

    SHARDED = {
        "batch": (P("d"), P("d"), P("d")),
        "channels": (P(None, None, None, "d"), P(), P(None, None, None, None, "d")),
        "rois": (P(), P(None, "d"), P(None, "d")),
    }
    assert pool(features, rois).any()
    assert gradient(pool).any()
    result = {}
    for name, (feature_spec, roi_spec, out_spec) in SHARDED.items():
        mapped = jax.jit(
            jax.shard_map(pool, mesh=mesh, in_specs=(feature_spec, roi_spec), out_specs=out_spec)
        )
        arguments = (
            jax.device_put(features, NamedSharding(mesh, feature_spec)),
            jax.device_put(rois, NamedSharding(mesh, roi_spec)),
        )
        compiled = jax.jit(pool).lower(*arguments).compile()
        collectives = re.findall("all-gather|all-to-all|all-reduce|permute", compiled.as_text())
        result[name] = {
            "shard_map": bool((mapped(features, rois) == pool(features, rois)).all()),
            "shard_map gradient": bool((gradient(mapped) == gradient(pool)).all()),
            "jit": bool((compiled(*arguments) == pool(features, rois)).all()),
            "jit without collectives": not collectives,
        }
    print(json.dumps(result))
    """
)


@pytest.fixture(scope="module")
def result():
    devices = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'\n"
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", devices + PROGRAM],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    "claim", ("shard_map", "shard_map gradient", "jit", "jit without collectives")
)
@pytest.mark.parametrize("sharded", ("batch", "channels", "rois"))
def test_sharded_pooling_equals_the_single_device(sharded, claim, result):
    assert result[sharded][claim]
