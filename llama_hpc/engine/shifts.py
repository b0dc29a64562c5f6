"""Who does what once ranks are lost: plain decisions from what those that are left tell, the same on each of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.queue import in_order
from llama_hpc.grid import GridShape

if TYPE_CHECKING:
    from mpi4py import MPI

Done = frozenset[tuple[int, int]]       # requests and samples with an answer


class State(NamedTuple):
    """What a rank tells the others. ``replica``: the number of the one that it can go on with, of ``ranks`` ranks, or None;
    ``taken`` and ``unfinished``: requests that its leader has ever admitted, and is answering."""

    replica: int | None
    ranks: int
    taken: Sequence[int]
    unfinished: Sequence[int]
    knows: bool                     # whether it has the requests
    origin: float | None            # time.time() of second 0 of the run, once there is one
    run: int | None                 # number of this run of the job, …
    replicas: int                   # … how many replicas it has had, …
    shape: GridShape | None         # … their usual shape, and facts about it, as far as known
    facts: dict[str, Any]
    host: str
    memory: int                     # bytes that processes of its node may still take …
    own_memory: bool = False        # … or this rank alone, those of its GPU


@dataclass(frozen=True)
class Shift:
    """What is to be done until the next loss: ``order`` of requests that nobody has, with their ``arrivals``, and the pairs of
    request and sample that are ``done``. ``complete``: nothing, the output is there.

    ``group``: the ranks that set up replicas of a ``shape`` (None: still to be chosen) together, the first of which gets
    ``number``; of number -1 those that have nothing to do. Ranks whose replica goes on are in no group.
    """

    order: list[int]
    arrivals: list[float] | None
    done: Done
    complete: bool = False
    group: "MPI.Comm | None" = None
    shape: GridShape | None = None
    number: int = 0


def whole_replicas(states: Sequence[State]) -> set[int]:
    """Numbers of the replicas all of whose ranks can go on."""
    ranks = {state.replica: state.ranks for state in states if state.replica is not None}
    present = Counter(state.replica for state in states)
    return {number for number, count in ranks.items() if present[number] == count}


def left(ready: list[ReadyRequest], done: Done, taken: set[int]) -> tuple[list[int], list[float] | None]:
    """Requests as they are to be taken, and arrival times: what is neither done nor taken."""
    order, arrivals = in_order(ready, done)
    kept = [place for place, number in enumerate(order) if number not in taken]
    return [order[place] for place in kept], None if arrivals is None else [arrivals[place] for place in kept]


def new_groups(free: Sequence[int], usual: GridShape, requests: int, others: bool,
               smaller: Callable[[Sequence[int], bool], GridShape | None]) -> list[tuple[list[int], GridShape]]:
    """Ranks that set up replicas together, and their shape: of those that are ``free`` as many of the usual shape as there are
    ranks and ``requests`` for, and of the rest the one that ``smaller(rest, must)`` finds, which ``must`` find one where there is
    no other replica. ``others``: whether some go on.
    """
    size, groups = usual.pipeline * usual.tensor, []
    count = min(len(free) // size, requests)
    if count:
        groups.append((list(free[: count * size]), GridShape(count, usual.pipeline, usual.tensor)))
    rest = list(free[count * size :])
    if rest and count < requests and (shape := smaller(rest, not (others or count))):
        groups.append((rest, shape))
    return groups


def hosts_memory(states: Sequence[State], ranks: Sequence[int]) -> tuple[int, int]:
    """The least ranks of these on a node, and the least bytes that each may take."""
    hosts = Counter(states[rank].host for rank in ranks)
    return min(hosts.values()), min(states[rank].memory // (1 if states[rank].own_memory else hosts[states[rank].host])
                                    for rank in ranks)
