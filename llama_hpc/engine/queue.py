"""Which requests a replica answers: dealt at the start, then drawn from a counter that all replicas share."""

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.answers import ReadyRequest

NEXT, FINISHED, TOKENS, COUNTERS = 0, 1, 2, 3       # of the shared counters
_DECODE_COST = 4                # of a generated token, in tokens of a prompt


def by_cost(requests: list[ReadyRequest]) -> list[int]:
    """Numbers of the requests, those that may take longest first: the last ones to be drawn are short, and replicas end
    together (longest processing time first; Graham 1969). The same on every rank."""
    def cost(number: int) -> int:
        request = requests[number]
        return len(request.prompt) + _DECODE_COST * request.limit * request.params.n
    return sorted(range(len(requests)), key=lambda number: -cost(number))


class RequestQueue:
    """The requests of one of ``replicas``, for its leader.

    Requests without arrival times come in the order of ``by_cost``: the first ``at_once`` that each replica can take are dealt in
    turn, so that one that asks early does not get all long ones; the rest is drawn from the shared counter. Requests that arrive
    over time are all drawn, in their order, each by a replica that has a place for it.
    """

    def __init__(self, requests: list[ReadyRequest], counters: SharedCounters, replica: int, replicas: int, at_once: int):
        self._requests, self._counters = requests, counters
        timed = requests[0].arrival is not None
        self._order = list(range(len(requests))) if timed else by_cost(requests)
        self._behind = 0 if timed else min(len(requests), replicas * at_once)
        self._drawn = self._order[replica : self._behind : replicas][::-1]      # in reverse: still to be taken
        self._dry = False               # whether the counter has passed the last one

    @property
    def exhausted(self) -> bool:
        """Whether there will never be another one."""
        return self._dry and not self._drawn

    def take(self, now: float) -> int | None:
        """The next request that has arrived at ``now``, seconds after the start; None when there is none."""
        if not self._drawn and not self._dry:
            place = self._behind + self._counters.add(NEXT, 1)
            self._dry = place >= len(self._order)
            self._drawn = self._order[place : place + 1]
        if self._drawn and (self._requests[self._drawn[-1]].arrival or 0.0) <= now:
            return self._drawn.pop()
        return None

    @property
    def next_arrival(self) -> float | None:
        """When the request that was drawn ahead arrives."""
        return self._requests[self._drawn[-1]].arrival if self._drawn else None
