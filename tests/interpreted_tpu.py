"""The TPU kernels on the CPU, by the TPU interpreter, as an implementation of their own.

It raises on a read out of bounds, fills uninitialised memory with NaN, and looks for races between
copies and the kernel.
"""

import functools
import importlib

import jax
import numpy as np

from jax_roipool._backends.rectangle_max import FAMILY, tpu

NAME = "tpu-interpreted"


def install():
    """Adds the implementation, which only its name chooses."""
    kernels = FAMILY.named("tpu")
    interpreted = {
        name: _called_back(getattr(tpu, name)) for name in ("rectangle_max", "scatter_at_argmax")
    }
    FAMILY.backends += (
        kernels._replace(
            name=NAME,
            platforms=frozenset({"cpu"}),
            functions={**kernels.functions, **interpreted},
        ),
    )


def _called_back(function):
    """A program of its own, called back from the one under test.

    The interpreter has ordered effects, which a primitive's lowering cannot have.
    """

    def call(*operands, **params):
        interpreted = functools.partial(function, interpret=_parameters(), **params)
        results = jax.eval_shape(interpreted, *operands)
        program = _program(function, tuple(sorted(params.items())))
        return jax.pure_callback(program, results, *operands)

    return call


@functools.cache
def _program(function, params):
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(*operands):
        return function(*operands, interpret=_parameters(), **dict(params))

    def program(*operands):
        try:
            results = jax.tree.map(np.asarray, run(*operands))
        except Exception:
            _tpu().reset_tpu_interpret_mode_state()  # else the next kernel would not start
            raise
        races = _interpreter().races  # None before the first kernel
        assert races is None or not races.races_found, "the TPU interpreter found a race"
        return results

    return program


@functools.cache
def _parameters():
    return _tpu().InterpretParams(
        out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True
    )


def _tpu():
    return importlib.import_module("jax.experimental.pallas.tpu")


def _interpreter():
    # JAX shows what the detector has found only here.
    return importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")


def forget():
    """Forgets what was compiled, for tests that change how the kernels cut their maps."""
    _program.cache_clear()
    jax.clear_caches()
