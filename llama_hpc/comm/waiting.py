"""Something to do while messages travel."""

from collections.abc import Callable, Sequence

from mpi4py import MPI


def until_complete(requests: Sequence[MPI.Request], meanwhile: Callable[[], None] | None) -> None:
    """Calls ``meanwhile`` again and again until all ``requests`` are complete; without one returns at once."""
    if meanwhile is not None:
        while not MPI.Request.Testall(requests):
            meanwhile()
