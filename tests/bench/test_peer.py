"""llama.cpp as a peer: its tools' output and failures, with stand-ins; LLAMA_HPC_PEER names a real build folder."""

import os
from dataclasses import replace

import numpy as np
import pytest
from model_shapes import SHAPES

from llama_hpc.bench.peer import TOOLS, BenchmarkError, Peer, write_random_gguf
from llama_hpc.errors import UsageError
from llama_hpc.weights.checkpoint import open_checkpoint

# An eps that float32, which GGUF files hold, represents.
SMALL = replace(SHAPES["stories260K"], norm_eps=2**-17)
QUANTISE = 'for last; do kind=$last; done; shift; cp "$1" "$2"; echo "$kind" >> "$2"; echo made >> "$(dirname "$2")/log"'


@pytest.fixture
def build(tmp_path):
    """A function that makes a build folder whose tools run the given shell scripts."""
    def make(timeout=20.0, **scripts):
        (tmp_path / "build/bin").mkdir(parents=True)
        for tool in TOOLS:
            path = tmp_path / "build/bin" / tool
            path.write_text(f"#!/bin/sh\n{scripts.get(tool.removeprefix('llama-').replace('-', '_'), 'exit 0')}\n")
            path.chmod(0o755)
        return Peer(tmp_path / "build", timeout)
    return make


def test_decode_and_prefill(build):
    # The stand-in answers with a rate made of its own arguments, so a wrong one shows.
    peer = build(bench='echo "$*" >&2; test "$1" = -m -a "$3" = -t -a "$5" = -p -a "$7" = -n -a "$9" = -r || exit 1\n'
                       'echo "[{\\"model_filename\\": \\"$2\\", \\"avg_ns\\": 5, \\"avg_ts\\": $4$6$8.5}]"')
    assert peer.decode("m.gguf", 2, 64) == 2064.5
    assert peer.prefill("m.gguf", 3, 512) == 35120.5


def test_batched(build):
    peer = build(batched_bench='echo "$*" | grep -q -e "-c 1536 -npp 16 -ntg 32 -npl 32 -t 2 -tb 2" || exit 1\n'
                               'echo; echo \'{"pp": 16, "pl": 32, "speed_pp": 9.0, "speed_tg": 412.25}\'; echo')
    assert peer.batched("m.gguf", 2, batch=32, prompt=16, tokens=32) == 412.25


def test_requantised_once_for_each_model(build, tmp_path):
    peer, model, cache = build(quantize=QUANTISE), tmp_path / "model.gguf", tmp_path / "cache"
    model.write_bytes(b"one\n")
    first = peer.quantised(model, "Q4_0", cache)
    assert first.read_text() == "one\nQ4_0\n" and first.suffix == ".gguf"
    assert peer.quantised(model, "Q4_0", cache) == first
    assert peer.quantised(model, "IQ3_S", cache).read_text() == "one\nIQ3_S\n"
    model.write_bytes(b"another\n")
    assert peer.quantised(model, "Q4_0", cache).read_text() == "another\nQ4_0\n"
    assert (cache / "log").read_text() == "made\n" * 3


def test_missing_tools_are_named(build, tmp_path):
    build()
    (tmp_path / "build/bin/llama-bench").unlink()
    (tmp_path / "build/bin/llama-quantize").chmod(0o644)
    with pytest.raises(UsageError, match=r"build has no llama-bench, llama-quantize, nor has its bin/"):
        Peer(tmp_path / "build")


def test_bin_folder_itself(build, tmp_path):
    build(bench='echo \'[{"avg_ts": 1.5}]\'')
    assert Peer(tmp_path / "build/bin").decode("m.gguf", 1, 4) == 1.5


def test_failures_are_one_line(build, tmp_path):
    peer = build(bench="echo loading >&2; echo 'error: failed to load model' >&2; exit 3",
                 batched_bench="echo no room for the cache", quantize='echo half > "$3"; kill -9 $$')
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(BenchmarkError, match=r"llama-bench -m m.gguf .*: exit code 3: error: failed to load model$"):
        peer.decode("m.gguf", 1, 4)
    with pytest.raises(BenchmarkError, match=r"llama-batched-bench printed no speed_tg above 0, but 'no room for the cache'$"):
        peer.batched("m.gguf", 1, 2, 3, 4)
    with pytest.raises(BenchmarkError, match=r"llama-quantize .* Q4_0: exit code -9: no message$"):
        peer.quantised(tmp_path / "model.gguf", "Q4_0", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(UsageError, match=r"none.gguf: no such GGUF file"):
        peer.quantised(tmp_path / "none.gguf", "Q4_0", tmp_path / "cache")


@pytest.mark.parametrize("printed", ["[]", "{}", '[{"avg_ts": 0.0}]', '[{"avg_ts": NaN}]', '[{"avg_ts": null}]', "[1", ""])
def test_output_without_a_rate(build, printed):
    with pytest.raises(BenchmarkError, match="printed no avg_ts above 0"):
        build(bench=f"echo '{printed}'").prefill("m.gguf", 1, 4)


def test_a_tool_that_hangs_is_ended(build):
    with pytest.raises(BenchmarkError, match=r"llama-bench .*: not finished after 0.2 s$"):
        build(timeout=0.2, bench="exec sleep 60").decode("m.gguf", 1, 4)


@pytest.mark.parametrize("kind, config", [
    ("f16", SMALL), ("f32", replace(SMALL, tie_embeddings=False, output_bias=True, mlp_bias=True)),
    ("q8_0", replace(SMALL, family="qwen2", attention_bias=True)), ("q4_0", replace(SMALL, family="qwen3", qk_norm=True)),
])
def test_random_model_has_the_shapes(tmp_path, kind, config):
    checkpoint = open_checkpoint(write_random_gguf(config, tmp_path / "random.gguf", kind))
    assert checkpoint.config == config
    assert checkpoint.dtype("layers.4.gate") == kind.upper()
    # Rows of 172 are no whole number of blocks of 32.
    assert checkpoint.dtype("layers.4.down") == (kind.upper() if kind == "f32" else "F16")
    assert abs(checkpoint.read("layers.0.gate").std() - 0.02) < 0.001
    np.testing.assert_array_equal(checkpoint.read("final_norm"), np.ones(64, np.float32))
    if config.attention_bias:
        np.testing.assert_array_equal(checkpoint.read("layers.1.k_bias"), np.zeros(32, np.float32))


def test_random_models_that_cannot_be_written(tmp_path):
    for kind in ("iq3_s", "q9"):
        with pytest.raises(UsageError, match=f"no random GGUF file of type {kind}"):
            write_random_gguf(SMALL, tmp_path / "random.gguf", kind)
    with pytest.raises(UsageError, match="8 experts"):
        write_random_gguf(replace(SMALL, num_experts=8), tmp_path / "random.gguf")
    assert not (tmp_path / "random.gguf").exists()


@pytest.mark.skipif("LLAMA_HPC_PEER" not in os.environ, reason="LLAMA_HPC_PEER names no build folder of llama.cpp")
@pytest.mark.parametrize("family, more", [("llama", {"tie_embeddings": False}), ("qwen3", {"qk_norm": True})])
def test_real_tools(tmp_path, family, more):
    peer = Peer(os.environ["LLAMA_HPC_PEER"], timeout=120)
    config = replace(SMALL, family=family, hidden_size=256, head_dim=32, intermediate_size=512, num_layers=2, **more)
    model = write_random_gguf(config, tmp_path / "random.gguf")
    small = peer.quantised(model, "Q3_K_S", tmp_path)
    assert small.stat().st_size < 0.5 * model.stat().st_size
    for path in (model, small):
        assert min(peer.decode(path, 1, 4), peer.prefill(path, 2, 32), peer.batched(path, 2, 4, 8, 4)) > 0
    with pytest.raises(BenchmarkError, match="llama-bench"):
        peer.decode(tmp_path / "none.gguf", 1, 4)
