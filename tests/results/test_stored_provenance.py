"""Provenance: what is given comes back, and is legible without this package."""

from pathlib import Path

import h5py
import numpy as np

from llama_hpc.results.provenance import load, store

NESTED = {
    "command": "llama-hpc run x" + "y" * 100_000,
    "model": {"path": "/models/é", "hash": "ab", "layers": 30, "tied": True, "eps": 1e-5},
    "hosts": ["n1", "n2"],
    "sizes": [1, 2, 3],
    "times": [0.5, 2.0],
    "seed": 2**64 - 1,
    "ranks": [{"rank": 0, "host": "n1"}, {"rank": 1, "host": None}],
    "mixed": [1, "a", 2.5, None],
    "huge": 10**30,
    "empty": "",
    "no_items": [],
    "nothing": {},
    "files": {"a/b.gguf": "ff", ".": 1, "": 2},
    "settings": {"sampling": {"stop": [], "top_k": 0}},
}


def test_round_trip(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        store(file, NESTED)
        assert load(file) == NESTED


def test_legible_with_plain_h5py(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        store(file, NESTED)
        assert file["model"].attrs["path"] == "/models/é" and file.attrs["seed"] == 2**64 - 1
        assert file["hosts"].asstr()[:].tolist() == ["n1", "n2"]
        assert file["ranks"].asstr()[()].startswith('[{"rank": 0')


def test_other_types(tmp_path):
    given = {"none": None, "path": Path("/a"), "f": np.float32(0.5), "i": np.int64(3), "a": np.arange(2), "t": ("x",)}
    given[5] = "k"
    with h5py.File(tmp_path / "p.h5", "w") as file:
        store(file, given)
        assert load(file) == {"path": "/a", "f": 0.5, "i": 3, "a": [0, 1], "t": ["x"], "5": "k"}
