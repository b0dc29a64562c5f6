"""``llama-hpc bench kernels``: a table on the terminal, the same figures in a JSON file."""

import json

from llama_hpc.bench import products
from llama_hpc.cli.main import main
from llama_hpc.kernels.cpu.target import kernels


def test_table_and_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "FRESH_BYTES", 1)
    monkeypatch.setattr(products, "PROBE_BYTES", 1 << 16)
    output = tmp_path / "bench.json"
    arguments = ["--weights", "q3_5", "q8", "f32", "--shapes", "64x48", "--tokens", "1", "20", "--threads", "1", "2"]
    assert main(["bench", "kernels", *arguments, "--rounds", "2", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{kernels()} kernels") and lines[1].split()[:3] == ["weights", "KxN", "tokens"]
    results = json.loads(output.read_text())["results"]
    assert len(results) == 12 and len(lines) == 2 + 12 + 1
    for result in results:
        operations = 2 * result["columns"] * result["rows"] * result["tokens"]
        assert result["seconds"] > 0
        # Medians over two rounds are means: their ratio is near the rate, not equal to it.
        assert 0.2 < result["operations_per_second"] * result["seconds"] / operations < 5


def test_bad_options_are_refused(capsys):
    for options in (["--shapes", "4096"], ["--tokens", "0"], ["--weights", "q2"]):
        assert main(["bench", "kernels", *options]) == 2
    assert capsys.readouterr().err.count("llama-hpc: error:") == 3
