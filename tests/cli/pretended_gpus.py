"""The command line of llama-hpc on nodes with made-up GPUs: ``pretended_gpus.py COUNT GIB ARGUMENTS…``, under mpirun.

Every node has COUNT GPUs with so many GiB. Kernels cannot run on them: for what a job decides before it has a stage.
"""

import sys

from llama_hpc.runtime import numba_setup

# Before what follows imports Numba.
numba_setup.configure(1)

from llama_hpc.cli.main import main  # noqa: E402
from llama_hpc.kernels.cuda.device import DeviceFacts  # noqa: E402
from llama_hpc.runtime import devices  # noqa: E402

if __name__ == "__main__":
    count, memory, *command = sys.argv[1:]
    memory = int(float(memory) * 2**30)
    gpus = tuple(DeviceFacts(n, "NVIDIA H200", memory, 90, f"0000:0{n}:00.0", f"0000:0{n}:00.0") for n in range(int(count)))
    devices.look = lambda option: devices.Sight(gpus if option != "cpu" else ())
    devices.free_memory = lambda number: memory
    sys.exit(main(command))
