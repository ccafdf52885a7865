"""`python -m jax_roipool check`: its answers are the oracle's, and it tells right from wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from harness import assert_same, skip_unless_it_can_be_used
from jax_roipool import _check
from jax_roipool._backends.rectangle_max import FAMILY

SMALL = _check.Problem((2, 9, 11, 3), 40, (3, 3), "float32", "partition", "special")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_check, "PROBLEMS", (SMALL, SMALL._replace(dtype="int8", kind="ties")))
    monkeypatch.setattr(_check, "TIMED", SMALL)
    monkeypatch.setattr(_check, "SECONDS", 1e-9)
    few = tuple(FAMILY.named(name) for name in ("cpu", "tpu", "blocks"))
    monkeypatch.setattr(FAMILY, "backends", few)


@pytest.fixture
def with_a_fault(monkeypatch):
    """Puts a fault into a function of the portable implementation."""

    def put(name, function):
        backends = tuple(
            b._replace(functions={**b.functions, name: function(b.functions[name])})
            if b.name == "blocks"
            else b
            for b in FAMILY.backends
        )
        monkeypatch.setattr(FAMILY, "backends", backends)
        jax.clear_caches()

    yield put
    jax.clear_caches()


@pytest.mark.parametrize("problem", _check.PROBLEMS, ids=str)
def test_its_answers_are_the_oracles(problem):
    inputs = _check.inputs_of(problem)
    features = inputs.features.astype(jnp.dtype(problem.dtype))
    convention = _check.CONVENTIONS[problem.convention]
    pooled, argmax = oracle.roi_pool(features, inputs.rois, problem.output_size, convention)
    assert (argmax >= 0).any()
    assert (argmax < 0).any()
    got = _check.expected(problem)
    assert_same(got[0], _check._widened(pooled))
    assert_same(got[2], argmax)


def test_all_is_right_here(small, capsys):
    skip_unless_it_can_be_used("cpu")
    assert _check.main() == 0
    said = capsys.readouterr().out
    for name in ("cpu", "blocks"):
        assert f"\n{name}: 2 problems right to the bit; a call " in said
    assert "\ntpu: " not in said
    assert "WRONG" not in said


@pytest.mark.parametrize(
    ("function", "fault", "found"),
    (
        ("rectangle_max", lambda pooled, *argmax: [pooled + 1, *argmax], "maxima differs in"),
        (
            "rectangle_max",
            lambda pooled, *argmax: [pooled, *(-a for a in argmax)],
            "argmax differs",
        ),
        ("scatter_at_argmax", lambda gradient: [2 * gradient], "gradient differs in"),
    ),
    ids=("maxima", "argmax", "gradient"),
)
def test_what_is_wrong_is_found(with_a_fault, function, fault, found):
    with_a_fault(function, lambda right: lambda *a, **k: fault(*right(*a, **k)))
    assert any(found in said for said in _check.faults_in(SMALL, "blocks"))


def test_sums_are_to_be_in_order_where_that_is_promised(with_a_fault, monkeypatch):
    """A last bit of what is not a whole number."""

    def unordered(right):
        def scatter(*arguments, **options):
            (gradient,) = right(*arguments, **options)
            return [jnp.where(gradient % 1 == 0, gradient, jnp.nextafter(gradient, jnp.inf))]

        return scatter

    with_a_fault("scatter_at_argmax", unordered)
    assert not list(_check.faults_in(SMALL, "blocks"))
    monkeypatch.setattr(_check, "IN_ORDER", ("blocks",))
    (fault,) = _check.faults_in(SMALL, "blocks")
    assert "sums in order differs in" in fault


def test_a_failure_says_where_and_what_to_do(small, with_a_fault, capsys):
    def fails(right):
        def call(*arguments, **options):
            raise RuntimeError("no such kernel")

        return call

    with_a_fault("rectangle_max", fails)
    assert _check.main() == 1
    said = capsys.readouterr().out
    assert "\nblocks: WRONG, " in said
    assert "cpu: WRONG" not in said
    assert f"on {jax.devices()[0].device_kind} fails; implementation='xla' does without" in said
    assert "RuntimeError: no such kernel" in said


@pytest.mark.parametrize("name", ("tpu", "none such"))
def test_an_implementation_that_is_not_here_is_not_right(small, capsys, name):
    assert _check.main(name) == 1
    assert f"{name}: not tried" in capsys.readouterr().out


def test_the_platform_is_the_one_that_programs_are_lowered_for():
    expected = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    assert _check.platform_of_devices() == expected


def test_expected_sums_are_whole_numbers_in_the_gradient():
    """So that they are the same in any order."""
    gradient = _check.expected(SMALL)[3]
    assert (gradient == np.round(gradient)).all()
    assert (gradient != 0).any()
