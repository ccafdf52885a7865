"""The Python in the README and in `docs/` runs as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
N, K, CHANNELS = 2, 4, 3


@pytest.fixture(scope="module")
def names():
    """What the blocks leave behind, one after the other."""
    names = {
        "jnp": jnp,
        "count": jnp.array([2, 4]),
        "features": jnp.ones((N, 8, 8, CHANNELS)),
        "rois": jnp.broadcast_to(jnp.array([0.0, 0.0, 128.0, 128.0]), (N, K, 4)),
    }
    for page in ("README.md", "docs/tpu.md", "docs/sharding.md"):
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            exec(block, names)
    return names


def test_flax_model(names):
    model = names["Head"]()
    mask = jnp.arange(K) < names["count"][:, None]
    variables = model.init(jax.random.key(0), names["features"], names["rois"])
    scores, boxes = model.apply(variables, names["features"], names["rois"], mask)
    assert (scores.shape, boxes.shape) == ((N, K, 21), (N, K, 4))


def test_padding(names):
    real = np.asarray(names["masked"]).any(axis=(2, 3, 4))
    np.testing.assert_array_equal(real, [[True, True, False, False], [True] * 4])


def test_argmax(names):
    assert names["argmax"].shape == (N, K, 7, 7, CHANNELS)


def test_data_parallel_pooling(names):
    assert names["pooled"].shape == (N, K, 7, 7, CHANNELS)
    spread = names["NamedSharding"](names["mesh"], names["P"]("data"))
    assert names["pooled"].sharding.is_equivalent_to(spread, names["pooled"].ndim)
