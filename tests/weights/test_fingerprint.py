"""The content hash: it covers every byte, name and place, and does not depend on who hashes which piece."""

import hashlib

import pytest
from tiny_checkpoints import gguf_tensors, weights, write_folder, write_gguf

from llama_hpc.errors import CheckpointError
from llama_hpc.weights import fingerprint
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.fingerprint import chunk_list, combine, content_files, hash_chunk


def of(path):
    return combine(hash_chunk(chunk) for chunk in chunk_list(content_files(open_checkpoint(path))))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 100_000)


def test_chunks_cover_every_byte_once(tmp_path, small_chunks):
    sizes = {"a": 250_000, "b": 0, "c": 100_000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    chunks = chunk_list([tmp_path / name for name in sizes])
    assert [(c.path.name, c.offset, c.length) for c in chunks] == [
        ("a", 0, 100_000), ("a", 100_000, 100_000), ("a", 200_000, 50_000), ("b", 0, 0), ("c", 0, 100_000)]
    assert len(hash_chunk(chunks[0])) == 32
    assert len({hash_chunk(c) for c in chunks}) == len(chunks)


def test_format_is_fixed(tmp_path):
    (tmp_path / "é.bin").write_bytes(b"content")
    (chunk,) = chunk_list([tmp_path / "é.bin"])
    name = "é.bin".encode()
    inner = hashlib.sha256(b"%d %s 0 7\ncontent" % (len(name), name)).digest()
    assert hash_chunk(chunk) == inner
    assert combine([inner]) == hashlib.sha256(b"llama_hpc content 1\n" + inner).hexdigest()


def test_same_content_elsewhere_is_the_same(tmp_path, small_chunks):
    assert of(write_folder(tmp_path / "a", weights())) == of(write_folder(tmp_path / "b", weights()))


def test_every_change_shows(tmp_path, small_chunks):
    folder = write_folder(tmp_path, weights(), shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not part of the model")
    names = [file.name for file in content_files(open_checkpoint(folder))]
    assert names == ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                     "model.safetensors.index.json", "tokenizer.json"]
    seen = {of(folder)}
    (folder / "notes.txt").write_text("changed")
    assert of(folder) in seen
    shard = folder / names[2]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    seen.add(of(folder))
    (folder / "tokenizer.json").write_text("{ }")
    seen.add(of(folder))
    (folder / "generation_config.json").write_text("{}")
    seen.add(of(folder))
    assert len(seen) == 4


def test_gguf(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", gguf_tensors())
    assert content_files(open_checkpoint(path)) == [path]


def test_a_file_that_shrinks(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    (chunk,) = chunk_list([file])
    file.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="2 bytes fewer"):
        hash_chunk(chunk)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        hash_chunk(chunk)
    with pytest.raises(CheckpointError, match="cannot be read"):
        chunk_list([file])
