"""What makes a run survive its own end: finished answers are kept at once, and the next run goes on behind them."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.model_job import ModelJob
from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results import check_rescue, read_results
from llama_hpc.results.part_writer import PartWriter
from llama_hpc.results.parts import VERSION, Found, ProgressFolder, check_same_job, try_lock
from llama_hpc.results.records import framed, output_record
from llama_hpc.results.schema import Output
from llama_hpc.results.storage import remove_unfinished
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.runtime.stopping import Stop
from llama_hpc.runtime.topology import hostname

_LOG = logging.getLogger(__name__)
_PATIENCE = 10.0                # seconds in which the ranks of a killed job let go of its lock
_ORPHANED = 120.0               # … or a file server finds that a node has died
Done = frozenset[tuple[int, int]]       # requests and samples with an answer


def identity_of(ready: Sequence[ReadyRequest], weights: str, kv_cache: str) -> dict[str, Any]:
    """What decides the answers of a job, apart from the model's content: runs that differ in it cannot share progress."""
    prompts, sampling = hashlib.sha256(), hashlib.sha256()
    for request in ready:
        prompts.update(json.dumps([request.id, len(request.prompt)]).encode() + request.prompt.astype("<i4").tobytes())
        sampling.update(json.dumps([asdict(request.params), request.limit], sort_keys=True).encode())
    return {"answers": sum(request.params.n for request in ready), "weights": weights, "KV cache": kv_cache,
            "prompts": f"{len(ready)} with hash {prompts.hexdigest()[:16]}",
            "sampling settings": f"of hash {sampling.hexdigest()[:16]}"}


def _answered(found: Found) -> Done:
    return frozenset((output.request, output.sample) for output in found.outputs)


class Durable:
    """The progress of a run into ``output``. Methods are called in the order in which they stand here.

    ``resume``: goes on behind what earlier runs have finished. ``interval``: seconds of work that a node's death may cost.
    ``rescue``: a folder for what the output's file system does not take. ``dry``: ``examine`` finds the same and the same
    errors, but locks and changes nothing; nothing else may be called then.
    """

    def __init__(self, output: str, resume: bool, overwrite: bool, interval: float, rescue: str | None, dry: bool = False):
        if resume and overwrite:
            raise UsageError("--resume goes on with a job, --overwrite begins it anew: give one of them")
        self.output, self.resume, self.overwrite = output, resume, overwrite
        self.interval, self.rescue, self.dry = interval, Path(rescue) if rescue else None, dry
        self.folder, self.found = ProgressFolder(output), Found()
        self.identity: dict[str, Any] = {}
        self.run: int | None = None             # which one this is of the job's runs
        self.writer: PartWriter | None = None
        self._retries = 0                       # of writers that are closed
        self.complete = self.ours = False       # the output; the folder, which some rank of this job has locked
        self.stop: Stop | None = None           # told when a file system has failed for good

    def examine(self, identity: dict[str, Any]) -> Done:
        """First rank, before weights are read: locks the output, and returns what has an answer already.

        Sets ``complete`` where an earlier run has finished all. Raises UsageError, ResultsError.
        """
        self.identity = identity
        exists = os.path.isfile(self.output)
        check_rescue(self.rescue)
        if self.dry:
            self.folder.check_free()
        else:
            self._lock(_PATIENCE if self.resume else 0)
        if not self.resume:
            if not self.overwrite and not self.folder.is_empty():
                raise UsageError(f"an earlier run into {self.output} was not finished: --resume goes on with it, --overwrite "
                                 "begins anew")
            if not self.dry:
                self.folder.wait_for_writers()
                self.folder.clear()
        elif exists and self._is_complete():
            self.complete = True
            # Where the lock is held.
            self.folder.remove()
        else:
            self._take_over()
        self.run = max([self.folder.next_run, *(1 + run["run"] for run in self.found.runs)])
        return _answered(self.found)

    def look_again(self, identity: dict[str, Any], start_time: str) -> Done:
        """First rank, after others were lost: what has an answer by now. It takes the lock over from a first rank that was lost.

        ``start_time``: as in the provenance of this run's output; sets ``complete`` where that is there and complete.
        """
        self.identity = identity
        if not self.folder.locked:
            self._lock(_ORPHANED)
        if os.path.isfile(self.output):
            with read_results(self.output) as results:
                self.complete = results.status == "complete" and results.provenance.get("start_time") == start_time
        if self.complete:
            self.folder.remove()
            return frozenset()
        return _answered(self.folder.read(self.identity, self.rescue))

    def _lock(self, patience: float) -> None:
        holder = {"process": os.getpid(), "host": hostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        job = os.environ.get("SLURM_JOB_ID")
        self.folder.lock(holder | ({"SLURM job": job} if job else {}), patience)
        remove_unfinished(self.output)

    def _is_complete(self) -> bool:
        with read_results(self.output) as results:
            before = results.provenance.get("identity")
            if before is None:
                raise UsageError(f"cannot resume {self.output}: it does not say which job it is of: give another output, or "
                                 "--overwrite in place of --resume")
            check_same_job(Path(self.output), before, self.identity)
            if results.status == "complete":
                _LOG.info("%s is complete already: %d answers, digest %s", self.output, results.num_outputs, results.digest)
            return results.status == "complete"

    def _take_over(self) -> None:
        if self.folder.is_empty() and not self.rescue:
            # Nothing is finished, so there is nothing that must not change.
            if not self.dry:
                self.folder.clear()
            return
        check_same_job(self.folder.output, self.folder.identity() or {}, self.identity)
        if not self.dry:
            self.folder.wait_for_writers()
        self.found = self.folder.read(self.identity, self.rescue)
        if self.found.runs:
            torn = f", {self.found.torn} bytes of half written ones cut off" if self.found.torn else ""
            _LOG.info("resuming: %d answers of %d earlier run%s%s", len(self.found.outputs), len(self.found.runs),
                      "s" * (len(self.found.runs) > 1), torn)

    def begin(self, job: ModelJob, number: int = 0) -> None:
        """With the model loaded: readies each leader's part, which is that of replica ``number`` for the first one of the grid.

        Collective over the job. Raises UsageError, ResultsError.
        """
        self.identity, self.run = on_first(job.comm, self._identify, job.content_hash)
        with agreed(job.comm, "keeping the progress"):
            if job.grid.is_leader:
                self.open_part(job, number + job.grid.data_index)

    def open_part(self, job: ModelJob, number: int) -> None:
        """Leader of replica ``number``: readies the file of its answers. Not collective. Raises ResultsError."""
        folder = self.folder.path
        if not folder.is_dir():
            raise ResultsError(f"{folder}, made by the first rank, is not there on {hostname()}: the output must be on a file "
                               "system that all nodes share")
        self.folder.try_to_write()
        header = {"version": VERSION, "identity": self.identity, "replica": number, "host": hostname(), "pid": os.getpid(),
                  "grid": str(job.grid.shape), "ranks": job.comm.size, "threads": job.threads,
                  "start_time": datetime.now(UTC).isoformat(timespec="seconds")}
        self.writer = PartWriter(self.folder.part(self.run, number), framed(header), self.interval, self.rescue, try_lock,
                                 self._stop_the_run)

    def _stop_the_run(self) -> None:
        if self.stop:
            self.stop.ask("a file system that fails")

    def _identify(self, content_hash: str) -> tuple[dict[str, Any], int]:
        before, now = self.found.identity or self.folder.identity(), self.identity | {"model content": content_hash}
        check_same_job(self.folder.output, before or {}, now)
        self.folder.identify(now, self.run)
        return now, self.run

    def keep(self, output: Output) -> None:
        """Leader: a finished answer."""
        self.writer.append(output_record(output))

    def collect(self, job: ModelJob) -> Found:
        """All answers of all runs, on the first rank (elsewhere nothing). Collective over the job.

        Raises ResultsError where some could not be kept.
        """
        # Another rank may be longer about it: the end of the job would cost what that has finished.
        with agreed(job.comm, "keeping the answers", patient=True):
            if self.writer:
                self.writer.settle()
            job.incidents["write_retries"] = self._retries + (self.writer.retries if self.writer else 0)
        with agreed(job.comm, "reading the progress"):
            if not job.first:
                return Found()
            self.identity = self.folder.identity() or self.identity
            return self.folder.read(self.identity, self.rescue, self.found)

    def close(self) -> None:
        """This rank will keep no more answers; those that it has kept are on disk. Raises ResultsError where they are not."""
        writer, self.writer = self.writer, None
        if writer:
            writer.close()
            self._retries += writer.retries

    def end(self) -> None:
        """First rank: the output is complete."""
        self.folder.remove()

    def abandon(self) -> None:
        """The run has failed. What is finished stays for the next one; where nothing is, nothing is left. Not collective."""
        with suppress(ResultsError):
            self.close()
        if self.folder.locked or self.ours:
            self.folder.discard()
        self.folder.release()
