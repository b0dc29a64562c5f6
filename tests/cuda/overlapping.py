"""A stage of a pipeline on a device alone, and steps that begin before the ones before them are finished."""

from types import SimpleNamespace

import numpy as np

from llama_hpc.bench.device_model import random_weights
from llama_hpc.model.device_cache import DTYPES, DeviceCache
from llama_hpc.model.device_stage import DeviceStage
from llama_hpc.model.shares import StageShare, TensorShare
from llama_hpc.model.wanted import NOTHING
from llama_hpc.model.whole_model import Alone


def stage_of(device, config, ends, weights_format, sequences, rows):
    """A stage of all layers, with or without embedding and head, and room for ``sequences``."""
    share = TensorShare.of(config, 1, 0)
    cache = DeviceCache(device, range(config.num_layers), config.kv_heads, config.head_dim, sequences, config.context_length,
                        DTYPES["f16"])
    return DeviceStage(config, StageShare(range(config.num_layers), *ends), share, random_weights(config, weights_format, device),
                       Alone(), device, sequences=sequences, max_seq_len=config.context_length, max_rows=rows, max_outputs=rows,
                       cache=cache)


def steps_of(config, micro_batches, rows, count):
    """Batches in turn, of ``micro_batches`` times ``rows`` sequences each, at ``count`` positions; and residuals for them."""
    rng = np.random.default_rng(0)
    for position in range(count):
        for first in range(0, micro_batches * rows, rows):
            batch = SimpleNamespace(rows=rows, tokens=rng.integers(0, config.vocab_size, rows).astype(np.int32),
                                    sequences=np.arange(first, first + rows, dtype=np.int32),
                                    positions=np.full(rows, position, np.int32), outputs=np.arange(rows))
            yield batch, rng.standard_normal((rows, config.hidden_size), np.float32)


def run(stage, steps, ahead, keep=lambda: None, wanted=NOTHING):
    """All steps, ``ahead`` of which have begun when one is finished; what ``keep()`` returns behind each."""
    found, begun = [], 0
    for batch, residual in steps:
        if not stage.stage.first:
            stage.incoming[: batch.rows] = residual
        stage.begin(batch, wanted)
        begun += 1
        if begun > ahead:
            stage.finish()
            begun -= 1
            found.append(keep())
    for _ in range(begun):
        stage.finish()
        found.append(keep())
    return found
