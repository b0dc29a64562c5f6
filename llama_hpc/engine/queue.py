"""Which requests a replica answers: dealt at the start, then drawn from a counter that all replicas share."""

from llama_hpc.comm.counter import SharedCounters
from llama_hpc.engine.answers import ReadyRequest

# Of the shared counters; behind COUNTERS is one for each replica, of the times that one of its ranks has run short of memory.
NEXT, FINISHED, TOKENS, STOP, ENDED, PRESSURE, COUNTERS = range(7)
_DECODE_COST = 4                # of a generated token, in tokens of a prompt


def by_cost(requests: list[ReadyRequest]) -> list[int]:
    """Numbers of the requests, those that may take longest first: the last ones to be drawn are short, and replicas end
    together (longest processing time first; Graham 1969). The same on every rank."""
    def cost(number: int) -> int:
        request = requests[number]
        return len(request.prompt) + _DECODE_COST * request.limit * request.params.n
    return sorted(range(len(requests)), key=lambda number: -cost(number))


def in_order(requests: list[ReadyRequest], done: frozenset[tuple[int, int]] = frozenset()
             ) -> tuple[list[int], list[float] | None]:
    """(numbers of the requests as they are to be taken, arrival times in that order): as they arrive, or else by their cost.

    Requests of which all samples are ``done`` (pairs of request and sample) are left out.
    """
    arriving = requests[0].arrival is not None
    order = range(len(requests)) if arriving else by_cost(requests)
    order = [number for number in order if missing(requests[number], number, done)]
    return order, [requests[number].arrival for number in order] if arriving else None


def missing(request: ReadyRequest, number: int, done: frozenset[tuple[int, int]]) -> list[int]:
    """The samples of a request that are not done."""
    return [sample for sample in range(request.params.n) if (number, sample) not in done]


class RequestQueue:
    """What one of ``replicas`` is to do, for its leader: numbers, in the order given.

    The first ``at_once`` that each replica can take are dealt in turn, so that one that asks early does not get all long ones;
    the rest is drawn from the shared counter. With ``arrivals``, in seconds after the start, everything is drawn, each by a
    replica that has a place for it.
    """

    def __init__(self, order: list[int], arrivals: list[float] | None, counters: SharedCounters, replica: int, replicas: int,
                 at_once: int):
        self._order, self._arrivals, self._counters = order, arrivals, counters
        self._behind = 0 if arrivals else min(len(order), replicas * at_once)
        self._places = list(range(len(order)))[replica : self._behind : replicas][::-1]     # in reverse: still to be taken
        self._dry = not order           # whether the counter has passed the last one

    @property
    def exhausted(self) -> bool:
        """Whether there will never be another one."""
        return self._dry and not self._places

    @property
    def next_arrival(self) -> float | None:
        """When what was drawn ahead arrives."""
        return self._arrivals[self._places[-1]] if self._arrivals and self._places else None

    def take(self, now: float = 0.0) -> int | None:
        """The next number, of what has arrived at ``now``; None when there is none."""
        if not self._places and not self._dry:
            place = self._behind + self._counters.add(NEXT, 1)
            self._dry = place >= len(self._order)
            self._places = [] if self._dry else [place]
        if self._places and (self.next_arrival or 0.0) <= now:
            return self._order[self._places.pop()]
        return None
