"""What travels inside a replica: activations from stage to stage, and the leader's decisions to everyone."""

import numpy as np
import pytest

from llama_hpc.comm.outcomes import NONE, OutcomeBroadcast
from llama_hpc.comm.pipeline import StageChannel

HIDDEN = 24


def step(channel, micro_batch, residual, rows, fault=0):
    """What a stage does: receive, add its number (1, 2, …), send. Returns the fault code so far."""
    fault = channel.receive(micro_batch, residual, rows) or fault
    residual[:rows] += channel.comm.rank + 1
    channel.send(micro_batch, residual, rows, fault)
    return fault


def test_every_micro_batch_passes_all_stages_in_its_own_rows(comm):
    micro_batches, rounds, rng = 3, 20, np.random.default_rng(5)
    rows = rng.integers(1, 9, (rounds, micro_batches))          # the same on every rank
    channel, residual = StageChannel(comm, micro_batches, 8, HIDDEN), np.zeros((8, HIDDEN), np.float32)
    for turn in range(rounds):
        for m in range(micro_batches):
            start = np.arange(rows[turn, m] * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN) * 64 + 1000 * m
            residual[:] = np.nan
            if comm.rank == 0:
                residual[: rows[turn, m]] = start
            assert step(channel, m, residual, rows[turn, m]) == 0
            passed = sum(range(1, comm.rank + 2))
            assert np.array_equal(residual[: rows[turn, m]], start + np.float32(passed))
            assert np.isnan(residual[rows[turn, m] :]).all()
            residual[:] = -1.0      # a sent residual may be overwritten at once
    channel.finish()
    sent = 4 * (rows * HIDDEN + 2).sum()
    assert channel.bytes_sent == (sent if comm.rank < comm.size - 1 else 0)


def test_many_micro_batches_are_in_flight_at_once(comm):
    """A stage sends all of them, 1 MB each, before the next one receives the first."""
    micro_batches, rows, wide = 4, 64, 4096
    channel, residual = StageChannel(comm, micro_batches, rows, wide), np.zeros((rows, wide), np.float32)
    for stage in range(comm.size):
        for m in range(micro_batches) if comm.rank == stage else ():
            if stage == 0:
                residual[:] = m
            step(channel, m, residual, rows)
            assert (residual == m + sum(range(1, stage + 2))).all()
        comm.Barrier()
    channel.finish()


@pytest.mark.parametrize("code", [1, 0x7FA00001, 0x7F80000100000001, 2**63 - 1])
def test_a_fault_code_reaches_all_later_stages(comm, code):
    channel, residual = StageChannel(comm, 2, 3, HIDDEN), np.zeros((3, HIDDEN), np.float32)
    for origin in range(comm.size):
        seen = step(channel, 0, residual, 3, code if comm.rank == origin else 0)
        assert seen == (code if comm.rank >= origin else 0)
        assert step(channel, 1, residual, 3) == 0
    channel.finish()


def test_the_leader_decides_for_all_micro_batches_in_flight(comm):
    micro_batches, slots, leader = 3, 4, comm.size - 1
    broadcast = OutcomeBroadcast(comm, leader, micro_batches, slots)
    for turn in range(10):
        for m in range(micro_batches):
            if comm.rank == leader:
                outcome = broadcast.outcomes[m]
                outcome.clear()
                outcome.fault = 2**40 + m if turn == 9 else 0
                outcome.token[m], outcome.done[m + 1], outcome.admit[0] = 100 * turn + m, 1, turn
            broadcast.post(m)
        for m in range(micro_batches):
            outcome = broadcast.wait(m)
            assert outcome.fault == (2**40 + m if turn == 9 else 0)
            assert outcome.token.tolist() == [100 * turn + m if slot == m else NONE for slot in range(slots)]
            assert outcome.done.tolist() == [int(slot == m + 1) for slot in range(slots)]
            assert outcome.admit.tolist() == [turn, NONE, NONE, NONE]
