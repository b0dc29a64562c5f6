"""What a rank computes on: a GPU of its node that no other rank takes, or the CPU, and why. No MPI.

CUDA_VISIBLE_DEVICES, and what SLURM binds to a task, decide which GPUs a rank sees. Whether there are any is read from files
first, so that a node without GPUs loads nothing.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llama_hpc.errors import DeviceUnavailable, LlamaHpcError, UsageError
from llama_hpc.kernels.cpu.places import ROOT, cpu_text
from llama_hpc.kernels.cuda.compiler import OLDEST
from llama_hpc.kernels.cuda.device import DeviceError, DeviceFacts, free_memory, visible_devices
from llama_hpc.runtime.tables import size
from llama_hpc.runtime.topology import available_memory, hostname

# Values of CUDA_VISIBLE_DEVICES with which nobody counts on a GPU; SLURM sets the last one in jobs that have not asked for any.
_HIDDEN = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class Sight:
    """What a rank sees: the GPUs of its node that it may use, or why there are none; ``surprising``: whether someone who has not
    asked for a GPU may have counted on one."""

    devices: tuple[DeviceFacts, ...] = ()
    why: str = ""
    surprising: bool = True


@dataclass(frozen=True)
class Choice:
    """What a rank computes on: ``kind`` cpu or gpu. Of a GPU: its ``number`` in this process, name, memory in all, place on the
    PCI ``bus``. Of a CPU: ``why`` it is no GPU, empty where nobody wanted one, and whether that is ``surprising``; ``crowded``:
    because the node has more ranks than GPUs."""

    kind: str = "cpu"
    number: int = -1
    name: str = ""
    memory_bytes: int = 0
    bus: str = ""
    why: str = ""
    surprising: bool = False
    crowded: bool = False

    @property
    def text(self) -> str:
        """``cpu``, or ``gpu 2, NVIDIA H200 (140.40 GiB)``."""
        return devices_text([self])


CPU = Choice()


def devices_text(choices: Sequence[Choice]) -> str:
    """What ranks with devices of a kind compute on: ``cpu``, or ``gpu 0-3, NVIDIA H200 (140.40 GiB)``."""
    first = choices[0]
    if first.kind == "cpu":
        return "cpu"
    numbers = {choice.number for choice in choices}
    # Ranks that see one GPU only, each another one, all call it number 0.
    each = " each" if len(numbers) < len(choices) else ""
    return f"gpu {cpu_text(numbers)}{each}, {first.name} ({size(first.memory_bytes)})"


def look(option: str, root: Path = ROOT, devices: Callable[[], Sequence[DeviceFacts]] | None = None) -> Sight:
    """What this rank sees. ``devices`` finds the GPUs that CUDA shows (default: ``visible_devices``), and is not called where the
    node has none."""
    if option == "cpu":
        return Sight(surprising=False)
    files = [file.name.removeprefix("nvidia") for file in (root / "dev").glob("nvidia*")]
    if not files and not (root / "proc/driver/nvidia/version").exists():
        return Sight(why="no NVIDIA driver", surprising=False)
    if not any(map(str.isdecimal, files)):
        return Sight(why="an NVIDIA driver, but no GPU")
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) in _HIDDEN:
        return Sight(why=f"CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs", surprising=False)
    try:
        found = (devices or visible_devices)()
    except DeviceError as error:
        return Sight(why=str(error))
    usable = tuple(device for device in found if device.architecture >= OLDEST)
    if found and not usable:
        return Sight(why=f"{found[0].name} has architecture sm_{found[0].architecture}, sm_{OLDEST} or newer is needed")
    if not usable:
        return Sight(why="no GPU that this rank may use")
    return Sight(usable)


def gpus_text(sight: Sight) -> str:
    """``2: NVIDIA H200 (140.40 GiB), NVIDIA H200 (140.40 GiB)``, or ``none: no NVIDIA driver``."""
    named = ", ".join(f"{device.name} ({size(device.memory_bytes)})" for device in sight.devices)
    return f"{len(sight.devices)}: {named}" if named else f"none: {sight.why}"


def choose(sights: Sequence[Sight]) -> list[Choice]:
    """What each rank of a node takes, in their order: a GPU that it sees and no other rank has. ``sights``: what each sees.

    Where all see the same GPUs, the n-th rank takes the n-th; where each sees one of its own, it takes that.
    """
    found: dict[int, Choice] = {}
    taken: set[str] = set()
    # Those that have the least choice come first.
    for rank in sorted(range(len(sights)), key=lambda rank: len(sights[rank].devices)):
        device = next((device for device in sights[rank].devices if device.identity not in taken), None)
        if device is not None:
            taken.add(device.identity)
            found[rank] = Choice("gpu", device.number, device.name, device.memory_bytes, device.bus)
    crowd = Choice(why=f"{len(taken)} GPU{'s' * (len(taken) != 1)} for {len(sights)} ranks", surprising=True, crowded=True)
    return [found.get(rank) or (crowd if sight.devices else Choice(why=sight.why, surprising=sight.surprising))
            for rank, sight in enumerate(sights)]


def refusal(choice: Choice) -> LlamaHpcError:
    """The error of a rank that is to compute on a GPU and has none."""
    what = f"--device gpu on {hostname()}: {choice.why}"
    if choice.crowded:
        return UsageError(f"{what}; start one rank for each GPU, such as with --ntasks-per-node and --gpus-per-node of SLURM or "
                          "mpirun --map-by ppr:N:node, or let --device auto leave the other ranks to the CPU")
    return DeviceUnavailable(f"{what}; --device auto or cpu computes on the CPU")


def without_gpu(choices: Sequence[Choice], hosts: Sequence[str]) -> tuple[str, bool]:
    """(a line that tells which ranks of a job, on these ``hosts``, compute on the CPU, and why; whether it is worth a warning);
    an empty line where all have a GPU or nobody wanted one."""
    ranks = [rank for rank, choice in enumerate(choices) if choice.why]
    if not ranks:
        return "", False
    # What surprises comes first: some nodes may have GPUs that cannot be used, and others none.
    reasons = list(dict.fromkeys(choices[rank].why for rank in sorted(ranks, key=lambda rank: not choices[rank].surprising)))
    places = list(dict.fromkeys(hosts[rank] for rank in ranks if choices[rank].why == reasons[0]))
    where = places[0] if len(places) == 1 else f"{places[0]} and {_more(places, 'host')}"
    others = f"; {_more(reasons, 'reason')} elsewhere" if len(reasons) > 1 else ""
    whose = "all ranks compute" if len(ranks) == len(choices) else \
        f"ranks {cpu_text(set(ranks))} compute" if len(ranks) > 1 else f"rank {ranks[0]} computes"
    return (f"{whose} on the CPU: {reasons[0]} ({where}){others}",
            any(choice.surprising or choice.kind == "gpu" for choice in choices))


def _more(things: list[str], name: str) -> str:
    return f"{len(things) - 1} more {name}{'s' * (len(things) > 2)}"


def memory_of(choice: Choice, ranks_on_node: int, free: Callable[[int], int] | None = None) -> int:
    """Bytes that a rank may use for weights, cache and buffers: what its GPU has ``free`` (default: ``free_memory``), or
    its share of the node's memory. Raises DeviceUnavailable."""
    if choice.kind == "cpu":
        return available_memory() // ranks_on_node
    try:
        return (free or free_memory)(choice.number)
    except DeviceError as error:
        raise DeviceUnavailable(f"{choice.text} of {hostname()}: {error}") from None


def open_device(choice: Choice):
    """The GPU of a choice, a ``kernels.cuda.device.Device``. Raises DeviceUnavailable."""
    from llama_hpc.kernels.cuda.device import Device
    with told():
        return Device(choice.number)


@contextmanager
def told():
    """Raises DeviceUnavailable for what kernels say of a device."""
    try:
        yield
    except DeviceError as error:
        raise DeviceUnavailable(f"{error} ({hostname()})") from None
