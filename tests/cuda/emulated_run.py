"""The command line of llama-hpc with emulated GPUs: ``emulated_run.py RANKS ARGUMENTS…``, under mpirun.

RANKS, such as 0,2: those that see a GPU of their own. With LAYER_SECONDS=GPU,CPU in the environment, what a layer takes on either
is not measured.
"""

import os
import sys

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.launch import environment_rank

# Before what follows imports Numba.
numba_setup.configure(1)

from emulated_device import EmulatedDevice  # noqa: E402

from llama_hpc.cli.main import main  # noqa: E402
from llama_hpc.engine import model_job, speed  # noqa: E402
from llama_hpc.kernels.cuda.device import DeviceFacts  # noqa: E402
from llama_hpc.runtime import devices  # noqa: E402

if __name__ == "__main__":
    ranks, *command = sys.argv[1:]
    rank = environment_rank() or 0
    gpus = (DeviceFacts(0, "emulated", 1 << 30, 90, f"bus {rank}", f"gpu {rank}"),) if str(rank) in ranks.split(",") else ()
    devices.look = lambda option: devices.Sight(gpus, "" if gpus else "none here", False)
    model_job.open_device = lambda choice: EmulatedDevice()
    model_job.memory_of = lambda choice, ranks_on_node: 1 << 30
    if made_up := os.environ.get("LAYER_SECONDS"):
        speed.layer_seconds = lambda job: float(made_up.split(",")[job.gpu is None])
    sys.exit(main(command))
