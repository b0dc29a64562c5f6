"""f32 models against Hugging Face transformers: every family, every RoPE scaling, windows, biases, norms."""

import os
from pathlib import Path

import numpy as np
import pytest
from local_model import LocalModel
from reference_gguf import GGUF_CASES, write_gguf
from reference_models import CASES, STORIES, reference, stories_folder, write_checkpoint

from llama_hpc.text import load_tokenizer

TOLERANCE = 1e-3                # of the range of the logits


def check(model, name):
    expected = reference(name)
    logits = model.forward(expected.prompt_ids)[expected.logits_positions]
    difference = np.abs(logits - expected.logits).max() / expected.logit_range
    assert difference <= TOLERANCE
    assert model.greedy(expected.prompt_ids, len(expected.greedy_ids)) == list(expected.greedy_ids)


@pytest.mark.parametrize("name", CASES)
def test_hugging_face_checkpoint(name, tmp_path):
    check(LocalModel(write_checkpoint(name, tmp_path), max_seq_len=128), name)


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_checkpoint(name, tmp_path):
    check(LocalModel(write_gguf(name, tmp_path / "model.gguf"), max_seq_len=128), name)


@pytest.mark.parametrize("name", STORIES)
def test_trained_model(name):
    folder = stories_folder(name)
    if folder is None:
        pytest.skip("LLAMA_HPC_TEST_DATA has no such model")
    check(LocalModel(folder), name)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_an_int8_cache_hardly_changes_the_distributions():
    """Mean KL divergence of the next token's from those with a float16 cache: about 0.0002 with f32 weights."""
    folder = stories_folder("stories15M")
    if folder is None:
        pytest.skip("LLAMA_HPC_TEST_DATA has no such model")
    text = Path(os.environ["LLAMA_HPC_TEST_DATA"], "texts", "tinystories_sample.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(folder).encode(text)[:256]
    half, int8 = (log_softmax(LocalModel(folder, kv_cache=kv_cache).forward(ids)) for kv_cache in ("f16", "q8"))
    divergence = (np.exp(half) * (half - int8)).sum(axis=1)
    assert 0 < divergence.mean() < 5e-4 and divergence.max() < 0.02


@pytest.mark.parametrize("chunk", [1, 7, 16])
@pytest.mark.parametrize("name", ["llama_odd", "mistral_window"])
def test_chunks_of_a_prompt_change_nothing_with_an_int8_cache(name, chunk, tmp_path):
    model = LocalModel(write_checkpoint(name, tmp_path), max_seq_len=128, kv_cache="q8")
    ids = reference(name).prompt_ids
    assert model.forward(ids, chunk=chunk).tobytes() == model.forward(ids).tobytes()


def test_the_operation_that_was_reached_last_is_named(tmp_path):
    model = LocalModel(write_checkpoint("llama_odd", tmp_path / "model"), "q8")
    assert model.stage.reached() == ""
    model.forward([1, 2, 3])
    assert model.stage.reached() == "totals behind head"
