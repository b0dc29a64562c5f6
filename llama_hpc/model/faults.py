"""Numeric faults: noted where a kernel reports one, carried with the data, raised by every rank at the same step."""

from llama_hpc.errors import NumericsError
from llama_hpc.kernels.numerics import NOT_FINITE

TENSORS = ("embedding", "attention_norm", "q", "k", "v", "q_norm", "k_norm", "attention", "o", "mlp_norm", "gate", "up", "down",
           "final_norm", "head")
_NO_LAYER = ("embedding", "final_norm", "head")
_BEHIND = 1 << 20               # the layer number of what comes after all layers
NONE = 2**62                    # what a rank without a fault gives to a minimum over ranks


class Faults:
    """The first fault of this rank since ``clear``, as one integer: 0, or layer, tensor and reason, ascending with the layer."""

    def __init__(self):
        self.code = 0

    def clear(self) -> None:
        self.code = 0

    def note(self, status: int, tensor: str, layer: int = 0) -> None:
        """Keeps a kernel's status unless it is OK or something was noted before."""
        if status and not self.code:
            layer = _BEHIND if tensor in ("final_norm", "head") else layer
            self.code = (layer << 16) | (TENSORS.index(tensor) << 8) | status

    def merge(self, code: int) -> None:
        """Takes over the fault of an earlier stage or another tensor rank."""
        self.code = self.code or code


def place_of(layer: int, tensors: tuple[str, ...]) -> str:
    """Where in a model tensors are, in words."""
    names = ", ".join(tensors)
    return names if tensors[0] in _NO_LAYER else f"layer {layer}, {names}"


def error_of(code: int) -> NumericsError:
    """The error that a fault code stands for."""
    place = place_of(code >> 16, (TENSORS[(code >> 8) & 0xFF],))
    reason = ("NaN or infinity" if code & 0xFF == NOT_FINITE
              else "a value beyond the range of exact sums (block sums below 2**19, outputs below 2**20, KV within float16)")
    return NumericsError(f"{place}: {reason}; the weights may be damaged, or need another --weights format")
