"""Prompts files: every kind that is read, and one clear line for everything that is wrong with them."""

import json

import h5py
import numpy as np
import pytest

from llama_hpc.engine.requests import Request, check_token_ids, read_requests
from llama_hpc.engine.sampling_params import SamplingParams
from llama_hpc.errors import UsageError
from llama_hpc.results import write_results

DEFAULTS = SamplingParams(seed=5, max_tokens=16)


@pytest.fixture
def save(tmp_path):
    def write(content, name="prompts.jsonl"):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(entry) + "\n" for entry in content)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return write


def fails(path, *parts):
    """The one-line message of the UsageError, which must hold the file and every part given."""
    with pytest.raises(UsageError) as caught:
        read_requests(path, DEFAULTS)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message
    return message


def test_jsonl(save):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi", "name": "x"}]
    path = save(
        [
            {"id": "a", "prompt": " Hello\u2028world\u0000 ", "temperature": 0.5, "top_k": 3, "category": "greeting"},
            {"prompt": None, "messages": messages, "sampling": {"max_tokens": 4, "stop": "END"}},
            {"id": "c", "token_ids": [0, 5], "seed": None},
        ]
    )
    first, second, third = read_requests(path, DEFAULTS)
    warm = SamplingParams(temperature=0.5, top_k=3, seed=5, max_tokens=16)
    assert first == Request(0, "a", " Hello\u2028world\0 ", None, None, warm)
    assert second == Request(1, "1", None, messages, None, SamplingParams(seed=5, max_tokens=4, stop=("END",)))
    assert third == Request(2, "c", None, None, [0, 5], DEFAULTS)


def test_blank_lines_count_and_bom_and_crlf_do_not_matter(save):
    path = save('\ufeff{"prompt": "a\u2028"}\r\n\r\n  \n{"prompt": "b"}'.encode(), "p.JSONL")
    assert [(r.index, r.id) for r in read_requests(path, DEFAULTS)] == [(0, "0"), (1, "3")]


def test_text(save):
    path = save("Once upon a time\r\n  indented \u2028 é\n\n", "p.txt")
    requests = read_requests(path, DEFAULTS)
    assert [(r.id, r.prompt) for r in requests] == [("0", "Once upon a time"), ("1", "  indented \u2028 é")]
    assert requests[0].params == DEFAULTS


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({}, "exactly one of prompt, messages, token_ids, got none"),
        ({"prompt": "a", "token_ids": [1]}, "got prompt and token_ids"),
        ({"prompt": ""}, "empty"),
        ({"prompt": 5}, "prompt must be a string, got 5"),
        ({"prompt": "x\ud800"}, "surrogate"),
        ({"id": 7, "prompt": "a"}, "id must be a string, got 7"),
        ({"id": None, "prompt": "a"}, "id must be a string, got None"),
        ({"id": "a\0", "prompt": "a"}, "NUL"),
        ({"id": "\udfff", "prompt": "a"}, "surrogate"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": ["hi"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a string 'content', got None"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": 1, "content": "a"}]}, "messages[1] needs a string"),
        ({"messages": [{"role": "", "content": "a"}]}, "empty role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a string 'content'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"token_ids": []}, "at least one token id"),
        ({"token_ids": "12"}, "at least one token id"),
        ({"token_ids": [1, -2]}, "token_ids[1] must be an integer from 0 to 2147483647, got -2"),
        ({"token_ids": [1.0]}, "token_ids[0] must be"),
        ({"token_ids": [True]}, "token_ids[0] must be"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a finite number, 0 or more, got -1"),
        ({"prompt": "a", "top_p": float("nan")}, "top_p must be"),
        ({"prompt": "a", "sampling": {"tmp": 1}}, "unknown sampling setting 'tmp': allowed are temperature"),
        ({"prompt": "a", "sampling": 3}, "sampling must be an object"),
        ({"prompt": "a", "seed": 1, "sampling": {"seed": 2}}, "seed is given at the top level and in sampling"),
        ({"prompt": "a", "temprature": 1}, "'temprature' looks like the setting 'temperature'"),
        ({"prompt": "a", "max_tokns": 1}, "'max_tokens'"),
        ({"prompt": "a", "topK": 1}, "'top_k'"),
        ({"prompt": "a", "typical_p": 0.1}, "'typical_p' is not a setting here: allowed are temperature"),
        ({"prompt": "a", "best_of": 2}, "'best_of' is not a setting here"),
        ({"prompt": "a", "n_predict": 9}, "'n_predict' is not a setting here: use max_tokens"),
        ({"prompt": "a", "temp": 1}, "'temp' is not a setting here: use temperature"),
        ({"prompt": "a", "repeat_penalty": 1.1}, "'repeat_penalty' is not a setting here: use repetition_penalty"),
        ({"prompt": "a", "repetition_penatly": 1.1}, "looks like the setting 'repetition_penalty'"),
        ({"prompt": "a", "min_tokens": 9, "sampling": {"max_tokens": 8}}, "min_tokens must be at most max_tokens, 8, got 9"),
        (["prompt"], "each line must be one JSON object"),
        ("prompt", "each line must be one JSON object"),
    ],
)
def test_a_bad_entry_is_named_with_its_line(save, entry, part):
    fails(save([{"prompt": "fine"}, entry]), "line 2", part)


def test_metadata_is_ignored(save):
    keys = ["question_id", "category", "turns", "reference", "answer", "n", "text", "model", "prompt_id", "step"]
    assert len(read_requests(save([{"prompt": "a", **dict.fromkeys(keys, 1)}]), DEFAULTS)) == 1


@pytest.mark.parametrize(
    "line", ['{"prompt": "a"', "prompt", "[" * 100000, '{"n": ' + "9" * 5000 + "}", '{"prompt": "a\tb"}']
)
def test_invalid_json_is_named_with_its_line(save, line):
    fails(save('\n{"prompt": "ok"}\n' + line), "line 3", "invalid JSON")


def test_duplicate_ids_name_both_lines(save):
    fails(save([{"id": "x", "prompt": "a"}, {"prompt": "b"}, {"id": "x", "prompt": "c"}]), "line 3", "'x'", "line 1")
    fails(save([{"prompt": "a"}, {"id": "0", "prompt": "b"}]), "line 2", "'0'", "line 1")


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_not_utf8(save, name):
    good = b'{"prompt": "a"}\n'
    fails(save(good + b'{"prompt": "caf\xe9"}\n', name), "line 2", "not UTF-8", "0xe9")
    fails(save('{"prompt": "a"}'.encode("utf-16"), name), "line 1", "not UTF-8")


def test_text_problems(save):
    fails(save("a\n\nb\n", "p.txt"), "line 2", "empty")
    fails(save("a\n".encode("utf-16-le"), "p.txt"), "line 1", "NUL")


@pytest.mark.parametrize("name", ["p.jsonl", "p.txt", "p.json"])
def test_empty_file(save, name):
    fails(save("", name), "no prompts")
    fails(save("\n \n", name), "no prompts")


@pytest.mark.parametrize("ending", ["jsonl", "txt", "h5"])
def test_missing_file_and_folder(tmp_path, ending):
    fails(tmp_path / f"none.{ending}", "No such file")
    folder = tmp_path / f"folder.{ending}"
    folder.mkdir()
    fails(folder, "Is a directory")


def test_unknown_ending(save):
    fails(save("a", "prompts.csv"), ".jsonl", ".txt", ".h5")


def hdf5(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name.replace("__", "/")] = value
    return path


@pytest.mark.parametrize("prefix", ["", "requests__"])
def test_hdf5_prompts(tmp_path, prefix):
    path = hdf5(tmp_path / "p.hdf5", **{prefix + "prompt": ["a", "é\n"], prefix + "id": np.array([b"x", b"y"])})
    assert [(r.id, r.prompt) for r in read_requests(path, DEFAULTS)] == [("x", "a"), ("y", "é\n")]


def test_hdf5_token_ids(tmp_path):
    path = hdf5(tmp_path / "p.h5", tokens=np.arange(5, dtype=np.int16), offsets=np.array([0, 2, 5], np.uint64))
    assert [(r.id, r.token_ids) for r in read_requests(path, DEFAULTS)] == [("0", [0, 1]), ("1", [2, 3, 4])]


def test_a_result_file_is_a_prompts_file(tmp_path):
    """Text, messages and token ids come back as they went in, so the same run can be repeated."""
    messages = [{"role": "user", "content": "Hi é"}]
    requests = [
        Request(0, "a", "Once", None, None, DEFAULTS),
        Request(1, "b", None, messages, None, DEFAULTS),
        Request(2, "c", None, None, [3, 1, 2], DEFAULTS),
    ]
    path = tmp_path / "out.h5"
    write_results(path, requests, ["Once", "<user>Hi é", None], [], {})
    assert read_requests(path, DEFAULTS) == requests


@pytest.mark.parametrize(
    ("datasets", "part"),
    [
        ({"text": ["a"]}, "found text"),
        ({}, "found nothing"),
        ({"prompt": ["a"], "id": [1]}, "/id must be a one-dimensional dataset of strings"),
        ({"prompt": [1.5]}, "/prompt must be a one-dimensional dataset of strings"),
        ({"prompt": "a"}, "/prompt must be a one-dimensional dataset of strings"),
        ({"prompt": ["a", "b"], "id": ["x"]}, "id 1, prompt 2"),
        ({"prompt": ["a", ""]}, "row 1: the prompt is empty"),
        ({"prompt": ["a", "b"], "id": ["x", "x"]}, "row 1: id 'x' is already used by row 0"),
        ({"prompt": np.array([b"a", b"\xff"])}, "row 1: /prompt is not UTF-8"),
        ({"prompt": ["a"], "messages": ["{"]}, "row 0: messages is not JSON"),
        ({"tokens": [1, 2], "offsets": [0, 3]}, "offsets must rise from 0 to the number of tokens, 2"),
        ({"tokens": [1, 2], "offsets": np.array([0, 2, 1, 2], np.uint64)}, "offsets must rise"),
        ({"tokens": [1.0], "offsets": [0, 1]}, "/tokens must be a one-dimensional dataset of integers"),
        ({"tokens": [1, -1], "offsets": [0, 1, 2]}, "row 1: token_ids[0] must be"),
        ({"prompt": h5py.Empty("S1")}, "/prompt must be a one-dimensional dataset of strings"),
    ],
)
def test_hdf5_problems(tmp_path, datasets, part):
    fails(hdf5(tmp_path / "p.h5", **datasets), part)


def test_hdf5_damage(tmp_path, save):
    fails(save("just text", "p.h5"), "not an HDF5 file")
    whole = hdf5(tmp_path / "whole.h5", prompt=["a"] * 100).read_bytes()
    fails(save(whole[: len(whole) // 2], "cut.h5"), "truncated or damaged")


def test_check_token_ids():
    request = Request(0, "q7", "a", None, None, DEFAULTS)
    check_token_ids(request, [0, 9], vocab_size=10, max_seq_len=3)
    check_token_ids(request, np.array([0, 9]), vocab_size=10, max_seq_len=3)
    for ids, parts in [
        ([0, 10], ["'q7'", "token id 10 at position 1", "0 to 9"]),
        ([-1], ["token id -1 at position 0"]),
        ([1, 1, 1], ["'q7'", "3 tokens", "context of 3", "--max-seq-len"]),
        ([], ["no tokens"]),
    ]:
        with pytest.raises(UsageError) as caught:
            check_token_ids(request, ids, vocab_size=10, max_seq_len=3)
        assert all(part in str(caught.value) for part in parts)


def test_many_prompts_are_read_quickly(test_data, save):
    """1,319 real questions as a prompts file; ids default to the line number."""
    lines = (test_data / "texts/gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    requests = read_requests(save([{"prompt": json.loads(line)["question"]} for line in lines]), DEFAULTS)
    assert len(requests) == len(lines) and requests[-1].id == str(len(lines) - 1)
