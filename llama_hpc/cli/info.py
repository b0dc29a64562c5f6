"""``llama-hpc info``: this node, a model's shapes, and what every rank of a grid would hold. Reads no weights."""

import argparse

from llama_hpc.cli.options import add_context, add_kv_cache, add_layout, add_sizes, grid_shape

USUAL_LENGTH = 2048             # tokens of a sequence for which cache is shown, unless --max-seq-len says another number


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command and its options to the program's parser."""
    parser = subparsers.add_parser(
        "info", help="this node, a model's shapes, and what each rank of a grid would hold",
        description="A model's shapes, and what each rank of a grid would hold; reads no weights. Alone, it shows any grid; "
                    "under mpirun or srun, the job's ranks with their hosts and cores. Then, or without MODEL only, this node: "
                    "its cores and caches, the threads of a rank, and how to start ranks so that they fit.")
    layout = add_layout(parser, needs_model=False)
    add_sizes(layout)
    add_kv_cache(layout)
    add_context(layout)
    return parser


def main(args: argparse.Namespace) -> int:
    """Collective over the world; the first rank prints. Returns 0; errors are exceptions."""
    from llama_hpc.runtime import numba_setup
    from llama_hpc.runtime.abort import agreed, on_first
    from llama_hpc.runtime.launch import check_world, world
    from llama_hpc.runtime.topology import available_cores, hostname
    comm = world()
    check_world(comm)
    hosts = comm.gather((hostname(), available_cores()))
    with agreed(comm, "reading the command line"):
        shape = grid_shape(args, comm.size if comm.size > 1 else None)
        numba_setup.configure(1)
        numba_setup.check_kernels()
    on_first(comm, _show, args, shape, hosts)
    return 0


def _show(args: argparse.Namespace, shape, hosts: list[tuple[str, int]]) -> None:
    if args.model is not None:
        _show_model(args, shape, hosts)
        print()
    _show_node(hosts)


def _show_model(args: argparse.Namespace, shape, hosts: list[tuple[str, int]] | None) -> None:
    from llama_hpc.cli.model_tables import fact_lines, model_facts, rank_lines
    from llama_hpc.engine.layout import auto_grid, rank_shares
    from llama_hpc.engine.prepare import check_max_seq_len
    from llama_hpc.grid import GridShape
    from llama_hpc.model.shares import check_grid
    from llama_hpc.runtime.topology import available_memory
    from llama_hpc.weights.checkpoint import open_checkpoint, weights_format
    checkpoint = open_checkpoint(args.model)
    config, weights = checkpoint.config, weights_format(checkpoint, args.weights)
    check_max_seq_len(args.max_seq_len, config)
    length = args.max_seq_len or min(config.context_length, USUAL_LENGTH)
    if shape is None and len(hosts) == 1:
        shape = GridShape(1, 1, args.context_parallel)
    if shape is not None:
        check_grid(config, shape, args.context_parallel)
    print("\n".join(fact_lines(model_facts(checkpoint, weights))), flush=True)
    if shape is None:
        # Hosts may differ in ranks; this one stands for all.
        here = sum(host == hosts[0] for host in hosts)
        shape = auto_grid(config, weights, len(hosts), here, available_memory() // here, len(hosts) * args.max_seqs,
                          args.max_seqs, length, kv_cache=args.kv_cache, context=args.context_parallel)
    ranks = rank_shares(config, weights, shape, args.max_seqs * length, args.kv_cache, args.context_parallel)
    print(f"\ngrid {shape} (replicas x stages x tensor ranks), {args.max_seqs} sequences of {length} tokens a replica:\n")
    # A run orders its ranks by node, nodes by their first rank.
    names = [host for host, _ in hosts]
    known = sorted(hosts, key=lambda host: names.index(host[0])) if len(hosts) == shape.size > 1 else [("-", "-")] * shape.size
    print("\n".join(rank_lines(ranks, {"host": [host for host, _ in known], "cores": [str(cores) for _, cores in known]}, {})))


def _show_node(hosts: list[tuple[str, int]]) -> None:
    """What the first rank's node has, what a rank takes of it, and how to start ranks there."""
    from llama_hpc.cli.model_tables import fact_lines
    from llama_hpc.runtime.advice import launch_advice
    from llama_hpc.runtime.topology import node_cores, node_cpus
    facts = _node_facts(sum(host == hosts[0][0] for host, _ in hosts))
    print(f"this node, {hosts[0][0]}:\n")
    print("\n".join(fact_lines(facts)))
    for advice in launch_advice(node_cpus(), node_cores()):
        print(f"\n{advice.purpose}: {advice.ranks} on each node, {advice.threads} threads each\n")
        print("\n".join(fact_lines(list(advice.commands.items()))))


def _node_facts(ranks: int) -> list[tuple[str, str]]:
    """The facts of this node, on which ``ranks`` of this job run."""
    from llama_hpc.kernels.cpu.places import all_cpus, cache_sizes, cpu_text, domains, numa_nodes, physical_cores
    from llama_hpc.kernels.cpu.target import kernels
    from llama_hpc.runtime.devices import gpus_text, look
    from llama_hpc.runtime.tables import size
    from llama_hpc.runtime.topology import default_threads, node_cores, thread_places
    cpus, caches = all_cpus(), cache_sizes()
    threads = default_threads(ranks)
    places = thread_places(threads)
    bound = "not bound" if places is None else "bound to cpus " + " | ".join(dict.fromkeys(map(cpu_text, places)))
    return [
        ("sockets", str(len(domains("sockets", cpus)))),
        ("NUMA nodes", f"{len(numa_nodes())}, cpus {' | '.join(map(cpu_text, numa_nodes()))}"),
        ("cores", f"{physical_cores(cpus)} ({len(cpus)} cpus), {node_cores()} for this job"),
        ("caches", f"L1d {size(caches.l1d)}, L2 {size(caches.l2)}, L3 {size(caches.l3)} for {caches.l3_cores} cores"),
        ("kernels", kernels()),
        ("GPUs", gpus_text(look("auto"))),
        ("threads of a rank", f"{threads}, {bound}"),
    ]

