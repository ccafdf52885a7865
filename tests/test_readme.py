"""The Python in the README runs as it stands there."""

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
        "count": jnp.array([2, 4]),
        "features": jnp.ones((N, 8, 8, CHANNELS)),
        "rois": jnp.broadcast_to(jnp.array([0.0, 0.0, 128.0, 128.0]), (N, K, 4)),
    }
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
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
    assert names["pooled"].shape == (N, K, 7, 7, CHANNELS)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert "docs/index.md" in local
    assert [link for link in local if not (ROOT / link).exists()] == []
