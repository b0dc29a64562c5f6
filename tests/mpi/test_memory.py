"""A rank's memory is its share of the weights and little more: no rank holds what others hold."""

import pytest
from memory import measure
from reference_models import write_random_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "model"
    write_random_llama(folder, hidden=1024, ffn=2816, layers=12, heads=16, kv_heads=4, vocab=32000)
    return folder


@pytest.mark.parametrize("grid", ["1x1x1", "1x1x2", "1x2x2"])
def test_peak_is_share(checkpoint, grid, tmp_path):
    for share, peak, allowed in measure(checkpoint, grid, "f32", tmp_path):
        assert share < peak <= allowed
