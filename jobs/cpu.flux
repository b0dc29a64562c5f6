#!/usr/bin/env bash
# Run a model on CPU nodes under Flux: set the lines below, then
#
#   flux batch jobs/cpu.flux [further options of llama-hpc run]
#
# Slots are ranks, each with as many cores as it has threads. The run stops two minutes before the time limit with what is
# finished; submitted again with that OUTPUT, it goes on.
# flux: --job-name=llama-hpc
# flux: --nodes=1
# flux: --nslots=2
# flux: --cores-per-slot=1
# flux: --time-limit=60m
# flux: --output=flux-{{id}}.out
# flux: # --queue=…
# flux: # --bank=…
set -euo pipefail

# What to run: a Hugging Face folder or a GGUF file, a file of prompts, and where the answers go.
MODEL=${MODEL:-smollm2}
PROMPTS=${PROMPTS:-jobs/prompts.jsonl}
OUTPUT=${OUTPUT:-results.h5}

# Processes, and threads of each: those of the lines above.
RANKS=${RANKS:-2}
THREADS=${THREADS:-1}

# Modules: the site's MPI, and the environment llama_hpc was installed in. Where mpi4py does not find that MPI
# by itself, name its library.
#   module load openmpi
#   source ~/llama-hpc/bin/activate
#   export MPI4PY_LIBMPI=$MPI_HOME/lib/libmpi.so

# Launch: Open MPI 5 needs Flux's plugin flux-pmix and `-o pmi=pmix`; MPICH needs neither. A rank that fails ends the others.
flux run -n "$RANKS" -c "$THREADS" -o pmi=pmix -o cpu-affinity=per-task -o exit-on-error \
    llama-hpc run "$MODEL" --prompts "$PROMPTS" --output "$OUTPUT" --threads "$THREADS" \
    --time-limit "$(($(flux job timeleft) - 120))" --resume "$@"

llama-hpc show --status "$OUTPUT"
