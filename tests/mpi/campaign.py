"""Every layout against one rank, every run a job of its own: ``make test-layouts``.

SmolLM2, and stories15M and stories260K where LLAMA_HPC_TEST_DATA names a folder that has them; in each weights format every
grid, and around 1x1x1 and 2x2x2 one setting varied at a time: threads, sequences at a time, prefill chunks, the MPI library.
One line a run; the exit code is 1 when a digest or the packed bytes of a tensor differ, or a run fails.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layouts import ALONE, GRIDS, WEIGHTS, Layout, Run, fresh, make_models, perform

LAYOUTS = (
    *(Layout(grid) for grid in GRIDS),
    *(layout for grid in ("1x1x1", "2x2x2") for layout in (
        Layout(grid, threads=2), Layout(grid, mpi="mpich"),
        *(Layout(grid, options=options) for options in (
            "--max-seqs 1", "--max-seqs 3", "--prefill-micro-batch 1", "--prefill-micro-batch 7", "--token-budget 64",
            "--no-prefix-sharing", "--reduce mpi", "--reduce one-sided", "--sequence-parallel 1",
            "--reduce mpi --overlap 2",
            "--micro-batches 4 --decode-micro-batch 3")))),
    *(Layout(grid, options=f"--context-parallel {grid[-1]}") for grid in ("1x1x3", "2x2x2")),
)  # fmt: skip
HEADING = f"{'model':11} {'weights':7} {'grid':6} {'threads':>7} {'options':34} {'MPI':7} {'seconds':>7}  digest"


def main() -> int:
    """Returns the exit code."""
    states, start = Counter(), time.monotonic()
    print(HEADING, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = make_models(folder)
        del models["random"]            # test_layouts.py has it on every grid
        for model in models.values():
            for weights in WEIGHTS:
                states += _compare([Run(model, weights, layout) for layout in LAYOUTS], folder)
    total = states.total()
    print(f"{total} runs in {time.monotonic() - start:.0f} s: {states['ok']} equal to {ALONE.grid}, {states['DIFFERS']} differ, "
          f"{states['FAILED']} failed", flush=True)
    return int(states["ok"] != total)


def _compare(runs: list[Run], folder: Path) -> Counter:
    """Performs the runs, prints a line for each, and counts how they compare with the first."""
    expected, states = None, Counter()
    for run in runs:
        layout = run.layout
        line = (f"{run.model.name:11} {run.weights:7} {layout.grid:6} {layout.threads:7} {layout.options:34} {layout.mpi:7}")
        try:
            found = perform(fresh, run, folder)
        except (AssertionError, pytest.fail.Exception) as error:
            states["FAILED"] += 1
            print(f"{line}          FAILED\n{error}", flush=True)
            continue
        expected = expected or found
        state = "ok" if found.same(expected) else "DIFFERS"
        states[state] += 1
        print(f"{line} {found.seconds:7.1f}  {found.digest[:16]} {state}", flush=True)
    return states


if __name__ == "__main__":
    sys.exit(main())
