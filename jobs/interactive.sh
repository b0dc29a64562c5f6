#!/usr/bin/env bash
# Wait for nodes, run a model on them in this terminal, and give them back: from a login node of a SLURM cluster.
#
#   bash jobs/interactive.sh [further options of llama-hpc run]
#
# To run several times on the same nodes, call `salloc` with these RESOURCES and no command, and then the srun line below in
# the shell that it opens. `scancel --signal=USR1 JOB` from another terminal stops a run with what is finished.
set -euo pipefail

# What to run: a Hugging Face folder or a GGUF file, a file of prompts, and where the answers go.
MODEL=${MODEL:-smollm2}
PROMPTS=${PROMPTS:-jobs/prompts.jsonl}
OUTPUT=${OUTPUT:-results.h5}

# Processes, threads of each, and the time, which is short so that the wait is too.
THREADS=${THREADS:-1}
RESOURCES=(--job-name=llama-hpc --nodes=1 --ntasks-per-node=2 --cpus-per-task="$THREADS" --time=00:15:00)
#   RESOURCES+=(--partition=… --account=…)

# Modules: the site's MPI, and the environment llama_hpc was installed in. Where mpi4py does not find that MPI
# by itself, name its library.
#   module load openmpi
#   source ~/llama-hpc/bin/activate
#   export MPI4PY_LIBMPI=$MPI_HOME/lib/libmpi.so

salloc "${RESOURCES[@]}" srun --mpi=pmix --cpus-per-task="$THREADS" --cpu-bind=cores --kill-on-bad-exit=1 \
    llama-hpc run "$MODEL" --prompts "$PROMPTS" --output "$OUTPUT" --threads "$THREADS" --resume "$@"

llama-hpc show "$OUTPUT"
