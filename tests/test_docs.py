"""The pages in `docs/`: their Python runs as it stands there, and their claims are checked.

    python tests/test_docs.py PAGE

runs the Python of one page, for those that want several devices.
"""

import doctest
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_roipool

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
DEVICES = {"training.md": 4}
NATIVE = ("export.md",)
N, K, CHANNELS = 4, 3, 5


def blocks(page):
    """The Python of a page, with the number of the line that each block starts on."""
    text = (DOCS / page).read_text()
    found = [(text[: match.start()].count("\n") + 1, match[1]) for match in BLOCK.finditer(text)]
    # One that is indented, or marked otherwise, would not be found.
    assert len(found) == len(re.findall(r"``` *\{?\.?(?:python|py)", text)), page
    return found


def given(page):
    """The arrays that some pages speak of without making them."""
    if page not in ("sharding.md", "tpu.md"):
        return {}
    return {
        "features": jnp.ones((N, 8, 8, CHANNELS)),
        "rois": jnp.broadcast_to(jnp.array([0.0, 0.0, 8.0, 8.0]), (N, K, 4)),
    }


def run(page):
    """What the blocks of a page leave behind, one after the other."""
    names = given(page)
    for line, block in blocks(page):
        # Errors name the page and the line, which `compile` counts from the block's own first.
        if block.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block, names, page, page, line)
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
            failures = []
            runner.run(test, out=failures.append, clear_globs=False)
            assert not runner.failures, "".join(failures)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + block, DOCS / page, "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_quickly():
    """They run once, on little: compilation is nearly all that they take."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def names_of():
    """`run`, once for each page."""
    found = {}

    def names_of(page):
        if page not in found:
            found[page] = run(page)
        return found[page]

    return names_of


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_runs(page, names_of, request):
    if page in NATIVE:
        request.getfixturevalue("native")
    if page not in DEVICES:
        names_of(page)
        return
    devices = f"--xla_force_host_platform_device_count={DEVICES[page]}"
    process = subprocess.run(
        [sys.executable, "-W", "error", __file__, page],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


def test_pages_without_python_are_known():
    silent = {page for page in PAGES if not blocks(page)}
    assert silent == {
        "architecture.md",
        "gpu.md",
        "install.md",
        "performance.md",
        "reference.md",
    }


@pytest.mark.parametrize("page", ("sharding.md", "tpu.md"))
def test_data_parallel_pooling(page, names_of):
    names = names_of(page)
    assert names["pooled"].shape == (N, K, 7, 7, CHANNELS)
    spread = names["NamedSharding"](names["mesh"], names["P"]("data"))
    assert names["pooled"].sharding.is_equivalent_to(spread, names["pooled"].ndim)


def test_torchvision_page_gives_torchvisions_answer(names_of):
    names = names_of("torchvision.md")
    with np.load(ROOT / "tests/fixtures/torchvision-typical-7x7-s0.0625.npz") as recorded:
        rois, features = recorded["rois"], recorded["x"]  # [R, 5], [N, H, W, C]
        lists = [rois[rois[:, 0] == n, 1:] for n in range(len(features))]
        expected = np.concatenate([recorded["out"][rois[:, 0] == n] for n in range(len(features))])
    K = max(map(len, lists)) + 1
    padded, roi_mask = names["pad_boxes"](lists, K)
    pooled = names["roi_pool"](features, padded, 7, roi_mask=roi_mask, **names["options"])
    np.testing.assert_array_equal(pooled[roi_mask], expected)
    assert not pooled[~roi_mask].any()
    flat = names["roi_pool"](features, names["flat_boxes"](lists), 7, **names["options"])
    np.testing.assert_array_equal(flat, expected)


def test_reference_has_every_public_name():
    directives = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    layers = ("MultiScaleRoIAlign", "RoIAlign", "RoIPool")  # the package's own are linen's
    functions = set(jax_roipool.__all__) - {"linen", "nnx", *layers}
    of_flax = (f"{module}.{layer}" for module in ("linen", "nnx") for layer in layers)
    public = {f"jax_roipool.{name}" for name in (*functions, *of_flax)}
    assert sorted(directives) == sorted(public)


def test_drawing_of_the_conventions_is_up_to_date():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw_conventions.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert (DOCS / "conventions.svg").read_text() == drawing.draw()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == PAGES


if __name__ == "__main__":
    run(sys.argv[1])
