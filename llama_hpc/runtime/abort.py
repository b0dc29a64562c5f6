"""One clear line for every error, from one rank, and an exit for all: nobody is left waiting for a rank that failed."""

import atexit
import faulthandler
import os
import socket
import sys
import time
import traceback
from array import array
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import NoReturn

from llama_hpc.errors import LlamaHpcError, RankLost, UsageError
from llama_hpc.runtime import log
from llama_hpc.runtime.activity import doing
from llama_hpc.runtime.launch import environment_rank, is_first, let_first_speak, started_mpi

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_LAST = 3                       # seconds that MPI gets to end the job
_PASS_ON = 0.1                  # seconds that what a rank says last takes at most to get to the launcher
_WAIT, _NAP = 1.5, 0.005        # seconds that a rank which has failed waits for the others; between looks

_guarded = False                # whether an error that is not caught ends the job


def guarded(function) -> int:
    """Run ``function()`` on this rank and turn what it raises into a printed line and an exit code.

    Returns the function's own result (None: 0) or the error's exit code. An error that all ranks share
    (``error.collective``) is printed by the first rank and returned by all, so that MPI ends in order. Any other one
    ends the whole job through MPI_Abort, which does not return. LLAMA_HPC_DEBUG=1 shows tracebacks.
    """
    global _guarded
    _guarded = True
    try:
        return function() or 0
    except SystemExit as stop:
        if not stop.code:
            return 0
        message = stop.code if isinstance(stop.code, str) else "left early"
        return _leave(LlamaHpcError(message), stop.code if isinstance(stop.code, int) else 1)
    except BrokenPipeError:
        # The reader of our output has gone (`llama-hpc show … | head`): stop without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(None, 1)
    except KeyboardInterrupt:
        return _leave(LlamaHpcError("interrupted"), INTERRUPTED)
    except Exception as error:
        shown = _explained(error)
        return _leave(shown, shown.exit_code)


def end_process(code: int) -> NoReturn:
    """Ends this process in order: exit functions, MPI (collective over the world then, as MPI_Finalize is), standard streams.

    What is left out is the interpreter's taking down of every module, which takes a third of a second once Numba is loaded.
    """
    atexit._run_exitfuncs()
    if (MPI := started_mpi()) is not None:
        MPI.Finalize()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or 1
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"llama-hpc: error: cannot write to the standard output: {error.strerror}\n")
    sys.stderr.flush()
    os._exit(code)


def end_job_on_errors() -> None:
    """From now on an exception that ends the script of one rank ends the whole job: the others would wait for it for ever.

    Ours are one line, others keep their traceback. Interactive sessions, which go on after an exception, do not call the hook.
    """
    sys.excepthook = _end_job


def _end_job(kind, error, trace) -> None:
    if isinstance(error, LlamaHpcError | KeyboardInterrupt):
        def again():
            raise error
        guarded(again)
        return
    sys.__excepthook__(kind, error, trace)
    _leave(None, 1)


@contextmanager
def agreed(comm, what: str, patient: bool = False):
    """A block that succeeds on all ranks of ``comm`` or fails on all of them. Collective over ``comm``.

    When the body raised on some rank, every rank raises the error of the lowest one; ``what`` (such as ``reading the
    prompts``) completes errors that are not ours. The body must not communicate over ``comm`` unless it
    fails on all ranks alike. Costs one Iallreduce of one integer when nothing fails.

    Under ``guarded`` a rank that fails does not wait for ranks that are long about the block, unless it is ``patient``: it raises
    its own error, alone.

    The error is ``collective`` when ``comm`` spans the world. For a smaller ``comm`` its first rank prints the error
    and ends the job; the others wait for that end.
    """
    from mpi4py import MPI

    failure = None
    with doing(what):
        try:
            yield
        except (MPI.Exception, RankLost):
            # Others have failed too, or will: there is nobody to agree with.
            raise
        except Exception as error:
            failure = _explained(error, what)

        first = array("i", [comm.size if failure is None else comm.rank])
        if not _come_together(comm.Iallreduce(MPI.IN_PLACE, first, MPI.MIN), patient or failure is None or not _guarded):
            raise failure
        if first[0] == comm.size:
            return
        if comm.rank == first[0] and not hasattr(failure, "where"):
            failure.where = _here()
        shared = comm.bcast(failure, root=first[0])
    shared.collective = comm.size == MPI.COMM_WORLD.size
    shared.reported_elsewhere = not shared.collective and comm.rank != 0
    shared.__cause__ = failure
    raise shared


def _come_together(request, patient: bool) -> bool:
    """Waits for the other ranks, for a while where it is not to be ``patient``; returns whether they have come."""
    if patient:
        request.Wait()
        return True
    end = time.monotonic() + _WAIT
    while not (come := request.Test()) and time.monotonic() < end:
        time.sleep(_NAP)
    return come


def on_first(comm, function, *args):
    """The result of ``function(*args)``, run on rank 0 of ``comm`` and broadcast. Collective over ``comm``.

    Errors raise on every rank, as with :func:`agreed`.
    """
    result = None
    with agreed(comm, f"running {getattr(function, '__name__', 'a function')}"):
        if comm.rank == 0:
            result = function(*args)
    return comm.bcast(result, root=0)


def _explained(error: Exception, what: str = "") -> LlamaHpcError:
    """``error`` as one of ours: itself, or a line that says where and what; a bug's traceback goes to a file."""
    if isinstance(error, LlamaHpcError):
        return error
    if _lost_rank(error):
        return RankLost("another rank of this job has died, and what these ranks do does not outlive that")
    doing = f" while {what}" if what else ""
    if isinstance(error, MemoryError):
        detail = f": {error}" if str(error) else ""
        ours = LlamaHpcError(f"out of memory{doing} on {_here()}{detail}")
    elif isinstance(error, OSError) and error.strerror:
        ours = LlamaHpcError(f"{error.filename or 'system'}: {error.strerror}{doing} on {_here()}")
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        ours = LlamaHpcError(f"internal error{doing} on {_here()}: {text} (traceback {_keep_traceback(error)})")
    ours.__cause__, ours.where = error, ""
    return ours


def _lost_rank(error: Exception) -> bool:
    """Whether an exception of MPI says that a rank is gone, as it can where the job was started with fault tolerance."""
    MPI = started_mpi()
    return bool(MPI and isinstance(error, MPI.Exception)
                and error.Get_error_class() in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED))


def _leave(error: LlamaHpcError | None, code: int) -> int:
    """Print ``error`` where it is this rank's to print; end the job unless all ranks leave together."""
    if error is not None:
        log.keep_failure(error)
    MPI = started_mpi()
    if MPI is None or MPI.COMM_WORLD.size == 1:
        # Under a launcher, but not joined by MPI: what is wrong with the command line is wrong for all.
        if error is not None and (is_first() or not (error.collective or isinstance(error, UsageError))):
            _print(error)
        let_first_speak()
        return code
    if error is not None and error.collective:
        if is_first():
            _print(error)
        return code

    # Of ranks that fail at the same moment the lowest one speaks: its abort ends the others while they wait.
    rank = MPI.COMM_WORLD.rank
    turn = min(0.5 * rank, 2 + rank / MPI.COMM_WORLD.size)
    time.sleep(10 if getattr(error, "reported_elsewhere", False) else turn)
    if error is not None:
        _print(error, getattr(error, "where", _here()))
    sys.stdout.flush()
    sys.stderr.flush()
    # A launcher may not pass on what it has not read when it hears of the end.
    time.sleep(_PASS_ON)
    MPI.COMM_WORLD.Abort(code)
    return code


def end_at_once(error: LlamaHpcError) -> None:
    """Prints ``error`` and ends the job, from any thread, whatever the main thread and other ranks are doing."""
    _print(error, _here())
    # If MPI does not come back from ending the job, perhaps with the interpreter's lock.
    faulthandler.dump_traceback_later(_LAST, exit=True, file=open(os.devnull, "w"))     # noqa: SIM115
    log.keep_failure(error)
    MPI = started_mpi()
    if MPI is not None and MPI.COMM_WORLD.size > 1:
        time.sleep(_PASS_ON)
        MPI.COMM_WORLD.Abort(error.exit_code)
    os._exit(error.exit_code)


def _print(error: LlamaHpcError, where: str = "") -> None:
    if _debugging():
        traceback.print_exception(error)
    sys.stdout.flush()
    text = " ".join(str(error).splitlines())
    kind = "" if text.startswith("internal error") else "error: "
    sys.stderr.write(f"llama-hpc: {kind}{text}{where and f' [{where}]'}\n")
    sys.stderr.flush()


def _here() -> str:
    MPI = started_mpi()
    rank = environment_rank() if MPI is None else MPI.COMM_WORLD.rank
    return f"rank {rank} ({socket.gethostname()})"


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file in the working directory, or else the temporary one; say where it is."""
    if _debugging():
        return "above"
    name = f"llama-hpc-error-{socket.gethostname()}-{os.getpid()}.txt"
    for folder in (Path.cwd(), Path(gettempdir())):
        try:
            (folder / name).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            return f"in {folder / name}"
        except OSError:
            continue
    return "lost: no folder to write it to"


def _debugging() -> bool:
    return os.environ.get("LLAMA_HPC_DEBUG", "0") not in ("", "0")
