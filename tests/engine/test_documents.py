"""Documents to be scored: what a file may hold, and which window scores which token."""

import h5py
import numpy as np
import pytest

from llama_hpc.engine.documents import ReadyDocument, Window, read_documents, windows_of
from llama_hpc.errors import UsageError


def documents(*lengths):
    return [ReadyDocument(str(i), np.arange(length, dtype=np.int32)) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (2, 2), (5, 1), (5, 3), (8, 4), (8, 8), (100, 50)])
def test_windows_are_those_of_the_recipe(window, stride):
    """Against a plain form of transformers' loop: its targets, less the first of a window, which its shift loses."""
    for length in range(2, 40):
        expected, end_before = {}, 0
        for begin in range(0, length, stride):
            end = min(begin + window, length)
            expected |= {token: (begin, end) for token in range(begin, end)[-(end - end_before) :] if token > begin}
            end_before = end
            if end == length:
                break
        found = windows_of(documents(7, length), window, stride)
        scored = {token: (w.start, w.stop) for w in found if w.document == 1 for token in range(w.first, w.stop)}
        assert scored == expected
        assert sum(w.scored for w in found if w.document == 1) == len(expected)
        assert all(1 <= w.scored <= w.rows < window for w in found)


def test_a_stride_as_long_as_the_window_cuts_a_text_into_pieces():
    assert windows_of(documents(9), 4, 4) == [Window(0, 0, 4, 1), Window(0, 4, 8, 5)]
    assert windows_of(documents(10), 4, 4)[-1] == Window(0, 8, 10, 9)


def test_files(tmp_path):
    texts, ids = ["one\r\ntwo\u2028", "three"], [[1, 2], [3, 4, 5]]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode())
    (document,) = read_documents(tmp_path / "a.txt")
    assert (document.id, document.text) == ("0", texts[0])
    (tmp_path / "a.jsonl").write_text('{"text": "three", "meta": {"top_k": 1}}\n\n{"id": "x", "token_ids": [1, 2]}\n')
    first, second = read_documents(tmp_path / "a.jsonl")
    assert (first.id, first.text, second.id, second.token_ids) == ("0", "three", "x", [1, 2])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("documents")
        group["id"], group["tokens"], group["offsets"] = ["a", "b"], np.concatenate(ids), [0, 2, 5]
    assert [(d.id, d.token_ids) for d in read_documents(tmp_path / "a.h5")] == [("a", ids[0]), ("b", ids[1])]
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["text"] = texts
    assert [(d.id, d.text) for d in read_documents(tmp_path / "b.h5")] == [("0", texts[0]), ("1", texts[1])]


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": ""}', "line 1: the text is empty"), ('{"text": 3}', "text must be a string, got 3"),
    ('{"id": "a"}', "exactly one of text, token_ids, got none"), ('{"text": "a", "token_ids": [1, 2]}', "got both"),
    ('{"id": 3, "text": "a"}', "id must be a string"), ('{"token_ids": []}', "at least one token id"),
    ('{"text": "\\ud800"}', "surrogate"), ('{"text": "a"}\n{"id": "0", "text": "b"}', "line 2: id '0' is already used by line 1"),
    ("", "the file holds no texts"), ("[1]", "must be one JSON object"),
])
def test_what_is_refused(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)
