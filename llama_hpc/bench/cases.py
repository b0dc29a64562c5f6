"""What is timed of a whole model: one sequence, a prompt, a batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CHUNK = 256                     # prompt tokens of a step, the default of a run
BATCH_PROMPT, BATCH_TOKENS = 16, 32


@dataclass(frozen=True)
class Case:
    """What is timed: ``batch`` sequences that grow from ``prompt`` by ``tokens`` tokens; ``prefill``: as one prompt."""

    name: str
    tokens: int
    batch: int = 1
    prompt: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.tokens}" if self.name == "batch" else f"{self.name} {self.tokens}"

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.prompt + self.tokens

    def steps(self, chunk: int = CHUNK) -> Iterator[tuple[range, int]]:
        """Positions that each sequence takes in a step, and the step's logits: one a sequence, of a prompt those of its end."""
        step = chunk if self.name == "prefill" else 1
        for first in range(self.prompt, self.length, step):
            last = min(first + step, self.length)
            yield range(first, last), self.batch if self.name != "prefill" or last == self.length else 0


def cases(names: list[str], tokens: int, prompt: int, batch: int) -> list[Case]:
    """Those of ``decode``, ``prefill`` and ``batch`` that are named."""
    known = {"decode": Case("decode", tokens), "prefill": Case("prefill", prompt),
             "batch": Case("batch", BATCH_TOKENS, batch, BATCH_PROMPT)}
    return [known[name] for name in names]


def rows_of(case: Case, positions: range, vocabulary: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Random tokens, sequences and positions, int32 each, of the rows of a step: these positions of every sequence."""
    each = len(positions)
    rows = each * case.batch
    tokens = rng.integers(0, vocabulary, rows, np.int32)
    sequences = np.repeat(np.arange(case.batch, dtype=np.int32), each)
    return tokens, sequences, np.tile(np.arange(positions.start, positions.stop, dtype=np.int32), case.batch)
