"""Whether a program is found in JAX's persistent cache, for `test_sharding.py`: prints 1, or 0.

python cached.py FOLDER HOW EMPTY_VALUE
"""

import os
import sys

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_roipool import Convention, roi_align, roi_pool

NAMED = {"features_spec": P("x")}
OPTIONS = {"spec": NAMED, "align": NAMED, "xla": {"implementation": "xla"}}


def main(folder, how, empty_value):
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", how == "switch")
    kind = AxisType.Explicit if how == "explicit" else AxisType.Auto
    sharding = NamedSharding(jax.make_mesh((2,), ("x",), axis_types=(kind,)), P("x"))
    features, rois = jax.device_put((jnp.ones((2, 6, 7, 3)), jnp.ones((2, 4, 4))), sharding)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

    def loss(features):
        options = OPTIONS.get(how, {})
        if how == "align":
            return roi_align(features, rois, 2, aligned=empty_value == "0", **options).sum()
        convention = Convention(empty_value=float(empty_value))
        return roi_pool(features, rois, 2, convention=convention, **options).sum()

    jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(features))
    print(events.count("/jax/compilation_cache/cache_hits"))


if __name__ == "__main__":
    main(*sys.argv[1:])
