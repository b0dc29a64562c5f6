"""``measure.py``, the script for machines with a GPU and little else, on an emulated one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import plain_tests
import pytest
from emulated_device import missing
from reference_models import write_checkpoint
from test_cuda_run import BLOCK

FOLDER = Path(__file__).parent
# What a machine may lack beside what BLOCK hides.
ABSENT = ("pytest", "gguf", "tokenizers", "sentencepiece", "jinja2", "psutil", "tqdm", "safetensors", "cupy", "pynvml")


def measure(*options):
    if why := missing():
        pytest.skip(why)
    alone = BLOCK.replace('"h5py"', '"h5py", ' + ", ".join(f'"{name}"' for name in ABSENT))
    # Its parts are processes of their own: so is each here that starts as if it were one.
    return subprocess.run([sys.executable, "-c", alone, FOLDER / "measure.py", "--emulated", "--quick", *map(str, options)],
                          capture_output=True, text=True, check=False, timeout=120)


def test_all_parts():
    job = measure()
    assert job.returncode == 0, job.stdout + job.stderr
    for part in ("products", "attention", "shapes", "choose", "overlap"):
        assert re.search(rf"== {part}\n[1-9]\d* comparisons and checks well, 0 failed\n-- {part}: ok", job.stdout), job.stdout
    assert "MISSED: quick, 1 layers, q3_5, decode 3" in job.stdout and "16 of 16 parts ok" in job.stdout


@pytest.mark.parametrize("part", ["facts", "products", "overlap", "model-speed", "product-speed", "attention-speed",
                                  "overlap-speed"])
def test_parts_need_nothing_but_numpy(part):
    job = measure("--parts", part, "--inside")
    assert job.returncode == 0, job.stdout + job.stderr


def test_digests(tmp_path):
    model, prompts, digests = write_checkpoint("llama_odd", tmp_path / "model"), tmp_path / "prompts.jsonl", tmp_path / "d.json"
    prompts.write_text(json.dumps({"id": "a", "token_ids": [1, 2, 3]}) + "\n")
    given = "--parts", "digests", "--model", f"odd={model}", "--digests", digests, "--prompts", prompts
    command = [sys.executable, FOLDER / "standalone.py", model, "--weights", "q8", "--prompts", prompts, "--max-tokens", "2"]
    alone = subprocess.run([*command, "--emulated"], capture_output=True, text=True, check=True, timeout=120).stdout.strip()
    digests.write_text(json.dumps({"odd": {"max_tokens": 2, "q3_5": "", "q8": alone}}))
    job = measure(*given)
    assert job.returncode == 0 and "odd q8: the digest of CPUs" in job.stdout, job.stdout + job.stderr
    digests.write_text(json.dumps({"odd": {"max_tokens": 2, "q8": "0" * 64}}))
    job = measure(*given)
    assert job.returncode == 1 and "odd q8: FAILED" in job.stdout and "failed: digests" in job.stdout


def test_tests_without_pytest(capsys):
    class Tests:
        pass
    seen, tests = [], Tests()

    def check(device, a, b, monkeypatch):
        monkeypatch.setattr(tests, "number", a)
        seen.append((device, a, b))
        assert tests.number != 2
    tests.number, tests.test_all, tests.test_large = 0, check, lambda gpu: seen.append(gpu)
    for names, values in (("a", [1, 2]), ("b", "xy")):
        check = plain_tests._parametrize(names, values)(check)
    assert plain_tests.run(tests, "here", False, lambda: len(seen) > 2) == (2, 1, 1)
    assert seen == [("here", 1, "x"), ("here", 1, "y"), ("here", 2, "x")] and tests.number == 0
    assert "FAILED check {'a': 2, 'b': 'x'}" in capsys.readouterr().out
    assert plain_tests.run(tests, "here", True, lambda: False, first_only=True) == (2, 0, 0)
