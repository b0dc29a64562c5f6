"""A whole model on a device gives the bits of the same model on the host."""

import numpy as np
import pytest
from local_model import LocalModel
from reference_models import CASES, prompt, write_checkpoint

from llama_hpc.errors import DeviceUnavailable
from llama_hpc.kernels.cuda.device import DeviceError

FORMATS = ("q3_5", "q8", "q4", "f16", "f32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a case, made once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = write_checkpoint(case, tmp_path_factory.mktemp("model") / "model")
        return made[case]
    return get


def compare(path, ids, device, **options):
    """Prefill in uneven chunks, then token by token: all logits, the largest ones and the sums of weights."""
    host, other = (LocalModel(path, max_seq_len=64, device=where, **options) for where in (None, device))
    for first, stop in ((0, 9), (9, 16), (16, 17), (17, 18)):
        logits = [model.forward(ids[first:stop], first) for model in (host, other)]
        assert logits[0].tobytes() == logits[1].tobytes(), (first, stop)
        found = [(m.stage.best[: stop - first].copy(), m.stage.totals[: stop - first].copy()) for m in (host, other)]
        assert all(map(np.array_equal, *found))
    return other.stage


@pytest.mark.parametrize("weights_format", FORMATS)
def test_formats(one_device, checkpoint, weights_format):
    ids = [int(i) for i in prompt("llama_odd")] * 3
    stage = compare(checkpoint("llama_odd"), ids, one_device, weights_format=weights_format)
    assert stage.replayed_steps == 4


def test_a_device_that_is_lost_is_told(one_device, checkpoint, monkeypatch):
    model = LocalModel(checkpoint("llama_odd"), "q8", max_seq_len=64, device=one_device)
    model.forward([1, 2])

    def lost(event):
        raise DeviceError("GPU 0, made up, was lost: bus error")
    monkeypatch.setattr(one_device, "wait", lost)
    with pytest.raises(DeviceUnavailable, match="GPU 0, made up, was lost: bus error; --resume goes on"):
        model.forward([3], 2)


@pytest.mark.parametrize("case", [case for case in CASES if case != "llama_odd"])
def test_families(one_device, checkpoint, case):
    compare(checkpoint(case), [int(i) for i in prompt(case)] * 3, one_device, weights_format="q8", kv_cache="q8")
