import hypothesis
import jax
import pytest

# A new backend is put under the whole suite by adding its name here.
IMPLEMENTATIONS = ("xla",)

# The same examples on every run, and no deadline: the first example of a shape compiles.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=20
)
hypothesis.settings.load_profile("repeatable")


# Session scope: hypothesis refuses fixtures that do not outlive one example.
@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
