"""The process grid: data x pipeline x tensor, an axis communicator per dimension."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_hpc.errors import UsageError

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass(frozen=True)
class GridShape:
    """Replicas x stages x tensor ranks."""

    data: int
    pipeline: int
    tensor: int

    def __post_init__(self):
        for name in ("data", "pipeline", "tensor"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"the grid's {name} dimension is {value}; it must be at least 1")

    @property
    def size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def check_size(self, ranks: int) -> None:
        """Raises UsageError when the grid does not fill a job of so many ranks."""
        if self.size != ranks:
            raise UsageError(f"grid {self} needs {self.data} x {self.pipeline} x {self.tensor} = {self.size} ranks, but the job "
                             f"has {ranks}; start {self.size} ranks or choose a grid of {ranks}")

    def __str__(self) -> str:
        return f"{self.data}x{self.pipeline}x{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> GridShape:
        """From ``DxPxT``, for example 2x1x4; raises UsageError."""
        match = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text.strip().lower())
        if not match:
            raise UsageError(f"--grid {text!r} is neither auto nor DxPxT (replicas x stages x tensor ranks), such as 2x1x4")
        return cls(*map(int, match.groups()))


@dataclass(frozen=True)
class Grid:
    """This rank's place in the grid and its communicators.

    ``world`` orders the ranks by node, so that the ranks of a tensor group are neighbours (same node first), then the
    stages of a replica, then the replicas. ``replica`` holds the stages and tensor ranks of one replica, stage by stage;
    ``stage_comm`` the ranks of this stage in all replicas.
    """

    shape: GridShape
    world: MPI.Comm
    replica: MPI.Comm
    pipeline_comm: MPI.Comm
    tensor_comm: MPI.Comm
    stage_comm: MPI.Comm
    data_index: int
    stage: int
    tensor_index: int

    @classmethod
    def create(cls, comm: MPI.Comm, shape: GridShape) -> Grid:
        """Collective over ``comm``; raises UsageError (on every rank) when the shape does not fill it."""
        shape.check_size(comm.size)
        world = comm.Split(0, _node_order(comm))
        # Row-major, as MPI_Cart_create numbers its ranks; a Cartesian topology of MPI is not among what may outlive a rank.
        rest, tensor_index = divmod(world.rank, shape.tensor)
        data_index, stage = divmod(rest, shape.pipeline)
        def axis(color: int) -> MPI.Comm:
            return world.Split(color, world.rank)
        return cls(shape, world, axis(data_index), axis(data_index * shape.tensor + tensor_index), axis(rest), axis(stage),
                   data_index, stage, tensor_index)

    @property
    def last_stage(self) -> bool:
        return self.stage == self.shape.pipeline - 1

    @property
    def leader_rank(self) -> int:
        """Rank, in ``replica``, of the leader: tensor rank 0 of the last stage. It samples, and decides for its replica."""
        return (self.shape.pipeline - 1) * self.shape.tensor

    @property
    def is_leader(self) -> bool:
        return self.replica.rank == self.leader_rank


def _node_order(comm: MPI.Comm) -> int:
    """A sort key that puts ranks of one node next to each other, nodes in the order of their first rank. Collective."""
    from mpi4py import MPI
    node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    first = node.bcast(comm.rank)
    key = first * comm.size + node.rank
    node.Free()
    return key
