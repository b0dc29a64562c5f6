"""Grid.create on the ranks of this job, in every shape that they can form."""

import pytest
from models import factorisations
from mpi4py import MPI

from llama_hpc.errors import UsageError
from llama_hpc.grid import Grid, GridShape


class TwoNodes(MPI.Intracomm):
    """A world whose even ranks share one node and whose odd ranks share another."""

    def Split_type(self, split_type, key=0, info=MPI.INFO_NULL):
        return MPI.Intracomm(self).Split(self.rank % 2, key)


def test_coordinates_are_all_different_and_run_tensor_first(comm):
    for shape in factorisations(comm.size):
        grid = Grid.create(comm, shape)
        places = grid.world.allgather((grid.data_index, grid.stage, grid.tensor_index))
        assert places == [(d, p, t) for d in range(shape.data) for p in range(shape.pipeline) for t in range(shape.tensor)]


def test_communicators_join_the_ranks_of_one_axis(comm):
    for shape in factorisations(comm.size):
        grid = Grid.create(comm, shape)
        d, p, t = grid.data_index, grid.stage, grid.tensor_index
        assert grid.tensor_comm.allgather((d, p, t)) == [(d, p, i) for i in range(shape.tensor)]
        assert grid.pipeline_comm.allgather((d, p, t)) == [(d, i, t) for i in range(shape.pipeline)]
        expected = [(d, i, j) for i in range(shape.pipeline) for j in range(shape.tensor)]
        assert grid.replica.allgather((d, p, t)) == expected


def test_one_leader_a_replica_on_the_last_stage(comm):
    for shape in factorisations(comm.size):
        grid = Grid.create(comm, shape)
        assert grid.is_leader == (grid.stage == shape.pipeline - 1 and grid.tensor_index == 0)
        assert grid.last_stage == (grid.stage == shape.pipeline - 1)
        assert grid.replica.allreduce(int(grid.is_leader)) == 1
        assert grid.replica.bcast(grid.is_leader, grid.leader_rank) is True


def test_ranks_of_a_node_are_neighbours(comm):
    grid = Grid.create(TwoNodes(comm), GridShape(1, 1, comm.size))
    assert grid.tensor_comm.allgather(comm.rank) == [*range(0, comm.size, 2), *range(1, comm.size, 2)]


def test_a_shape_that_does_not_fill_the_world_is_refused_everywhere(comm):
    with pytest.raises(UsageError, match=f"the job has {comm.size}"):
        Grid.create(comm, GridShape(1, 1, comm.size + 1))
