"""The command line of llama-hpc with faults in some ranks: ``failing_rank.py FAULT,… RANK,… ARGUMENTS…``, under mpirun.

A wrapped function calls the fault instead of its n-th call on that rank.
"""

import errno
import os
import signal
import sys
import time

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.launch import environment_rank

# Before what follows imports Numba.
numba_setup.configure(1)

from llama_hpc.cli.main import main  # noqa: E402
from llama_hpc.comm.survivors import Survivors  # noqa: E402
from llama_hpc.model.kv_cache import KVCache  # noqa: E402
from llama_hpc.model.transformer import TransformerStage  # noqa: E402
from llama_hpc.results import patience  # noqa: E402
from llama_hpc.results.part_writer import PartWriter  # noqa: E402
from llama_hpc.runtime import stopping  # noqa: E402
from llama_hpc.weights.checkpoint import Checkpoint  # noqa: E402


def raising(error):
    def fail():
        raise error
    return fail


def signalling(process, *numbers):
    """Sends signals and waits to be ended."""
    def fail():
        for number in numbers:
            os.kill(process(), number)
            time.sleep(0.1)
        time.sleep(60)
    return fail


# Signals that follow each other so soon count as two.
stopping._SAME = 0.05
# File systems that are away for longer do not come back.
patience.PATIENCE = 0.5
# The first file that is renamed says which job it is, the second one is the output.
# The second KV cache and the fourth step are the model's own: compiling the kernels takes one of each.
STEP = (TransformerStage, "forward", 4)
KILLED = signalling(os.getpid, signal.SIGKILL)
FAULTS = {
    "cannot read": (Checkpoint, "read", 20, raising(OSError(errno.EIO, "Input/output error", "model.safetensors"))),
    "memory": (KVCache, "__init__", 2, raising(MemoryError())),
    "bug": (*STEP, raising(ValueError("an odd value"))),
    "disk full": (os, "replace", 2, raising(OSError(errno.ENOSPC, "No space left on device"))),
    "a write": (PartWriter, "_write", 1, raising(OSError(errno.EIO, "Input/output error"))),
    "killed": (*STEP, KILLED),
    "killed later": (TransformerStage, "forward", 40, KILLED),
    "killed at start": (Survivors, "introduce", 1, KILLED),
    "killed in loading": (Checkpoint, "read", 20, KILLED),
    "killed in writing": (os, "replace", 2, KILLED),
    "killed in regrouping": (Survivors, "introduce", 2, KILLED),
    "interrupted twice": (*STEP, signalling(os.getpid, signal.SIGINT, signal.SIGINT)),
    "interrupted mpirun": (*STEP, signalling(os.getppid, signal.SIGINT)),
    "terminated mpirun": (*STEP, signalling(os.getppid, signal.SIGTERM)),
}

LASTING = ("disk full",)        # every call from the n-th on


def inject(rank, owner, name, number, fail, lasting):
    if environment_rank() != rank:
        return
    original, calls = getattr(owner, name), 0

    def wrapped(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number or (lasting and calls > number):
            fail()
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    faults, failing, *command = sys.argv[1:]
    for fault, rank in zip(faults.split(","), failing.split(","), strict=True):
        inject(int(rank), *FAULTS[fault], fault in LASTING)
    sys.exit(main(command))
