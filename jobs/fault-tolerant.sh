#!/usr/bin/env bash
# Run a model with mpirun on a list of hosts so that a rank that dies costs no more than what it was answering: the others
# go on, and a rank that was kept ready takes its place. Needs Open MPI 5 or newer.
#
#   bash jobs/fault-tolerant.sh [further options of llama-hpc run]
#
# Inside a SLURM job write `sbatch --nodes=… --ntasks-per-node=… jobs/fault-tolerant.sh` and leave HOSTS empty. srun cannot
# do this: it ends all ranks when one has died.
set -euo pipefail

# What to run: a Hugging Face folder or a GGUF file, a file of prompts, and where the answers go, which all hosts see.
MODEL=${MODEL:-smollm2}
PROMPTS=${PROMPTS:-jobs/prompts.jsonl}
OUTPUT=${OUTPUT:-results.h5}

# Where: a file with a line for each host, such as `node7 slots=2` (as many ranks as that). ssh must reach them without a
# password, and llama_hpc must be installed on all of them in the same folder.
HOSTS=${HOSTS-hosts}

# Processes, of which SPARES wait until one of the others dies, and threads of each.
RANKS=${RANKS:-4}
SPARES=${SPARES:-1}
THREADS=${THREADS:-1}
GRID=${GRID:-3x1x1}

# Modules: the MPI that belongs to the machine's network, and the environment llama_hpc was installed in.
# Where mpi4py does not find that MPI by itself, name its library.
#   module load openmpi
#   source ~/llama-hpc/bin/activate
#   export MPI4PY_LIBMPI=$MPI_HOME/lib/libmpi.so

# Full names, as ssh gives the other hosts no PATH.
options=(--with-ft ulfm -n "$RANKS" --map-by "slot:PE=$THREADS" --bind-to core)
[ -z "$HOSTS" ] || options+=(--hostfile "$HOSTS")
"$(command -v mpirun)" "${options[@]}" "$(command -v llama-hpc)" run "$MODEL" --prompts "$PROMPTS" --output "$OUTPUT" \
    --grid "$GRID" --spares "$SPARES" --threads "$THREADS" --resume "$@" || echo "mpirun ended with code $?" >&2

# The death of a whole host ends mpirun, with code 0 even so, and the death of a rank may leave another code behind a complete
# output: only the output tells.
if [ "$(llama-hpc show --status "$OUTPUT")" != complete ]; then
    echo "$OUTPUT is not complete: take the hosts that are gone out of ${HOSTS:-the job} and start this again" >&2
    exit 1
fi
