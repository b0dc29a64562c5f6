"""Loading over a tensor group: what is hashed, and how a failure reaches everyone."""

import hashlib

import numpy as np
import pytest
from models import FORMATS, GridModel

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.errors import CheckpointError
from llama_hpc.model.shares import TensorShare
from llama_hpc.model.sizes import whole
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.loader import PeerFailed, load_stage


def test_hashes_of_f32_are_those_of_the_stored_values(comm, checkpoints):
    checkpoint, hashes = open_checkpoint(checkpoints / "llama_odd"), {}
    GridModel(checkpoints / "llama_odd", "f32", comm, 1, comm.size, hashes=hashes)
    for name, value in hashes.items():
        values = np.ascontiguousarray(checkpoint.read(name), "<f4")
        header = f"f32 {values.shape[0]} {values.shape[1]}\n".encode()
        assert value == hashlib.sha256(header + values.tobytes()).hexdigest()


class Damaged:
    """A checkpoint with a NaN in the last row of one tensor."""

    def __init__(self, checkpoint, tensor):
        self.checkpoint, self.tensor = checkpoint, tensor

    def __getattr__(self, name):
        return getattr(self.checkpoint, name)

    def read(self, name, rows=None, columns=None):
        values = self.checkpoint.read(name, rows, columns)
        if name == self.tensor and (rows is None or rows.stop == self.shape(name)[0]):
            values = values.copy()
            values[-1] = np.nan
        return values


@pytest.mark.parametrize("weights_format", FORMATS)
@pytest.mark.parametrize("hashed", [False, True])
def test_a_rank_that_cannot_load_its_share_stops_the_others(comm, checkpoints, weights_format, hashed):
    """The last rows of the embedding belong to the last rank: it knows why, the others know that."""
    checkpoint = Damaged(open_checkpoint(checkpoints / "llama_odd"), "embedding")
    config = checkpoint.config
    share = TensorShare.of(config, comm.size, comm.rank)
    expected = CheckpointError if comm.rank == comm.size - 1 else PeerFailed
    with pytest.raises(expected, match="NaN or infinity in tensor embedding, row 514" if expected is CheckpointError else None):
        load_stage(checkpoint, weights_format, whole(config)[0], share, TensorReducer(comm), comm,
                   hashes={} if hashed else None)
