"""``bench comm``: how fast ranks exchange data, inside a node and between nodes."""

import argparse
import statistics
from dataclasses import dataclass

from mpi4py import MPI

from llama_hpc.bench.errors import BenchmarkError
from llama_hpc.bench.exchanges import OPERATIONS, WORD
from llama_hpc.bench.ranks import repetitions, sleep_until_all, slowest_seconds
from llama_hpc.bench.report import Report
from llama_hpc.bench.table import print_row
from llama_hpc.runtime.abort import agreed

TITLES = ("place", "operation", "ranks", "bytes", "us", "MB/s", "bus MB/s")


@dataclass(frozen=True)
class Exchange:
    """One exchange, the median over rounds on the slowest rank; ``exchanges`` says what bytes and bandwidths are.

    ``place``: ``node``, between ranks of the first rank's node, or ``nodes``, between the first ranks of all nodes. The time of
    ``pingpong`` is that of one way.
    """

    place: str
    operation: str
    ranks: int
    bytes: int
    repetitions: int
    microseconds: float
    gigabytes_per_second: float
    bus_gigabytes_per_second: float

    def as_row(self) -> tuple[str, ...]:
        return (self.place, self.operation, str(self.ranks), str(self.bytes), f"{self.microseconds:.2f}",
                f"{self.gigabytes_per_second * 1e3:.2f}", f"{self.bus_gigabytes_per_second * 1e3:.2f}")


def measure_exchanges(args: argparse.Namespace, report: Report | None, world: MPI.Comm, node: MPI.Comm) -> None:
    """Every place, operation and size. ``node`` holds the ranks of this one's node, in the order of ``world``.

    Collective over ``world``, whose first rank has the report and prints. Raises BenchmarkError where an exchange brings other
    numbers than it should.
    """
    if report:
        print_row(TITLES)
    for place, comm in _places(world, node).items():
        for name in args.operations:
            operation = OPERATIONS[name]
            if operation.shared and place == "nodes":
                continue
            taking_part = comm != MPI.COMM_NULL and (comm.rank < 2 or not operation.pair)
            group = world.Split(0 if taking_part else MPI.UNDEFINED, world.rank)
            if taking_part:
                for size in args.sizes:
                    found = _measure(place, name, group, size, args.rounds)
                    if report:
                        report.add("exchanges", found)
                        print_row(found.as_row())
                group.Free()
            sleep_until_all(world)


def warm_up() -> None:
    """Compiles, or loads from the disk cache, what exchanges without MPI need."""
    for operation in OPERATIONS.values():
        if operation.shared:
            exchange = operation.make(MPI.COMM_SELF, 1)
            exchange.run(1)
            exchange.free()


def _places(world: MPI.Comm, node: MPI.Comm) -> dict[str, MPI.Comm]:
    """Communicators of several ranks, that of the first node and that of the first ranks of all nodes; the first rank is in both.

    COMM_NULL on ranks that are not in them. Collective over both.
    """
    first_node = node.bcast(world.rank) == 0
    leaders = world.Split(0 if node.rank == 0 else MPI.UNDEFINED, world.rank)
    on_node, nodes = world.bcast((node.size, leaders.size if leaders != MPI.COMM_NULL else 0))
    found = {"node": node if first_node else MPI.COMM_NULL} if on_node > 1 else {}
    return found | ({"nodes": leaders} if nodes > 1 else {})


def _measure(place: str, name: str, comm: MPI.Comm, size: int, rounds: int) -> Exchange:
    """Collective over ``comm``."""
    operation = OPERATIONS[name]
    words = operation.words(size, comm.size)
    exchange = operation.make(comm, words)
    right = exchange.is_right()
    with agreed(comm, f"checking {name}"):
        if not right:
            raise BenchmarkError(f"{name} of {words * WORD} bytes between {comm.size} ranks brought other numbers than were "
                                 "sent: this MPI library does not work here; try another one")
    times = repetitions(comm, exchange.run)
    found = [slowest_seconds(comm, exchange.run, times) for _ in range(rounds)]
    exchange.free()
    seconds = statistics.median(found) / operation.trips
    speed = words * WORD / seconds / 1e9
    return Exchange(place, name, comm.size, words * WORD, times, seconds * 1e6, speed, speed * operation.bus(comm.size))
