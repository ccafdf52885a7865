"""The library against the definition, over every convention there can be."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import oracle
import strategies
from harness import (
    EVERY_CONVENTION,
    assert_same,
    convention_id,
    pool_and_grad,
    resolved,
)


def check(problem, layout, convention):
    run = pool_and_grad(layout.output_size, convention)
    pooled, argmax, grad = run(*problem)
    expected, expected_argmax = oracle.roi_pool(
        problem.features,
        problem.rois,
        layout.output_size,
        resolved(convention),
        problem.spatial_scale,
        problem.roi_mask,
    )
    assert_same(pooled, expected)
    assert_same(argmax, expected_argmax)
    expected_grad = oracle.roi_pool_grad(
        problem.cotangent, expected_argmax, layout.features, problem.rois
    )
    assert_same(grad, expected_grad.astype(np.float32))


@pytest.mark.parametrize("convention", EVERY_CONVENTION, ids=convention_id)
@hypothesis.given(data=st.data())
def test_any_convention_follows_the_definition(convention, data):
    problem = data.draw(strategies.problems(strategies.FLAT))
    check(problem, strategies.FLAT, convention)


@pytest.mark.parametrize("convention", ("partition", "chainer"))
@pytest.mark.parametrize(
    "layout",
    (strategies.IMAGE, strategies.BATCH, strategies.FLAT, strategies.STRIP),
    ids=("image", "batch", "flat", "strip"),
)
@hypothesis.given(data=st.data())
def test_every_layout_follows_the_definition(layout, convention, data):
    check(data.draw(strategies.problems(layout)), layout, convention)
