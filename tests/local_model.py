"""A whole model in this process, for tests: logits of a token sequence, prefilled in chunks of any size."""

import numpy as np
from mpi4py import MPI

from llama_hpc.comm.reduce import TensorReducer
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.model.sizes import whole
from llama_hpc.model.transformer import Batch, TransformerStage
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.loader import load_stage
from llama_hpc.weights.places import DevicePlaces, HostPlaces


class LocalModel:
    """One sequence at a time on one rank, or on ``device`` (see ``kernels.cuda``)."""

    def __init__(self, path, weights_format="f32", max_seq_len=256, threads=1, kv_cache=None, device=None):
        checkpoint = open_checkpoint(path)
        self.config = checkpoint.config
        stage, share = whole(self.config)
        reducer = TensorReducer(MPI.COMM_SELF)
        sizes = {"sequences": 1, "max_seq_len": max_seq_len, "max_rows": max_seq_len, "max_outputs": max_seq_len}
        places = HostPlaces() if device is None else DevicePlaces(device)
        self.weights = load_stage(checkpoint, weights_format, stage, share, reducer, MPI.COMM_SELF, threads=threads,
                                  places=places)
        whose = self.config, stage, share, self.weights, reducer
        if device is None:
            self.stage = TransformerStage(*whose, shared_pool(threads), kv_cache=kv_cache, **sizes)
        else:
            from llama_hpc.model.device_cache import DTYPES, DeviceCache
            from llama_hpc.model.device_stage import DeviceStage
            cache = DeviceCache(device, stage.layers, self.config.kv_heads, self.config.head_dim, 1, max_seq_len,
                                DTYPES[kv_cache or self.weights.kv_cache])
            self.stage = DeviceStage(*whose, device, cache=cache, **sizes)

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
