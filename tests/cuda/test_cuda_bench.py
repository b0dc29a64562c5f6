"""``llama-hpc bench --device gpu`` on an emulated GPU: tables, files, and figures that add up."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from emulated_device import EmulatedDevice, missing
from model_shapes import SHAPES as SMALL_SHAPES

from llama_hpc.bench import cublas, device_attention, device_commands, device_probes, device_products
from llama_hpc.bench.cases import Case
from llama_hpc.bench.device_model import DeviceModel, random_weights
from llama_hpc.bench.shapes import SHAPES
from llama_hpc.cli.main import main
from llama_hpc.errors import NumericsError
from llama_hpc.kernels.cuda import random_weights as cuda_weights
from llama_hpc.kernels.cuda.device import DeviceFacts
from llama_hpc.kernels.cuda.weights import lay_out
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.random_rows import RandomRows
from llama_hpc.runtime.devices import Sight

TINY = replace(SMALL_SHAPES["stories260K"], num_layers=1)


@pytest.fixture
def small(monkeypatch):
    """An emulated GPU that is found, and work that suits it."""
    if why := missing():
        pytest.skip(why)
    for module, name, value in ((device_probes, "STEPS", 4), (device_probes, "COPY_BYTES", 1 << 16),
                                (device_probes, "LEAST_SECONDS", 0), (device_attention, "POSITIONS", 40),
                                (device_attention, "SHAPES", {"tiny": (2, 1, 16)}), (cuda_weights, "BANK_ROWS", 64),
                                (device_attention, "WORK", ((1, 1), (2, 1), (1, 20)))):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    facts = DeviceFacts(0, "emulated", 1 << 30, 90, "bus", "gpu")
    monkeypatch.setattr(device_commands, "look", lambda option: Sight((facts,)))
    monkeypatch.setattr(device_commands, "open_device", lambda choice: EmulatedDevice())


def bench(tmp_path, capsys, *options):
    output = tmp_path / "bench"
    assert main(["bench", *options, "--device", "gpu", "--rounds", "1", "--output", str(output)]) == 0
    with h5py.File(output.with_suffix(".h5")) as file:
        tables = {name: dataset[:] for name, dataset in file.items()}
    return capsys.readouterr().out.splitlines(), json.loads(output.with_suffix(".json").read_text()), tables


def test_kernels(small, tmp_path, capsys):
    lines, report, tables = bench(tmp_path, capsys, "kernels", "--weights", "q3_5", "f16", "--shapes", "64x80", "--tokens", "1",
                                  "3")
    assert report["device"] == "emulated" and report["copy_bandwidth"] > 0 and report["multiply_add_peak"] > 0
    found = report["device_products"]
    assert [(r["weights"], r["tokens"]) for r in found] == [("q3_5", 1), ("q3_5", 3), ("f16", 1), ("f16", 3)]
    for result in found:
        assert result["operations_per_second"] * result["seconds"] == pytest.approx(2 * 64 * 80 * result["tokens"])
        assert result["target"] == result["bf16_share"] == 0
    attention = report["device_attention"]
    assert [(r["case"], r["batch"], r["tokens"]) for r in attention] == [("decode", 1, 1), ("decode", 2, 1), ("prefill", 1, 20)]
    assert attention[0]["gigabytes_per_second"] * 1e9 * attention[0]["seconds"] == pytest.approx(40 * 2 * 16 * 2)
    visible = sum(range(21, 41))
    assert attention[2]["operations_per_second"] * attention[2]["seconds"] == pytest.approx(4 * visible * 2 * 16)
    assert tables["device_attention"]["seconds"].tolist() == [r["seconds"] for r in attention]
    assert sum(line.startswith("q3_5") for line in lines) == 2


def test_model(small, tmp_path, capsys):
    lines, report, _ = bench(tmp_path, capsys, "model", "--shape", "tiny", "--weights", "q8", "--tokens", "3", "--prompt", "5",
                             "--batch", "2", "--cases", "decode", "prefill")
    found = report["device_models"]
    assert [r["case"] for r in found] == ["decode 3", "prefill 5"]
    assert [r["tokens_per_second"] * r["seconds"] for r in found] == pytest.approx([3, 5])
    assert found[0]["target"] == 0.6 and found[1]["target"] == 0
    assert any(line.startswith("tiny, 1 layers, q8") for line in lines)


def test_a_model_adds_up_its_work(small):
    device = EmulatedDevice()
    config = replace(TINY, attention_bias=True, qk_norm=True)
    weights = random_weights(config, "q4", device)
    case = Case("decode", 3)
    model = DeviceModel("tiny", "q4", config, weights, device, None, [case], "f32")
    # Keys and values of 1, 2 and 3 positions; rows of the value pool are padded to 16 columns.
    cache = (1 + 2 + 3) * config.kv_heads * 4 * (config.head_dim + -(-config.head_dim // 16) * 16)
    attention, mlp = weights.layers[0].attention, weights.layers[0].mlp
    layer = [x.weights for x in (attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down)]
    head = weights.head.weights
    parameters = sum(w.rows * w.blocks.size for w in (*layer, head))
    assert model._work(case) == (3 * (sum(w.nbytes for w in layer) + head.nbytes) + cache, 3 * 2 * parameters)
    device.synchronize()
    weights.layers[0].mlp.up.weights.row_scales[:] = 1e30
    with pytest.raises(NumericsError, match="layer 0"):
        model.seconds(case)


@pytest.mark.parametrize("weights_format", ["q3_5", "q4", "q8", "f16", "f32"])
def test_random_weights_repeat_whole_tiles(small, weights_format):
    blocks, device = Blocks(300, 256), EmulatedDevice()
    made = cuda_weights.RandomDeviceWeights(device).matrix(weights_format, 100, blocks)
    device.synchronize()
    rows = RandomRows().rows(weights_format, 64, blocks)
    expected = lay_out(rows, blocks)
    size = expected.data.size // 2
    assert np.array_equal(made.data.reshape(-1, size), expected.data.reshape(-1, size)[[0, 1, 0, 1]])
    assert made.rows == 100 and made.tiles == 4 and made.tile_bytes == size
    if made.row_scales is not None:
        assert made.row_scales.shape == (128,) and made.row_scales[:100].all() and not made.row_scales[100:].any()


def test_targets():
    assert [device_products.target_of(*x) for x in ((1, 1 << 20, False), (1, 1 << 26, False), (256, 1 << 26, True),
                                                    (1024, 1 << 20, True), (1024, 1 << 20, False))] == [0, 0.8, 0, 0.5, 0]
    assert [device_probes.verdict(*x) for x in ((0.5, 0.5), (0.4, 0.5), (0.4, 0))] == ["REACHED", "MISSED", ""]


def test_cublas_may_be_absent(small):
    assert cublas.operations_per_second(EmulatedDevice(), "bf16", 64, 32, 16, lambda: None) == 0


@pytest.mark.parametrize("arguments, text", [
    (["kernels", "--threads", "2"], "--threads is for --device cpu"),
    (["kernels", "--compare"], "--compare is for --device cpu"),
    (["model", "smollm2"], "give --shape"),
    (["kernels"], "--device gpu on "),
])
def test_what_cannot_be_done(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device_commands, "look", lambda option: Sight(why="no NVIDIA driver"))
    assert main(["bench", *arguments, "--device", "gpu"]) in (1, 2)
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())
