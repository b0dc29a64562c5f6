"""What a layer takes on a device: every format of weights can be made up there, and timed."""

from types import SimpleNamespace

import pytest
from model_shapes import SHAPES

from llama_hpc.engine import speed
from llama_hpc.grid import GridShape
from llama_hpc.kernels import random_rows
from llama_hpc.kernels.cuda import random_weights
from llama_hpc.model.shares import TensorShare


@pytest.mark.parametrize("weights,kv_cache,ranks", [("q3_5", "f16", 1), ("q8", "q8", 8), ("f32", "f32", 1)])
def test_a_layer_is_timed(one_device, weights, kv_cache, ranks, monkeypatch):
    """Of a model's share, also of one without FFN."""
    monkeypatch.setattr(random_rows, "BANK", 1 << 16)
    monkeypatch.setattr(random_weights, "BANK_ROWS", 64)
    config = SHAPES["stories260K"]
    job = SimpleNamespace(checkpoint=SimpleNamespace(config=config), share=TensorShare.of(config, ranks, 0), weights=weights,
                          kv_cache=kv_cache, gpu=one_device, grid=SimpleNamespace(shape=GridShape(1, 3, ranks)))
    assert bool(job.share.ffn) == (ranks == 1)
    assert 0 < speed.layer_seconds(job) < 1
