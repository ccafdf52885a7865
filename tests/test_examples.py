"""The examples, at a small size, as their users run them."""

import importlib.util
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
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


CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 1,
    # Else a program over an automatic mesh is never found again, see docs/sharding.md.
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Detectors that start again find their programs, as their users' do; processes as well."""
    cache = CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs"))}
    before = {name: getattr(jax.config, name) for name in cache}

    def configure(values):
        for name, value in values.items():
            jax.config.update(name, value)
        # JAX decides once whether there is a cache, and would keep it for the files after this.
        compilation_cache.reset_cache()

    configure(cache)
    yield {name.upper(): str(value) for name, value in cache.items()}
    configure(before)


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


@pytest.mark.full
def test_detector_trains_evaluates_and_draws(detector, tmp_path, capsys):
    output = tmp_path / "pictures"
    assert detector.main(["--steps", "2", "--scenes", "4", "--output", str(output)]) == 0
    assert re.search(r"AP \d\.\d{3}  AP50 \d\.\d{3}  loss \d+\.\d{3}", capsys.readouterr().out)
    assert is_picture(output / "detections.png")
    assert is_picture(output / "loss.png")


STEPS = "6"


@pytest.fixture(scope="module")
def train(detector, tmp_path_factory):
    """Trains in this process, on its one device; returns the losses."""

    def train(*arguments):
        output = str(tmp_path_factory.mktemp("pictures"))
        settings = detector.parse_arguments(["--steps", STEPS, "--output", output, *arguments])
        return detector.train(settings, detector.make_mesh(settings.batch_size))[1]

    return train


@pytest.fixture(scope="module")
def straight(train):
    """The losses of a run on one device."""
    return train()


@pytest.fixture
def composed(detector, monkeypatch):
    """The steps of which scenes are composed; an exception may be put in the way of one."""
    compose_scenes, steps = detector.compose_scenes, []

    def compose(seeds, sources):
        steps.append(seeds[0][2])
        if compose.interrupted_at == len(steps):
            raise KeyboardInterrupt
        return compose_scenes(seeds, sources)

    compose.interrupted_at, compose.steps = None, steps
    monkeypatch.setattr(detector, "compose_scenes", compose)
    return compose


def in_processes(tmp_path, programs, die_at_step, *arguments, processes=1, devices=1):
    """Starts that many, waits for all, and returns their exit codes and the losses."""
    environment = (
        os.environ
        | programs
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            # XLA's threads wait for each other in a collective: with JAX 0.8.1 two threads, those
            # of two cores, never get four devices done.
            "PJRT_NPROC": "8",
        }
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(pathlib.Path(__file__).with_name("run_detector.py"))]
    command += [str(tmp_path / "losses.npy"), str(die_at_step)]
    command += ["--steps", STEPS, "--output", str(tmp_path), *arguments]
    started = [
        subprocess.Popen(
            [*command, "--process", f"{i}/{processes}", "--coordinator", coordinator]
            if processes > 1
            else command,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode not in (0, -signal.SIGKILL) for process in started):
        pytest.fail("\n".join(errors))
    losses = tmp_path / "losses.npy"
    codes = [process.returncode for process in started]
    return codes, np.load(losses) if losses.exists() else None


def assert_same_training(losses, straight):
    """The losses of a batch that is split otherwise, and so is rounded otherwise.

    Proposals are chosen by comparing scores, which shows in the end: on a processor without
    AVX-512, losses of the fourth step and later differ by up to 0.0014.
    """
    np.testing.assert_allclose(losses[:3], straight[:3], rtol=1e-4)
    np.testing.assert_allclose(losses, straight, rtol=1e-2)


@pytest.mark.full
def test_interrupted_detector_resumes_where_it_was(
    detector, train, straight, composed, tmp_path, capsys
):
    checkpoint = str(tmp_path / "checkpoint")
    composed.interrupted_at = 3
    command = ["--steps", STEPS, "--output", str(tmp_path), "--checkpoint", checkpoint]
    assert detector.main(command) == 130
    assert "resumes" in capsys.readouterr().err

    composed.interrupted_at = None
    composed.steps.clear()
    losses = train("--checkpoint", checkpoint)
    assert composed.steps == [2, 3, 4, 5]
    np.testing.assert_allclose(losses, straight, rtol=1e-5)


@pytest.mark.full
def test_killed_detector_resumes_on_fewer_devices(
    train, straight, composed, compiled_programs, tmp_path
):
    saved = ("--checkpoint", str(tmp_path / "checkpoint"), "--save-every", "2")
    codes, losses = in_processes(tmp_path, compiled_programs, 5, *saved, devices=4)
    assert (codes, losses) == ([-signal.SIGKILL], None)
    losses = train(*saved)
    # A checkpoint is written while training goes on: that of step 4 may not have been complete.
    assert composed.steps[0] in (2, 4)
    assert_same_training(losses, straight)


@pytest.mark.full
def test_detector_in_two_processes_has_the_losses_of_one(
    train, straight, composed, compiled_programs, tmp_path
):
    saved = ("--checkpoint", str(tmp_path / "checkpoint"))
    codes, losses = in_processes(tmp_path, compiled_programs, -1, *saved, processes=2, devices=2)
    assert codes == [0, 0]
    assert_same_training(losses, straight)
    # What two have saved, one can read, and there is nothing left to do.
    np.testing.assert_allclose(train(*saved), losses)
    assert not composed.steps


@pytest.mark.full
@pytest.mark.parametrize("how", (("max",), ("align", "pyramid")), ids=" ".join)
def test_detector_learns_through_the_pooling(detector, how):
    # The head's loss alone has to reach the backbone, and all of its levels.
    sources = detector.load_sources(detector.TRAIN)
    scenes = detector.compose_scenes([(0, detector.TRAIN, 0, i) for i in range(2)], sources)
    state = detector.create_state(0, 1, how[0], pyramid="pyramid" in how)

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
        (["--process", "2/2"], "'2/2' is not a number and a count"),
        (["--output", __file__], "cannot be a folder"),
    ),
)
def test_detector_refuses_bad_values(arguments, message, detector, capsys):
    with pytest.raises(SystemExit) as exit_info:
        detector.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.full
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
