"""Tables of measurements on the terminal."""

from collections.abc import Iterable


def print_row(cells: Iterable[str], width: int = 12) -> None:
    """A line of a table whose columns are at least so wide, the first one aligned to the left."""
    first, *others = cells
    print(first.ljust(width) + "".join(" " + cell.rjust(width) for cell in others), flush=True)
