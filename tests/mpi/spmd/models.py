"""Small checkpoints for the SPMD tests, and models of them cut for any grid."""

from pathlib import Path

import numpy as np
from reference_models import write_checkpoint, write_random_llama

from llama_hpc.comm.choose import tensor_reducer
from llama_hpc.comm.pipeline import StageChannel
from llama_hpc.comm.shared import CombinedReducer
from llama_hpc.engine.logits import LogitsGather
from llama_hpc.grid import Grid, GridShape
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.sampling import weigh
from llama_hpc.model.shares import TensorShare, stage_shares
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.loader import load_stage

# Eight layers for eight stages; 9 query heads over 3 KV heads straddle them; 4 FFN blocks leave ranks without one.
DEEP = {"hidden": 72, "ffn": 100, "layers": 8, "heads": 9, "kv_heads": 3, "vocab": 515}
FORMATS = ("f32", "q8", "q3_5")

# Model and weights format. smollm: tied, straddled KV heads; llama_odd: FFN 172, vocabulary 515, three files; llama_biases: a
# bias on every projection; qwen3: norms of q and k; mistral_window: a window shorter than the text.
CASES = (*(("deep", weights_format) for weights_format in FORMATS), ("smollm", "q8"), ("smollm", "q3_5"), ("llama_odd", "f32"),
         ("llama_odd", "q3_5"), ("llama_biases", "q8"), ("qwen3", "q8"), ("mistral_window", "f32"))  # fmt: skip


def write_models(folder: Path) -> Path:
    """Writes the models of `CASES`, each a folder of its name."""
    for name in {name for name, _ in CASES} - {"deep"}:
        write_checkpoint(name, folder / name)
    write_random_llama(folder / "deep", **DEEP, seed=7)
    return folder


def factorisations(n: int) -> list[GridShape]:
    """Every grid of n ranks."""
    return [GridShape(d, p, n // d // p) for d in range(1, n + 1) if n % d == 0 for p in range(1, n // d + 1) if n // d % p == 0]


def fits(config, shape: GridShape) -> bool:
    return shape.tensor <= config.num_heads and shape.pipeline <= config.num_layers


def reducer_of(comm, mode: str):
    """A reducer of a mode; ``combined`` takes two ranks each for those of a node."""
    if mode == "combined" and comm.size > 1:
        return CombinedReducer(comm, comm.Split(comm.rank // 2, comm.rank), crowded=True)
    return tensor_reducer(comm, mode, crowded=True)


class GridModel:
    """One replica of a model on all ranks of ``comm``: the logits of whole batches, on the leader."""

    def __init__(self, folder: Path, weights_format: str, comm, pipeline: int, tensor: int, *, sequences=1,
                 max_rows=64, threads=1, hashes=None, reduce="auto", spread_from=0, overlap_from=0,
                 context=1, max_seq_len=64):
        checkpoint = open_checkpoint(folder)
        self.config = checkpoint.config
        self.grid = Grid.create(comm, GridShape(1, pipeline, tensor))
        share = TensorShare.of(self.config, tensor, self.grid.tensor_index, context)
        part = stage_shares(self.config, pipeline)[self.grid.stage]
        reducer = reducer_of(self.grid.tensor_comm, reduce)
        group = reducer_of(self.grid.tensor_comm.Split(self.grid.tensor_index // context), reduce)
        weights = load_stage(checkpoint, weights_format, part, share, reducer, self.grid.stage_comm, threads=threads,
                             hashes=hashes)
        self.stage = TransformerStage(self.config, part, share, weights, reducer, shared_pool(threads), sequences=sequences,
                                      max_seq_len=max_seq_len, max_rows=max_rows, max_outputs=max_rows, spread_from=spread_from,
                                      overlap_from=overlap_from, context=group)
        reducer.reset()
        self.channel = StageChannel(self.grid.pipeline_comm, 1, max_rows, self.config.hidden_size)
        self.gather = LogitsGather(self.grid.tensor_comm, self.stage) if self.grid.last_stage else None

    def forward(self, batch: Batch) -> np.ndarray | None:
        """float32 [outputs, vocab_size] on the leader, None elsewhere. Collective."""
        stage = self.stage
        stage.faults.merge(self.channel.receive(stage.residual, batch.rows))
        stage.forward(batch)
        self.channel.send(stage.residual, batch.rows, stage.faults.code)
        assert stage.faults.code == 0
        if self.gather is None:
            return None
        assert self.gather.fault() == 0
        logits = self.gather.rows(list(range(len(batch.outputs))))
        self.check_likeliest(logits, len(batch.outputs))
        return logits.copy() if self.grid.is_leader else None


    def check_likeliest(self, logits: np.ndarray, count: int) -> None:
        """What every rank of the last stage knows without the rows: the first largest logit, and the sum of weights."""
        tokens, largest, totals = self.grid.tensor_comm.bcast(self.gather.likeliest(count))
        for found, part in zip((tokens, largest, totals), self.gather.likeliest(count), strict=True):
            assert np.array_equal(found, part)
        if self.grid.is_leader:
            assert np.array_equal(tokens, np.argmax(logits, axis=1)) and np.array_equal(largest, logits.max(axis=1))
            assert totals.tolist() == [weigh(row, np.empty(row.shape, np.int64))[1] for row in logits]


def batch_of(pieces: list[tuple[int, int, np.ndarray]]) -> Batch:
    """A batch of (sequence, position of the first token, token ids) with logits after every token."""
    tokens = np.concatenate([ids for _, _, ids in pieces]).astype(np.int32)
    sequences = np.concatenate([np.full(len(ids), sequence) for sequence, _, ids in pieces]).astype(np.int32)
    positions = np.concatenate([np.arange(start, start + len(ids)) for _, start, ids in pieces]).astype(np.int32)
    return Batch(len(tokens), tokens, sequences, positions, np.arange(len(tokens)))
