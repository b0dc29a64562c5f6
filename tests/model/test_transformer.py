"""f32 models against Hugging Face transformers: every family, every RoPE scaling, windows, biases, norms."""

import numpy as np
import pytest
from local_model import LocalModel
from reference_gguf import GGUF_CASES, write_gguf
from reference_models import CASES, STORIES, reference, stories_folder, write_checkpoint

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
