"""The command line of llama-hpc with little memory on one rank: ``short_of_memory.py RANK ARGUMENTS…``, under mpirun.

From 30 pages of its cache on, that rank sees nothing left of 1 GiB until the cache has shrunk three times; no rank: all see what
the system says. Looks are frequent, so that short jobs have many.
"""

import sys

from llama_hpc.runtime import numba_setup
from llama_hpc.runtime.launch import environment_rank

# Before what follows imports Numba.
numba_setup.configure(1)

from llama_hpc.cli.main import main  # noqa: E402
from llama_hpc.engine import pressure, replica, watch  # noqa: E402

GIB = 1 << 30


class Short(pressure.Pressure):
    """Sees little memory."""

    def look(self):
        short = self.events < 3 and (self.events or self.pool.touched >= 30)
        pressure.memory_limits = lambda: [(0 if short else GIB, GIB)]
        super().look()


if __name__ == "__main__":
    rank, *command = sys.argv[1:]
    replica._SAMPLE, pressure._SETTLE, watch._POLL = 0.005, 0.02, 0.01
    if rank == str(environment_rank()):
        replica.Pressure = Short
    sys.exit(main(command))
