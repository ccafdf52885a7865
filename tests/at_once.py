"""What the gathering backends are on GPUs, on the CPU, as implementations of their own."""

from unittest import mock

from jax import lax

from jax_roipool._backends import rectangle_max, weighted_sum

NAME = "blocks-at-once"
AVERAGE_NAME = "gather-at-once"


def install():
    """Adds the implementations, which only their names choose."""
    for family, of, name in (
        (rectangle_max.FAMILY, "blocks", NAME),
        (weighted_sum.FAMILY, "gather", AVERAGE_NAME),
    ):
        backend = family.named(of)
        functions = {key: _elsewhere(function) for key, function in backend.functions.items()}
        family.backends += (backend._replace(name=name, functions=functions),)


def _elsewhere(function):
    """The function, on a platform for which `lax.platform_dependent` has no form of its own."""

    def run(*operands, **params):
        def default(*operands, default, **_):
            return default(*operands)

        with mock.patch.object(lax, "platform_dependent", default):
            return function(*operands, **params)

    return run
