import hypothesis
import jax
import pytest

from jax_roipool import _backends

# A new backend is put under the whole suite by adding its name here.
IMPLEMENTATIONS = ("cpu", "xla")

# The same examples on every run, and no deadline: the first example of a shape compiles.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=20
)
hypothesis.settings.load_profile("repeatable")


# Session scope: hypothesis refuses fixtures that do not outlive one example.
@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def implementation(request):
    (backend,) = (b for b in _backends.BACKENDS if b.name == request.param)
    problem = _backends.problem_with(backend, ["cpu"])
    if problem is not None:
        pytest.skip(f"implementation {request.param!r}: {problem}")
    return request.param


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
