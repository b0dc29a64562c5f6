"""Text for people: tables of aligned columns, and sizes."""

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """The lines of a table, the titles first. Columns are aligned to the right, those whose title is in ``left`` to the left."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) if title in left else cell.rjust(width)
                         for title, cell, width in zip(titles, cells, widths, strict=True)).rstrip()
    return [line(row) for row in (titles, *rows)]


def size(count: float) -> str:
    """Bytes, as ``1.50 GiB``, ``20.00 MiB`` or ``3.0 KiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"
