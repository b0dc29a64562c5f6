#!/usr/bin/env bash
# Run a model with mpirun: on one machine, or inside a job of any scheduler.
#
#   bash jobs/mpirun.sh
set -euo pipefail

# What to run: a Hugging Face folder or a GGUF file, a file of prompts, and where the answers go.
MODEL=${MODEL:-smollm2}
PROMPTS=${PROMPTS:-jobs/prompts.jsonl}
OUTPUT=${OUTPUT:-results.h5}

# Processes, and threads of each: together not more than the cores at hand.
# Many ranks with few threads suit small models; one rank a socket or NUMA domain suits large ones.
RANKS=${RANKS:-2}
THREADS=${THREADS:-1}

# Modules: the MPI that belongs to the machine's network, and the environment llama_hpc was installed in.
# Where mpi4py does not find that MPI by itself, name its library.
#   module load openmpi
#   source ~/llama-hpc/bin/activate
#   export MPI4PY_LIBMPI=$MPI_HOME/lib/libmpi.so

# Binding: every rank on cores of its own, so that its threads and its memory stay close together. These are Open MPI's
# options; with MPICH write `-bind-to core:$THREADS`. The ranks of one node share it: do not start another
# job beside them, waiting ranks keep their cores busy.
#   mpirun -n "$RANKS" --map-by "slot:PE=$THREADS" --bind-to core llama-hpc run …
mpirun -n "$RANKS" llama-hpc run "$MODEL" --prompts "$PROMPTS" --output "$OUTPUT" --threads "$THREADS" "$@"

llama-hpc show "$OUTPUT"
