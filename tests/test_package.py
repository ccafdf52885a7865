"""The package as it is imported: quick, silent, and without touching a device."""

import subprocess
import sys

import pytest

import jax_roipool


def run(code):
    """What Python prints, standard error included, when it runs `code` with warnings as errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def test_import_is_silent():
    process = run("import jax_roipool")
    assert (process.stdout, process.stderr) == ("", "")


def test_import_touches_no_device_and_leaves_flax_alone():
    # A platform that does not exist fails as soon as anything asks for a device.
    process = run(
        "import sys, jax\n"
        "jax.config.update('jax_platforms', 'none_such')\n"
        "import jax_roipool\n"
        "print('flax' in sys.modules)\n"
        "import jax_roipool.linen, jax_roipool.nnx\n"
        "try: jax.devices()\n"
        "except RuntimeError: print('no device')"
    )
    assert process.stdout == "False\nno device\n"


@pytest.mark.parametrize("name", jax_roipool.__all__)
def test_public_names_exist_and_are_documented(name):
    value = getattr(jax_roipool, name)
    assert name in dir(jax_roipool)
    assert name == "CONVENTIONS" or value.__doc__


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        jax_roipool.no_such_name  # noqa: B018
