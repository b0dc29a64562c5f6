"""A run that outlives ranks: who is left goes on with what is not yet answered, under ``mpirun --with-ft ulfm``.

When a rank dies, the replicas that it was not part of pause behind a step and keep what they are answering; its own replica is
given up. All ranks that are left meet, find out what is finished and who can still do what, and form new replicas of those that
have lost theirs and of the spares. Nothing that was finished is computed again.
"""

import copy
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mpi4py import MPI

from llama_hpc.comm.counter import FileCounters
from llama_hpc.comm.survivors import FAILURES, Survivors
from llama_hpc.engine.answering import Crew
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.job import Job
from llama_hpc.engine.layout import auto_grid
from llama_hpc.engine.queue import FINISHED, NEXT, PRESSURE, STOP, TOKENS, RequestQueue
from llama_hpc.engine.replica import Replica
from llama_hpc.engine.shifts import Shift, State, hosts_memory, left, new_groups, whole_replicas
from llama_hpc.engine.watch import Watch
from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.runtime import log
from llama_hpc.runtime.abort import on_first
from llama_hpc.runtime.devices import memory_of
from llama_hpc.runtime.progress import Progress
from llama_hpc.runtime.stopping import Stop
from llama_hpc.runtime.topology import hostname
from llama_hpc.runtime.watchdog import forget

_LOG = logging.getLogger(__name__)
_UNEXPLAINED = 5                # failures one after the other behind which nobody is gone


class _Relieved(Exception):
    """A replica that was paused cannot go on after all; ``shift`` is what this rank does instead."""

    def __init__(self, shift: Shift):
        super().__init__()
        self.shift = shift


class SurvivingJob(Job):
    """A ``Job`` whose ``comm`` changes: it holds the ``survivors``. ``args.spares`` ranks begin without a replica."""

    def __init__(self, args, settings, comm: MPI.Comm, node: MPI.Comm, params, targets, stop: Stop, survivors: Survivors):
        super().__init__(args, settings, comm, node, params, targets, stop)
        self.survivors = survivors
        self.crew: Crew | None = None
        self._can_go_on = False         # whether nothing is amiss with the crew
        self._ready: list[ReadyRequest] = []
        self._shape, self._replicas = settings.shape, 0
        self._origin: float | None = None
        self._counters: FileCounters | None = None
        self._progress: Progress | None = None
        self._given_up: list[Any] = []  # of broken replicas: what exchanges that never ended may still write to
        self._reports: list[Any] = []   # … and what this rank did in them

    def run(self) -> int:
        code = super().run()
        # In MPI_Finalize the others may wait for ever for a rank that is lost, be it in these last moments.
        with suppress(*FAILURES):
            self.survivors.meet()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)

    def answer_all(self) -> None:
        shift, unexplained = None, 0
        while True:
            lost = len(self.survivors.lost)
            try:
                shift = shift or self.survivors.persist(self._assign)
                if not shift.complete:
                    self._carry_out(shift)
                return
            except _Relieved as relieved:
                shift = relieved.shift
            except FAILURES:
                shift = self._regroup()
                unexplained = 0 if len(self.survivors.lost) > lost else unexplained + 1
                if unexplained > _UNEXPLAINED:
                    raise

    def _carry_out(self, shift: Shift) -> None:
        """This rank's part of everything that is left to do."""
        begins = self._origin is None
        if shift.group is not None:
            job = self._on(shift.group, shift.shape)
            if shift.number >= 0:
                self.crew, self._can_go_on = job.set_up(self._ready, shift.number), True
                self._shape = self._shape or job.grid.shape
            elif begins:
                # A spare is ready when it has the kernels.
                job.open()
                job.compile()
        if begins:
            self.survivors.meet()
            self._origin = time.monotonic()
        if self.crew is not None:
            self._answer(shift, begins)
        # Ranks without a replica, and those whose replica has ended, wait here to be needed.
        self.survivors.meet(self._tick())
        seconds = time.monotonic() - self._origin
        if self._progress:
            self._progress.close()
        if self.first:
            self.incidents |= {"ranks_lost": len(self.survivors.lost), "went_on_without": self.survivors.shrunk}
        place, reports = (None, []) if self.crew is None else (self.crew.place(), self.crew.reports)
        self.finish(place, self._reports + reports, self._shape, seconds)

    def _on(self, group: MPI.Comm, shape: GridShape | None) -> Job:
        """This job, on some of its ranks."""
        job = copy.copy(self)
        job.comm, job.first, job.settings = group, group.rank == 0, replace(self.settings, shape=shape)
        job.node, job.show = group.Split_type(MPI.COMM_TYPE_SHARED, group.rank), self.show and job.first
        return job

    def _answer(self, shift: Shift, begins: bool) -> None:
        crew = self.crew
        queue = self._queue(shift, crew.at_once(self._ready) if begins else 0)
        self._can_go_on = False
        crew.run(self._ready, queue, self._counters, self._origin, self._tick(), keep=self.durable.keep, done=shift.done,
                 stop=self.stop, gone=self.survivors.failed, regroup=self._pause)
        self._can_go_on = True

    def _queue(self, shift: Shift, dealt: int) -> RequestQueue:
        grid = self.crew.job.grid
        return RequestQueue(shift.order, shift.arrivals, self._counters, grid.data_index, grid.shape.data, dealt)

    def _tick(self) -> Watch | None:
        """What the first rank calls often."""
        if not self.first:
            return None
        self._progress = self._progress or Progress(len(self._ready), "prompts", "answering", show=self.show)
        return Watch(self._counters, self._progress, self.heartbeat)

    def _pause(self, replica: Replica) -> None:
        """The replica has paused behind a step, as ranks are gone that are not its own."""
        self._can_go_on = True
        shift = self._regroup()
        if self.crew is None:
            raise _Relieved(shift)
        self._can_go_on = False
        replica.go_on(self._queue(shift, 0), self._counters, shift.done, self._tick())

    def _regroup(self) -> Shift:
        """Finds out how to go on with those who are left. Collective over them. Raises LlamaHpcError where it does not work."""
        self.survivors.leave(self._communicators() if self.crew and not self._can_go_on else ())
        return self.survivors.persist(self._assign, lost=True)

    def _communicators(self) -> list[MPI.Comm]:
        """Those in which other ranks of this one's replica may wait for it."""
        job, replica = self.crew.job, self.crew.replica
        grid = job.grid
        found = [job.comm, grid.replica, grid.pipeline_comm, grid.tensor_comm, grid.stage_comm, job.context_comm]
        return found + (replica.communicators if replica else [])

    def _assign(self) -> Shift:
        """Who does what from now on. Collective over all who are left."""
        self._introduce()
        if self.crew and not self._can_go_on:
            self._give_up()
        states: list[State] = self.comm.allgather(self._state())
        whole = whole_replicas(states)
        if self.crew and self.crew.number not in whole:
            self._give_up()
        self._replicas = max(state.replicas for state in states)
        self._shape = next((state.shape for state in states if state.shape), None)
        origins = [state.origin for state in states if state.origin is not None]
        if origins and self._origin is None:
            self._origin = time.monotonic() - (time.time() - origins[0])
        ready, done, self.facts, self.durable.run, complete = on_first(self.comm, self._review, states)
        self.durable.ours = not complete
        self._ready = ready or self._ready
        if complete:
            return Shift([], None, done, complete=True)
        kept = [state for state in states if state.replica in whole]
        order, arrivals = left(self._ready, done, {number for state in kept for number in state.taken})
        self._count(len(order) + sum(len(state.unfinished) for state in kept), begins=not origins)
        free = [rank for rank, state in enumerate(states) if state.replica not in whole]
        spares = 0 if origins else max(0, self.args.spares - len(self.survivors.lost))
        return self._form(Shift(order, arrivals, done), states, free, spares, others=bool(whole))

    def _introduce(self) -> None:
        lost = self.survivors.introduce()
        forget(member.rank for member in lost)
        self.comm, was_first = self.survivors.comm, self.first
        self.first = self.comm.rank == 0
        self.show = self.first and self.settings.show
        if self.first and not was_first:
            log.become_first()
        if self.first and lost:
            _LOG.warning("lost %s; %d ranks go on", ", ".join(map(str, lost)), self.comm.size)

    def _state(self) -> State:
        crew = self.crew
        leads = crew is not None and crew.job.grid.is_leader
        if leads and self.durable.writer:
            self.durable.writer.settle()
        shape = crew.job.grid.shape if crew else None
        origin = None if self._origin is None else time.time() - (time.monotonic() - self._origin)
        return State(crew.number if crew else None, shape.pipeline * shape.tensor if crew else 0,
                     sorted(crew.taken) if leads else (), crew.replica.unfinished if leads and crew.replica else (),
                     bool(self._ready), origin, self.durable.run, self._replicas, self._shape, self.facts, hostname(),
                     memory_of(self.device, 1), self.device.kind == "gpu")

    def _review(self, states: list[State]) -> tuple:
        """First rank: the requests, unless all have them, what is done, facts, the number of the run, whether all is complete."""
        runs = [state.run for state in states if state.run is not None]
        if runs:
            self.durable.run, self.facts = runs[0], next(state.facts for state in states if state.facts)
            if not self.requests:
                self._ready = self.read_prompts()
            done = self.durable.look_again(self.identity, self.facts["start_time"])
        else:
            self._ready, done, _ = self.read()
        ready = None if all(state.knows for state in states) else self._ready
        return ready, done, self.facts, self.durable.run, self.durable.complete

    def _count(self, unfinished: int, begins: bool) -> None:
        """Sets the counters as they should be; ``unfinished``: so many requests."""
        path = self.durable.folder.path / "counters"
        if self.first:
            counters = FileCounters(path, self.comm)
            for counter in (NEXT, STOP, TOKENS, PRESSURE) if begins else (NEXT,):
                counters.set(counter, 0)
            counters.set(FINISHED, len(self._ready) - unfinished)
        self.comm.Barrier()
        self._counters = FileCounters(path, self.comm)

    def _form(self, shift: Shift, states: list[State], free: list[int], spares: int, others: bool) -> Shift:
        """The shift, for a rank that is ``free`` with its group."""
        working = free[: len(free) - spares] if shift.order else []
        groups = [(working, None)] if working and self._shape is None else []
        if working and self._shape is not None:
            def smaller(ranks, must: bool) -> GridShape | None:
                return on_first(self.comm, self._smaller, states, ranks, must)
            groups = new_groups(working, self._shape, len(shift.order), others, smaller)
        idle = set(free).difference(*(ranks for ranks, _ in groups))
        number, mine = self._replicas, Shift(shift.order, shift.arrivals, shift.done, number=-1)
        color = len(groups) if self.comm.rank in idle else MPI.UNDEFINED
        for place, (ranks, shape) in enumerate(groups):
            if self.comm.rank in ranks:
                color, mine = place, replace(shift, shape=shape, number=number)
            number += shape.data if shape else len(ranks)
        self._replicas = number
        group = self.comm.Split(color, self.comm.rank)
        if self.first and self.survivors.lost:
            _LOG.info("%d prompts are handed out again; new replicas: %s", len(shift.order),
                      ", ".join(f"{shape or 'auto'} of {len(ranks)} ranks" for ranks, shape in groups) or "none")
        return shift if color == MPI.UNDEFINED else replace(mine, group=group)

    def _smaller(self, states: list[State], ranks: list[int], must: bool) -> GridShape | None:
        """First rank: a shape for ranks that are too few for the usual one, or None where memory has no room for the model.
        Raises UsageError where there ``must`` be one."""
        per_node, memory = hosts_memory(states, ranks)
        try:
            return auto_grid(self.checkpoint.config, self.weights, len(ranks), per_node, memory, *self.grid_sizes(self._ready),
                             kv_cache=self.kv_cache, context=self.settings.context_parallel)
        except UsageError:
            if must:
                raise
            return None

    def _give_up(self) -> None:
        """This rank's replica is broken: its memory is given back, but for what unfinished exchanges may write to."""
        replica = self.crew.replica
        self._given_up += [self.crew.stage.reducer, replica and (replica.channel, replica.outcomes)]
        self._reports += self.crew.reports
        self.crew.job.pool.close()
        self.crew, self._can_go_on = None, False
        self.durable.close()
