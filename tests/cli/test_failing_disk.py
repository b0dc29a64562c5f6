"""llama-hpc run on file systems that fail in mid-run: nothing finished is lost, one line says what to do, and that works."""

import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import mpi_jobs
import pytest
from reference_models import prompt, write_checkpoint

from llama_hpc.results import read_results
from llama_hpc.results.parts import ProgressFolder

COUNT, PACE = 30, 0.2           # prompts, and seconds between two of them in runs that something befalls
# A run that is soon out of patience, and notes what it has finished.
PROGRAM = """
import os, sys
from llama_hpc.runtime import numba_setup
numba_setup.configure(1)
from llama_hpc.cli.main import main
from llama_hpc.engine.durable import Durable
from llama_hpc.results import patience
from llama_hpc.runtime.launch import environment_rank
patience.PATIENCE = float(os.environ.get("PATIENCE", "1,1").split(",")[environment_rank()])
keep = Durable.keep
def noting(self, output):
    with open(os.environ["FINISHED"], "a") as file:
        file.write(f"{output.request}\\n")
    keep(self, output)
Durable.keep = noting
sys.exit(main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint("llama_odd", tmp_path_factory.mktemp("model") / "model")


def write_prompts(path, pace):
    ids = [int(i) for i in prompt("llama_odd")]
    lines = [{"token_ids": ids[i % 7 : i % 7 + 5], "max_tokens": 20 + i} | ({"arrival_s": pace * i} if pace else {})
             for i in range(COUNT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", 0)


@pytest.fixture(scope="module")
def slow_prompts(tmp_path_factory):
    """The same, one after the other."""
    return write_prompts(tmp_path_factory.mktemp("slow") / "prompts.jsonl", PACE)


@pytest.fixture(scope="module")
def undisturbed(command, model, prompts, tmp_path_factory):
    """The digest of a job that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out.h5"
    job = command(2, ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos"])
    assert job.returncode == 0, job.stderr
    with read_results(output) as results:
        return results.digest


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a file system of its own on the folder ``results``, see mount(8), and gives the folder."""
    folder = tmp_path / "results"
    folder.mkdir()
    def mount(*options):
        if os.getuid() or subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode:
            pytest.skip("this user cannot mount file systems")
        stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False, capture_output=True)
        return folder
    with ExitStack() as stack:
        yield mount


class Run:
    """A run of two replicas into ``output``, and what befalls it when ``disturb()`` is called behind some answers. ``patience``:
    seconds of each of them."""

    def __init__(self, model, slow_prompts, output, disturb, *options, patience="1,1"):
        self.noted = output.parents[1] / "finished"
        argv = ["-c", PROGRAM, "run", model, "--prompts", slow_prompts, "--output", output, "--ignore-eos", "--max-seqs", 2,
                "--grid", "2x1x1", "--sync-interval", 0.1, *options]
        with mpi_jobs.start(2, argv, env={"FINISHED": self.noted, "PATIENCE": patience}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True) as job:
            while len(self.finished) < 6 and job.poll() is None:
                time.sleep(0.01)
            assert job.poll() is None
            disturb()
            self.said, _ = job.communicate(timeout=60)
        self.code = job.returncode

    @property
    def finished(self) -> set[int]:
        """Requests that it has finished, by its own account."""
        return {int(line) for line in self.noted.read_text().split("\n")[:-1]} if self.noted.exists() else set()

    def line(self) -> str:
        """Its one line of error."""
        (line,) = [line for line in self.said.splitlines() if "llama-hpc:" in line]
        assert self.code == 1 and "Traceback" not in self.said
        return line


def check_resumed(command, run, model, prompts, output, rescue, undisturbed):
    """What the line says helps: every answer that was finished is there, and none of them was computed again."""
    job = command(2, ["run", model, "--prompts", prompts, "--output", output, "--ignore-eos", "--resume", "--rescue", rescue])
    assert job.returncode == 0 and f"resuming: {len(run.finished)} answers of 1 earlier run" in job.stderr, (
        f"{run.said}\n{job.stderr}")
    with read_results(output) as results:
        assert results.digest == undisturbed and results.status == "complete"
        assert {found.request for found in results.outputs() if found.attempt == 0} == run.finished
    assert not ProgressFolder(output).path.exists() and list(rescue.iterdir()) == []


def fill(folder: Path) -> Path:
    """Leaves no room on a small disk."""
    with open(folder / "filler", "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return folder / "filler"


def test_a_full_disk(command, mounted, model, prompts, slow_prompts, undisturbed, tmp_path):
    folder, rescue = mounted("-t", "tmpfs", "-o", "size=512k", "tmpfs"), tmp_path / "rescue"
    rescue.mkdir()
    # The one that fails first waits for what the other one has finished.
    run = Run(model, slow_prompts, folder / "out.h5", lambda: fill(folder), "--rescue", rescue, patience="1,4")
    assert ".log: No space left on device, tried " in run.line() and " finished answers are in " in run.line()
    assert f": make room or mend the file system, then run again with --resume --rescue {rescue}" in run.line()
    assert not (folder / "out.h5").exists() and 6 <= len(run.finished) < COUNT
    (folder / "filler").unlink()
    check_resumed(command, run, model, prompts, folder / "out.h5", rescue, undisturbed)


def test_a_disk_that_an_error_makes_read_only(command, mounted, model, prompts, slow_prompts, undisturbed, tmp_path):
    """As the kernel does it with ext4: at once, whatever is open."""
    image, rescue = tmp_path / "image", tmp_path / "rescue"
    rescue.mkdir()
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    if not shutil.which("mkfs.ext4") or subprocess.run(["mkfs.ext4", "-q", str(image)], check=False).returncode:
        pytest.skip("there is no mkfs.ext4")
    folder = mounted("-o", "loop,errors=remount-ro", str(image))
    (device,) = [line.split()[0] for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(folder)]
    trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
    if not trigger.exists():
        pytest.skip("this kernel does not let ext4 fail at will")
    run = Run(model, slow_prompts, folder / "out.h5", lambda: trigger.write_text("1"), "--rescue", rescue)
    assert "Read-only file system, tried " in run.line() and f"--resume --rescue {rescue}" in run.line()
    subprocess.run(["umount", str(folder)], check=True)
    mounted("-o", "loop", str(image))
    check_resumed(command, run, model, prompts, folder / "out.h5", rescue, undisturbed)


def test_a_disk_that_is_unmounted(command, mounted, model, prompts, slow_prompts, undisturbed, tmp_path):
    """Lazily: what is open can be written on, but nobody would find it, nor what was written before."""
    folder, rescue = mounted("-t", "tmpfs", "tmpfs"), tmp_path / "rescue"
    rescue.mkdir()
    run = Run(model, slow_prompts, folder / "out.h5", lambda: subprocess.run(["umount", "-l", str(folder)], check=True),
              "--rescue", rescue)
    assert "is not the folder that it was, tried " in run.line() and f"--resume --rescue {rescue}" in run.line()
    assert list(folder.iterdir()) == []
    check_resumed(command, run, model, prompts, folder / "out.h5", rescue, undisturbed)


def test_progress_that_somebody_removes_comes_back(model, slow_prompts, undisturbed, tmp_path):
    output = tmp_path / "results" / "out.h5"
    output.parent.mkdir()
    run = Run(model, slow_prompts, output, lambda: shutil.rmtree(ProgressFolder(output).path))
    assert run.code == 0 and run.said.count("had vanished: made anew with all that was in it") >= 1, run.said
    with read_results(output) as results:
        assert results.digest == undisturbed and {found.attempt for found in results.outputs()} == {0}
    assert os.listdir(output.parent) == ["out.h5"]


def test_a_disk_that_is_full_at_the_end(command, mounted, model, prompts, undisturbed, tmp_path):
    """The answers are kept, the results are not: they lie in the second place, whole."""
    folder, rescue = mounted("-t", "tmpfs", "-o", "size=256k", "tmpfs"), tmp_path / "rescue"
    rescue.mkdir()
    few = tmp_path / "few.jsonl"
    few.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    (folder / "filler").write_bytes(bytes(224 << 10))
    argv = ["run", model, "--prompts", few, "--output", folder / "out.h5", "--ignore-eos", "--rescue", rescue]
    job = mpi_jobs.mpirun(1, ["-c", PROGRAM, *argv], env={"FINISHED": tmp_path / "finished"})
    (line,) = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert job.returncode == 1 and f"No space left on device; they are in {rescue}/out.h5; all answers are kept in " in line
    assert line.endswith(": make room or mend the file system, then --resume")
    (folder / "filler").unlink()
    job = command(1, [*argv, "--resume"])
    assert job.returncode == 0 and "resuming: 2 answers of 1 earlier run" in job.stderr, job.stderr
    with read_results(folder / "out.h5") as results, read_results(rescue / "out.h5") as rescued:
        assert results.digest == rescued.digest == rescued.verify() and rescued.status == "complete"


def test_scores_go_to_the_second_place(command, mounted, model, tmp_path):
    folder, rescue = mounted("-t", "tmpfs", "-o", "size=16k", "tmpfs"), tmp_path / "rescue"
    rescue.mkdir()
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"token_ids": [1, 2, 3, 4, 5]}\n')
    argv = ["score", model, "--texts", texts, "--output", folder / "scores.h5", "--rescue", rescue]
    job = mpi_jobs.mpirun(1, ["-c", PROGRAM, *argv])
    (line,) = [line for line in job.stderr.splitlines() if "llama-hpc:" in line]
    assert job.returncode == 1 and f"No space left on device; they are in {rescue}/scores.h5" in line
    assert command(1, ["show", rescue / "scores.h5"]).returncode == 0
