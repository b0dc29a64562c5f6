"""A whole model in this process, for tests: logits of a token sequence, prefilled in chunks of any size."""

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.model.sizes import whole
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.loader import load_stage


class LocalModel:
    """One sequence at a time on one rank."""

    def __init__(self, path, weights_format="f32", max_seq_len=256, threads=1, kv_cache=None):
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        stage, share = whole(self.config)
        reducer = TensorReducer(MPI.COMM_SELF)
        self.weights = load_stage(checkpoint, weights_format, stage, share, reducer, MPI.COMM_SELF, threads=threads)
        self.stage = TransformerStage(self.config, stage, share, self.weights, reducer, shared_pool(threads), sequences=1,
                                      max_seq_len=max_seq_len, max_rows=max_seq_len, max_outputs=max_seq_len, kv_cache=kv_cache)

    def forward(self, ids, start=0, chunk=None):
        """float32 [n, vocab_size] logits of ids, which follow ``start`` tokens already seen; prefilled ``chunk`` at a time."""
        logits = []
        chunk = chunk or len(ids)
        for first in range(0, len(ids), chunk):
            part = np.array(ids[first : first + chunk], np.int32)
            n = len(part)
            positions = np.arange(start + first, start + first + n, dtype=np.int32)
            self.stage.forward(Batch(n, part, np.zeros(n, np.int32), positions, np.arange(n)))
            assert self.stage.faults.code == 0
            logits.append(self.stage.logits[:n].copy())
        return np.concatenate(logits)

    def greedy(self, prompt, count):
        """``count`` greedy tokens after a prompt."""
        logits, tokens = self.forward(prompt)[-1], []
        for i in range(count):
            tokens.append(int(np.argmax(logits)))
            logits = self.forward([tokens[-1]], len(prompt) + i)[-1]
        return tokens
