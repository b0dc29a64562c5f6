"""What travels inside a replica: activations from stage to stage, and the leader's decisions to everyone."""

import numpy as np
import pytest

from llama_hpc.comm import pipeline
from llama_hpc.comm.outcomes import Outcomes
from llama_hpc.comm.pipeline import StageChannel

HIDDEN = 24


@pytest.fixture(params=["one node", "nodes"])
def place(request, monkeypatch):
    """Stages on one node, or each on a node of its own: then steps travel in pieces, here of 40 numbers."""
    if request.param == "nodes":
        monkeypatch.setattr(pipeline, "PIECE", 160)
        monkeypatch.setattr(pipeline, "_nodes", lambda comm: list(range(comm.size)))


def step(channel, residual, rows, fault=0):
    """What a stage does: receive, add its number (1, 2, …), send. Returns the fault code so far."""
    fault = channel.receive(residual, rows) or fault
    residual[:rows] += channel.comm.rank + 1
    channel.send(residual, rows, fault)
    return fault


def test_every_step_passes_all_stages_in_its_own_rows(comm, place):
    micro_batches, rounds, rng = 3, 20, np.random.default_rng(5)
    rows = rng.integers(1, 9, (rounds, micro_batches))          # the same on every rank
    channel, residual = StageChannel(comm, micro_batches, 8, HIDDEN), np.zeros((8, HIDDEN), np.float32)
    for turn in range(rounds):
        for m in range(micro_batches):
            start = np.arange(rows[turn, m] * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN) * 64 + 1000 * m
            residual[:] = np.nan
            if comm.rank == 0:
                residual[: rows[turn, m]] = start
            assert step(channel, residual, rows[turn, m]) == 0
            passed = sum(range(1, comm.rank + 2))
            assert np.array_equal(residual[: rows[turn, m]], start + np.float32(passed))
            assert np.isnan(residual[rows[turn, m] :]).all()
            residual[:] = -1.0      # a sent residual may be overwritten at once
    channel.finish()
    sent = 4 * (rows * HIDDEN + 2).sum()
    assert channel.bytes_sent == (sent if comm.rank < comm.size - 1 else 0)


def test_many_steps_are_under_way_at_once(comm, place, monkeypatch):
    """A stage sends all of them, 1 MB each, before the next one receives the first."""
    if pipeline.PIECE == 160:
        monkeypatch.setattr(pipeline, "PIECE", 32 << 10)
    micro_batches, rows, wide = 4, 64, 4096
    channel, residual = StageChannel(comm, micro_batches, rows, wide), np.zeros((rows, wide), np.float32)
    for stage in range(comm.size):
        for m in range(micro_batches) if comm.rank == stage else ():
            if stage == 0:
                residual[:] = m
            step(channel, residual, rows)
            assert (residual == m + sum(range(1, stage + 2))).all()
        comm.Barrier()
    channel.finish()


@pytest.mark.parametrize("code", [1, 0x7FA00001, 0x7F80000100000001, 2**63 - 1])
def test_a_fault_code_reaches_all_later_stages(comm, place, code):
    channel, residual = StageChannel(comm, 2, 3, HIDDEN), np.zeros((3, HIDDEN), np.float32)
    for origin in range(comm.size):
        seen = step(channel, residual, 3, code if comm.rank == origin else 0)
        assert seen == (code if comm.rank >= origin else 0)
        assert step(channel, residual, 3) == 0
    channel.finish()


def test_the_leader_decides_for_all_steps_under_way(comm):
    depth, max_seqs, leader, rounds = 3, 4, comm.size - 1, 10
    outcomes = Outcomes(comm, leader, depth, max_seqs)
    assert outcomes.leads == (comm.rank == leader)
    for step in range(rounds * depth):
        if step >= depth:
            check_outcome(outcomes.wait(step - depth), step - depth, rounds * depth)
        if outcomes.leads:
            outcome = outcomes.of(step)
            outcome.token[:], outcome.done[:] = step, 0
            outcome.done[step % 4] = 1
            last = step == rounds * depth - 1
            outcome.decide(2**40 + step if last else 0, last, (step, 7, 2**40, 3), list(range(step % 5)))
        outcomes.post(step)
    for step in range((rounds - 1) * depth, rounds * depth):
        check_outcome(outcomes.wait(step), step, rounds * depth)
    outcomes.free()


def check_outcome(outcome, step, steps):
    assert outcome.fault == (2**40 + step if step == steps - 1 else 0) and outcome.last == (step == steps - 1)
    assert outcome.token.tolist() == [step] * 4 and outcome.limits == (step, 7, 2**40, 3)
    assert outcome.done.tolist() == [int(i == step % 4) for i in range(4)]
    assert outcome.admitted.tolist() == list(range(step % 5))
