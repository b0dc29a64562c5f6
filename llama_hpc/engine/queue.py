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
    """The requests of one of ``replicas``, for its leader, in the order of ``order`` (see ``by_cost``).

    The first ``at_once`` that each can take are dealt in turn, so that a replica that asks early does not get all long ones.
    """

    def __init__(self, order: list[int], counters: SharedCounters, replica: int, replicas: int, at_once: int):
        self._order, self._counters = order, counters
        self._behind = min(len(order), replicas * at_once)
        self._dealt = order[replica : self._behind : replicas]
        self._dealt.reverse()
        self.exhausted = not order

    def take(self) -> int | None:
        """The next request's number; None when there is none left, from then on always."""
        if self._dealt:
            return self._dealt.pop()
        if not self.exhausted:
            place = self._behind + self._counters.add(NEXT, 1)
            if place < len(self._order):
                return self._order[place]
            self.exhausted = True
        return None
