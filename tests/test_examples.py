"""The examples, at a small size, as their users run them."""

import functools
import importlib.util
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import tpu_compiler
from compiled import COLLECTIVES

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.fixture(scope="module")
def detector():
    return load("digits_detector")


def test_quickstart_prints_the_articles_answer(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "new" / "map.png"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output", str(picture)])
    load("quickstart").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["0.85 0.84", "0.97 0.96"]
    gradient = np.array([line.split() for line in lines[4:12]], int)
    assert sorted(zip(*map(list, np.nonzero(gradient)), strict=True)) == [
        *((3, 0), (3, 3)),
        *((5, 6), (7, 2)),
    ]
    assert is_picture(picture)


def test_detector_trains_evaluates_and_draws(detector, tmp_path, capsys):
    output = tmp_path / "pictures"
    assert detector.main(["--steps", "2", "--scenes", "4", "--output", str(output)]) == 0
    assert re.search(r"AP \d\.\d{3}  AP50 \d\.\d{3}  loss \d+\.\d{3}", capsys.readouterr().out)
    assert is_picture(output / "detections.png")
    assert is_picture(output / "loss.png")


def test_interrupted_detector_resumes_where_it_was(detector, tmp_path, monkeypatch, capsys):
    def arguments(folder):
        return detector.parse_arguments(
            ["--steps", "4", "--output", str(tmp_path), "--checkpoint", str(tmp_path / folder)]
        )

    # One state to start from, and so one compilation.
    monkeypatch.setattr(detector, "create_state", functools.cache(detector.create_state))
    _, want = detector.train(arguments("straight"))

    compose_scenes, calls = detector.compose_scenes, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compose_scenes(*args)

    monkeypatch.setattr(detector, "compose_scenes", interrupt)
    command = ["--steps", "4", "--output", str(tmp_path)]
    assert detector.main([*command, "--checkpoint", str(tmp_path / "interrupted")]) == 130
    assert "resumes" in capsys.readouterr().err

    calls.clear()
    monkeypatch.setattr(
        detector, "compose_scenes", lambda *a: calls.append(a) or compose_scenes(*a)
    )
    _, losses = detector.train(arguments("interrupted"))
    assert len(calls) == 2
    np.testing.assert_allclose(losses, want, rtol=1e-5)


def test_detector_learns_through_the_pooling(detector):
    # The head's loss alone has to reach the backbone.
    sources = detector.load_sources(detector.TRAIN)
    scenes = detector.compose_scenes([(0, detector.TRAIN, 0, i) for i in range(2)], sources)
    state = detector.create_state(seed=0, steps=1)

    def head_loss(params):
        variables = {"params": params}
        features, _, _ = state.apply_fn(variables, scenes.images, method="propose")
        logits, _ = state.apply_fn(
            variables, features, scenes.boxes, scenes.mask, method="classify"
        )
        return (logits**2).sum()

    gradient = detector.jax.jit(detector.jax.grad(head_loss))(state.params)
    assert all(np.abs(leaf).max() > 0 for leaf in detector.jax.tree.leaves(gradient["backbone"]))


def test_held_out_scenes_share_nothing_with_training(detector):
    train, held_out = (detector.load_sources(kind) for kind in (detector.TRAIN, detector.HELD_OUT))
    assert not set(detector.TRAIN_PHOTOS) & set(detector.HELD_OUT_PHOTOS)
    # Together they are the data set, so none is in both.
    glyphs = np.concatenate([train.glyphs, held_out.glyphs]).reshape(-1, 64)
    every_glyph = detector.load_digits().images.reshape(-1, 64) / 16
    assert sorted(glyphs.tolist()) == sorted(every_glyph.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--steps", "0"], "'0' is not a positive integer"),
        (["--steps", "many"], "'many' is not a positive integer"),
        (["--seed", "-1"], "'-1' is not an integer from 0"),
        (["--output", __file__], "cannot be a folder"),
    ),
)
def test_detector_refuses_bad_values(arguments, message, detector, capsys):
    with pytest.raises(SystemExit) as exit_info:
        detector.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_detectors_train_step_compiles_for_four_tpus(detector):
    devices = tpu_compiler.mesh(4)

    def argument(spec):
        sharding = NamedSharding(devices, spec)
        return lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.eval_shape(lambda: detector.create_state(seed=0, steps=10))
    batch = detector.compose_scenes([[0, i] for i in range(8)], detector.load_sources(0))
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = tpu_compiler.Compiled(
        detector.train_step,
        jax.tree.map(argument(P()), state),
        jax.tree.map(argument(P("x")), batch),
        argument(P())(key),
    )
    # Gradients of the weights, which every device has, are summed up; nothing is gathered.
    assert compiled.count("all-reduce") > 0
    assert compiled.count(*COLLECTIVES) == compiled.count("all-reduce")
