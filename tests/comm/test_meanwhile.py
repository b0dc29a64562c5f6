"""Something else can be done while messages travel."""

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.waiting import until_complete


def test_what_comes_meanwhile():
    received, turns = np.zeros(1), []

    def meanwhile():
        turns.append(len(turns))
        if len(turns) == 3:
            MPI.COMM_SELF.Send(np.ones(1), 0)
    until_complete([MPI.COMM_SELF.Irecv(received, 0)], meanwhile)
    assert received[0] == 1 and len(turns) >= 3
