"""Errors that a user can cause or cure. Each message names what was given, what is allowed and what to do.

Exit codes: 2 for usage (the command line, the prompts, the grid), 1 for a failure (files, hardware, numbers).
"""


class LlamaHpcError(Exception):
    """A failure with a message for the user.

    ``collective`` is True when every rank of the world raises the same error at the same place: then the first
    rank alone prints it and all leave; otherwise the rank that raised prints it and ends the job.
    """

    exit_code = 1

    def __init__(self, message: str, *, collective: bool = False):
        super().__init__(message)
        self.collective = collective


class UsageError(LlamaHpcError):
    """What the user asked for cannot be done: options, prompts file, grid, an existing output."""

    exit_code = 2


class CheckpointError(LlamaHpcError):
    """A checkpoint that is truncated, inconsistent or of an unsupported kind."""


class NumericsError(LlamaHpcError):
    """A value left the range in which sums are exact (or became NaN); names layer and tensor."""


class ResultsError(LlamaHpcError):
    """The result file cannot be written or read."""


class RankLost(LlamaHpcError):
    """Another rank has died, or has left what ranks were doing together because of that."""


class DeviceUnavailable(LlamaHpcError):
    """A GPU that was asked for is not there or cannot be used, or was lost."""


class LaunchError(LlamaHpcError):
    """The processes were not started as one MPI job."""
