"""The scripts of jobs/ as far as they can be checked without their scheduler: syntax, directives, and what they do."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import mpi_jobs
import pytest
from workload import JOBS

SCRIPTS = sorted(path for path in JOBS.iterdir() if path.suffix in (".sh", ".slurm", ".pbs", ".flux"))

# qsub(1B) of PBS Professional: options and the form of their values.
PBS = {
    "-N": r"[A-Za-z][\w.+-]{0,14}",
    "-j": r"oe|eo|n",
    "-q": r"\w+",
    "-A": r"\w+",
    "-l": r"select=\d+(:(ncpus|mpiprocs|ompthreads|ngpus|mem)=\w+)*|place=(free|pack|scatter|vscatter)(:\w+)?"
          r"|walltime=\d+:\d\d:\d\d",
}
# flux-batch(1).
FLUX = {
    "--job-name": r"\S+",
    "--nodes": r"\d+",
    "--nslots": r"\d+",
    "--cores-per-slot": r"\d+",
    "--time-limit": r"\d+(\.\d+)?[smhd]?",
    "--output": r"\S+",
    "--queue": r"\S+",
    "--bank": r"\S+",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    """What bash can tell, and that all take their inputs from the environment and stop at the first error."""
    assert script.read_text().startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in script.read_text()
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    for name in ("MODEL", "PROMPTS", "OUTPUT"):
        assert f"\n{name}=${{{name}:-" in script.read_text()


def test_the_readme_has_every_script():
    listed = re.findall(r"^\| `([^`]+)` \|", (JOBS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in JOBS.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("script", ["gpu.slurm", "gpu-nodes.slurm"])
def test_a_rank_for_each_gpu(script):
    """As many ranks on a node as GPUs, all of which each of them sees, and no run on the CPU by mistake."""
    text = (JOBS / script).read_text()
    given = dict(re.findall(r"^#SBATCH (--[\w-]+)=(\S+)$", text, re.MULTILINE))
    assert given["--ntasks-per-node"] == given["--gpus-per-node"] and "--gpus-per-task" not in given
    assert " --gpu-bind=none " in text and " --device gpu " in text


def test_pbs_directives():
    """Directives end at the first line that is neither one of them nor a comment; those behind it do not count."""
    lines = (JOBS / "cpu.pbs").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = [shlex.split(line.removeprefix("#PBS ")) for line in lines[:end] if line.startswith("#PBS ")]
    assert {option for option, _ in directives} >= {"-N", "-l", "-j"} and not any("#PBS" in line for line in lines[end:])
    for option, value in directives:
        assert re.fullmatch(PBS[option], value), (option, value)


def test_flux_directives():
    """RFC 36: one prefix for all, in one piece, `#` behind it makes a comment."""
    lines = (JOBS / "cpu.flux").read_text().splitlines()
    places = [i for i, line in enumerate(lines) if re.match(r"\W*flux:", line)]
    assert places == list(range(places[0], places[-1] + 1)) and all(lines[i].startswith("# flux: ") for i in places)
    directives = [shlex.split(lines[i].removeprefix("# flux: "), comments=True) for i in places]
    given = dict(option.split("=", 1) for directive in directives for option in directive)
    assert given.keys() >= {"--nodes", "--nslots", "--cores-per-slot", "--time-limit"}
    for option, value in given.items():
        assert re.fullmatch(FLUX[option], value), (option, value)


# `flux run` as mpirun, as far as the script uses it.
_FLUX = """#!/bin/sh
case "$*" in
    "job timeleft") echo 3600 ;;
    "run -n 2 -c 1 -o pmi=pmix -o cpu-affinity=per-task -o exit-on-error "*) shift 11; exec mpirun -n 2 "$@" ;;
    *) echo "flux: $*" >&2; exit 2 ;;
esac
"""


@pytest.mark.parametrize("script", ["cpu.pbs", "cpu.flux"])
def test_schedulers_that_are_not_here(work, tmp_path, script):
    """The script in the environment that its scheduler makes, with mpirun and this machine in place of the scheduler's."""
    (tmp_path / "flux").write_text(_FLUX)
    (tmp_path / "flux").chmod(0o755)
    (tmp_path / "nodes").write_text("localhost\nlocalhost\n")
    prompts = tmp_path / "prompts.jsonl"
    work.write_prompts(prompts)
    output = tmp_path / ("results-123.h5" if script == "cpu.pbs" else "results.h5")
    path = f"{tmp_path}:{Path(sys.executable).parent}:{mpi_jobs.environment()['PATH']}"
    env = mpi_jobs.environment(env={"PATH": path, "PBS_O_WORKDIR": tmp_path, "PBS_JOBID": "123.server", "OMP_NUM_THREADS": 1,
                                    "PBS_NODEFILE": tmp_path / "nodes", **work.environment(prompts, output)})
    more = work.options if script == "cpu.flux" else ()
    ran = subprocess.run(["bash", JOBS / script, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and ran.stdout.endswith("complete\n"), ran.stderr
