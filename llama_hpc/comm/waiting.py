"""Waiting for messages, with something to do meanwhile."""

from collections.abc import Callable, Sequence

from mpi4py import MPI


def complete(requests: Sequence[MPI.Request], meanwhile: Callable[[], None] | None = None) -> None:
    """Waits for all ``requests``; calls ``meanwhile`` again and again until they are complete."""
    if meanwhile is None:
        MPI.Request.Waitall(requests)
        return
    while not MPI.Request.Testall(requests):
        meanwhile()
