"""Trains the example's detector in a process of its own, for `test_examples.py`.

    python run_detector.py LOSSES.npy DIE_AT_STEP ARGUMENTS...

saves the losses, or, unless that step is -1, is killed before it.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_detector.py"


def main(losses, die_at_step, *arguments):
    spec = importlib.util.spec_from_file_location("digits_detector", EXAMPLE)
    detector = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(detector)
    compose_scenes = detector.compose_scenes

    def compose_or_die(seeds, sources):
        if seeds[0][2] == int(die_at_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return compose_scenes(seeds, sources)

    detector.compose_scenes = compose_or_die
    settings = detector.parse_arguments(arguments)
    detector.start(settings)
    _, rows = detector.train(settings, detector.make_mesh(settings.batch_size))
    if jax.process_index() == 0:
        np.save(losses, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
