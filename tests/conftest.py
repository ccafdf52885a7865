import os
import platform

# Before JAX starts: with libtpu installed it would look for a TPU, at length and aloud, and would
# refuse to compile in several processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "cuda" in os.environ["JAX_PLATFORMS"]:
    # Of dense layers, whose products have fewer bits there.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
else:
    # Only its compiler is wanted: older plugins of JAX would miss CUDA's libraries.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
if platform.machine() == "x86_64":
    # With instructions for bfloat16, which processors with AMX have, XLA compares its subnormals as
    # zeros (jaxlib 0.12.0.1), and the interpreter of TPU kernels with it.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_max_isa=AVX512 {flags}"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax
import pytest

import at_once
import emulated_cuda
import harness
import interpreted_tpu
from harness import skip_unless_it_can_be_used

# A new backend is put under the whole suite by adding its name here.
ON_GPUS = ("cuda",) if "cuda" in os.environ["JAX_PLATFORMS"] else ()
COMPILED_HERE = ("cpu", *ON_GPUS, "blocks", "dense", "segment_max")
IMPLEMENTATIONS = (*COMPILED_HERE, at_once.NAME, emulated_cuda.NAME, interpreted_tpu.NAME)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="also what takes minutes: the compilers for TPUs and CUDA, trained detectors, "
        "interpreted kernels, everything on many devices, recorded answers on every backend",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: runs with --full alone, as it takes long")


# Begun with, so that no worker is left with one of them when the others have nothing to do.
LONGEST = (
    "test_tpu_compiled_averages.py",
    "test_tpu_compiled.py",
    "test_examples.py",
    "test_sharding.py",
    "test_contract.py",
    "test_tpu_compiled_sharded.py",
    "test_averages_sharded.py",
    "test_tpu.py",
    "test_parity.py",
)


def pytest_collection_modifyitems(config, items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    if not config.getoption("--full"):
        slow = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


at_once.install()
emulated_cuda.install()
interpreted_tpu.install()

# The same examples on every run, and no deadline: the first example of a shape compiles.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=20
)
hypothesis.settings.load_profile("repeatable")


# Session scope: hypothesis refuses fixtures that do not outlive one example.
@pytest.fixture(
    scope="session",
    params=(*COMPILED_HERE, pytest.param(emulated_cuda.NAME, marks=pytest.mark.full)),
)
def implementation(request):
    """A backend that is compiled for the machine at hand, or emulated."""
    skip_unless_it_can_be_used(request.param)
    return request.param


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def every_implementation(request):
    """Those for GPUs and TPUs as well, which take long: for few and small tests."""
    skip_unless_it_can_be_used(request.param)
    return request.param


@pytest.fixture(scope="module")
def native():
    """For tests of the native library alone."""
    skip_unless_it_can_be_used("cpu")


@pytest.fixture(scope="session")
def interpreter():
    """For tests of the TPU kernels alone."""
    skip_unless_it_can_be_used(interpreted_tpu.NAME)


@pytest.fixture(scope="module")
def on_the_cpu():
    """For tests of what is chosen or exported for a CPU, wherever they run."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file_at_a_time():
    """Forgets compiled programs when a file's tests are done: they take gigabytes together."""
    yield
    harness.pool.cache_clear()
    harness.pool_and_grad.cache_clear()
    jax.clear_caches()
    emulated_cuda.end_processes()


@pytest.fixture
def x64():
    """Turns 64-bit types on for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
