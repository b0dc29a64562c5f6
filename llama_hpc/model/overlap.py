"""Computing and communicating at once: a step is cut in two halves, and while sums of one travel, the other is computed.

Known as dual-batch overlap (DeepSeek-V3, 2024, section 3.2.3) and as micro-batch overlap.
"""

from dataclasses import replace

from llama_hpc.model.layer import ParallelLayer
from llama_hpc.model.steps import Steps


class OverlappedSteps:
    """Steps of a ``TransformerStage`` with at least two rows. Making one, and ``run``, are collective over the tensor group.

    Rows of a sequence ascend, so of each layer the first half has stored its keys and values when the second attends to them.
    ``second``: buffers for half of the rows.
    """

    def __init__(self, stage, second, make_steps):
        self._first, self._second = stage.buffers, second
        self.steps = self._before, self._after, *self._halves = [make_steps() for _ in range(4)]
        if stage.stage.first:
            stage.add_embedding(self._before)
        for steps, buffers in zip(self._halves, (self._first, second), strict=True):
            for layer in stage.layers:
                ParallelLayer(layer.layer, layer.weights, buffers).add(steps)
        if stage.stage.last:
            stage.add_head(self._after)

    def run(self, batch) -> None:
        """One step on the residual of the first buffers, on which the whole ends too."""
        cut = (batch.rows + 1) // 2
        residual, (first, second) = self._first.residual, _cut(batch, cut)
        self._first.load(batch, self._before)
        self._after.counts[:] = self._before.counts
        self._before.run()
        self._first.load(first, self._halves[0])
        self._second.load(second, self._halves[1])
        self._second.residual[: second.rows] = residual[cut : batch.rows]
        Steps.run_in_turns(*self._halves)
        residual[cut : batch.rows] = self._second.residual[: second.rows]
        self._after.run()


def _cut(batch, cut: int):
    """The rows before and behind a row, without outputs."""
    for rows in (slice(0, cut), slice(cut, batch.rows)):
        yield replace(batch, rows=rows.stop - rows.start, tokens=batch.tokens[rows], sequences=batch.sequences[rows],
                      positions=batch.positions[rows], outputs=batch.outputs[:0])
