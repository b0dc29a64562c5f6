"""Progress beside an output: what is kept, what a kill may tear, who may write, and what is refused."""

import fcntl
import json
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest

from llama_hpc.errors import ResultsError, UsageError
from llama_hpc.results.parts import ProgressFolder, check_same_job
from llama_hpc.results.records import framed, output_of, output_record, read_records
from llama_hpc.results.schema import Output


def an_output(request, sample=0, tokens=(3, 1, 4), top=0):
    count = len(tokens)
    logprobs = np.linspace(-1, -0.0, count).astype(np.float32)
    return Output(request, sample, np.array(tokens, np.int32), logprobs, f"text {request} \ud800", "stop",
                  {"start": 0.25, "end": float("nan")}, 2,
                  np.arange(count * top, dtype=np.int32).reshape(count, top),
                  np.full((count, top), -1.5, np.float32))


def folder_with(tmp_path, *parts):
    """A progress folder with files of outputs, each named by (run, replica)."""
    folder = ProgressFolder(tmp_path / "out.h5")
    folder.lock({"process": 1}, 0)
    for (run, replica), outputs in parts:
        folder.part(run, replica).write_bytes(framed({"host": "n1", "pid": 7}) + b"".join(map(output_record, outputs)))
    return folder


@pytest.mark.parametrize("top", [0, 3])
def test_a_record_gives_the_answer_back(tmp_path, top):
    path, output = tmp_path / "part", an_output(5, 1, (7, 8), top)
    path.write_bytes(output_record(output))
    records = read_records(path)
    found = output_of(records.payloads[0], 4)
    assert records.torn == 0 and found.attempt == 4
    assert (found.request, found.sample, found.text, found.finish_reason, found.setbacks) == (5, 1, output.text, "stop", 2)
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        assert getattr(found, name).tobytes() == getattr(output, name).tobytes()
        assert getattr(found, name).shape == getattr(output, name).shape
    assert found.timing["start"] == 0.25 and np.isnan(found.timing["end"])


def test_wherever_a_kill_cuts_a_file_whole_records_are_found(tmp_path):
    records = [output_record(an_output(number)) for number in range(3)]
    whole, path, ends = b"".join(records), tmp_path / "part", np.cumsum([len(record) for record in records])
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = read_records(path)
        assert len(found.payloads) == np.searchsorted(ends, size, "right")
        assert found.whole + found.torn == size
    # A node that died may leave room that nothing was written to.
    path.write_bytes(whole[: ends[1]] + bytes(1000))
    assert len(read_records(path).payloads) == 2 and read_records(path).torn == 1000


def test_damage_with_something_behind_it_is_an_error(tmp_path):
    first, second = output_record(an_output(0)), output_record(an_output(1))
    path = tmp_path / "part"
    path.write_bytes(first[:-1] + bytes([first[-1] ^ 1]) + second)
    with pytest.raises(ResultsError, match=r"damaged at byte 0 of \d+, behind 0 whole records: restore it, or remove"):
        read_records(path)


def test_answers_of_all_runs_and_replicas_are_found_once(tmp_path):
    again = an_output(1)
    folder = folder_with(tmp_path, ((0, 0), [an_output(0), again]), ((0, 1), [an_output(2)]), ((10, 0), [again, an_output(3, 1)]),
                         ((2, 0), []))
    found = folder.read({})
    assert sorted((o.request, o.sample, o.attempt) for o in found.outputs) == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 10)]
    assert [(run["run"], run["answers"], run["host"]) for run in found.runs] == [(0, 3, "n1"), (2, 0, "n1"), (10, 1, "n1")]
    assert folder.next_run == 11


def test_a_part_without_answers_is_empty_unless_somebody_writes_it(tmp_path, held):
    folder = folder_with(tmp_path, ((0, 0), []), ((0, 1), []))
    folder.release()
    assert folder.is_empty()
    held(folder.part(0, 1), 30)
    assert not folder.is_empty()
    assert not folder_with(tmp_path, ((0, 0), [an_output(1)])).is_empty()


def test_two_different_answers_are_an_error(tmp_path):
    folder = folder_with(tmp_path, ((0, 0), [an_output(1)]), ((1, 0), [an_output(1, tokens=(3, 1, 5))]))
    with pytest.raises(ResultsError, match=r"two different answers to request 1 \(sample 0\), of runs 0 and 1"):
        folder.read({})


def test_half_written_answers_are_cut_off_and_counted(tmp_path):
    folder = folder_with(tmp_path, ((0, 0), [an_output(1), an_output(2)]))
    part = folder.part(0, 0)
    part.write_bytes(part.read_bytes()[:-5])
    found = folder.read({})
    assert [output.request for output in found.outputs] == [1]
    assert found.torn == len(output_record(an_output(2))) - 5


def test_a_rescue_folder_completes_what_is_there(tmp_path):
    folder = folder_with(tmp_path, ((0, 0), [an_output(1)]))
    rescue = tmp_path / "rescue"
    (rescue / folder.path.name).mkdir(parents=True)
    (rescue / folder.path.name / "part-0-0-3fa2b1.log").write_bytes(framed({"weights": "q8"}) + output_record(an_output(2)))
    (rescue / folder.path.name / "part-0-1-77e0a9.log").write_bytes(framed({"weights": "q8"}) + output_record(an_output(3)))
    assert sorted(output.request for output in folder.read({}, rescue).outputs) == [1, 2, 3]
    folder.remove()
    assert list(rescue.iterdir()) == []


def test_a_rescue_folder_may_have_parts_of_other_jobs(tmp_path, caplog):
    folder = ProgressFolder(tmp_path / "out.h5")
    (tmp_path / "rescue" / folder.path.name).mkdir(parents=True)
    other = tmp_path / "rescue" / folder.path.name / "part-0-0-3fa2b1.log"
    other.write_bytes(framed({"identity": {"weights": "q4"}}) + output_record(an_output(2)))
    assert folder.read({"weights": "q8"}, tmp_path / "rescue").outputs == []
    assert f"{other} is of another job: left alone" in caplog.text
    assert len(folder.read({"weights": "q4"}, tmp_path / "rescue").outputs) == 1


def test_a_part_of_another_job_is_an_error(tmp_path):
    folder = ProgressFolder(tmp_path / "out.h5")
    folder.path.mkdir()
    folder.part(0, 0).write_bytes(framed({"identity": {"weights": "q4"}}) + output_record(an_output(2)))
    with pytest.raises(ResultsError, match=r"part-0-0.log is of another job \(weights was q4, now q8\): move it away"):
        folder.read({"weights": "q8"})


def test_what_was_read_before_is_there_though_its_files_are_not(tmp_path):
    folder = folder_with(tmp_path, ((0, 0), [an_output(1), an_output(2)]))
    known = folder.read({})
    folder.part(0, 0).unlink()
    folder.part(1, 0).write_bytes(framed({"host": "n2"}) + output_record(an_output(3)))
    found = folder.read({}, known=known)
    assert [(output.request, output.attempt) for output in found.outputs] == [(1, 0), (2, 0), (3, 1)]
    assert [(run["run"], run["answers"], run["host"]) for run in found.runs] == [(0, 2, "n1"), (1, 1, "n2")]


def test_a_job_that_has_finished_nothing_leaves_nothing(tmp_path):
    folder = folder_with(tmp_path)
    folder.identify({}, 3)
    assert folder.next_run == 4
    # Whichever rank it is that fails: not only the one with the lock.
    ProgressFolder(folder.output).discard()
    assert not folder.path.exists()
    folder = folder_with(tmp_path, ((0, 1), [an_output(1)]))
    folder.identify({}, 0)
    folder.discard()
    assert sorted(path.name for path in folder.path.iterdir()) == ["job.json", "lock", "part-0-1.log"]


def _hold(path, kind, seconds, ready):
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, kind)
    ready.set()
    time.sleep(seconds)


@pytest.fixture
def held():
    """A function that has another process lock a file for a while."""
    context, processes = multiprocessing.get_context("fork"), []
    def hold(path, seconds, kind=fcntl.LOCK_EX):
        ready = context.Event()
        processes.append(context.Process(target=_hold, args=(path, kind, seconds, ready)))
        processes[-1].start()
        assert ready.wait(10)
    yield hold
    for process in processes:
        process.kill()
        process.join()


def test_a_second_job_is_told_who_has_the_output(tmp_path, held):
    folder = folder_with(tmp_path)
    folder.release()
    held(folder.path / "lock", 30)
    with pytest.raises(ResultsError, match=r"out.h5 is being written by process 1: wait for its end, or give another output"):
        ProgressFolder(tmp_path / "out.h5").lock({}, 0)


def test_whoever_fails_to_lock_removes_nothing(tmp_path, held):
    folder = folder_with(tmp_path)
    folder.release()
    held(folder.path / "lock", 30)
    other = ProgressFolder(tmp_path / "out.h5")
    with pytest.raises(ResultsError):
        other.lock({}, 0)
    other.remove()
    assert (folder.path / "lock").exists()


def test_a_lock_whose_job_ends_meanwhile_is_made_anew(tmp_path):
    """Another job holds it, and removes the folder when it is done."""
    first, second = folder_with(tmp_path), ProgressFolder(tmp_path / "out.h5")
    ending = threading.Timer(0.5, first.remove)
    ending.start()
    second.lock({"process": 2}, 20)
    ending.join()
    assert second.in_use() and json.loads((second.path / "lock").read_text()) == {"process": 2}


def test_a_lock_that_is_given_back_in_time_is_waited_for(tmp_path, held):
    folder = folder_with(tmp_path)
    folder.release()
    held(folder.path / "lock", 0.5)
    ProgressFolder(tmp_path / "out.h5").lock({}, 20)


def test_ranks_that_still_write_are_waited_for(tmp_path, held):
    folder = folder_with(tmp_path, ((0, 0), [an_output(1)]))
    held(folder.part(0, 0), 1.0)
    with pytest.raises(ResultsError, match=r"still writes .*part-0-0.log after 0 s \(process 7 on n1\): end that process"):
        folder.wait_for_writers(0.2)
    folder.wait_for_writers(20)


def test_another_job_is_told_what_differs(tmp_path):
    folder = folder_with(tmp_path)
    folder.identify({"weights": "q8", "prompts": "2 with hash a"}, 0)
    assert ProgressFolder(tmp_path / "out.h5").identity() == {"weights": "q8", "prompts": "2 with hash a"}
    with pytest.raises(UsageError, match="weights was q8, now q4; prompts was 2 with hash a, now 3 with hash b"):
        check_same_job(folder.output, folder.identity(), {"weights": "q4", "prompts": "3 with hash b", "model content": "c"})


def test_progress_of_a_newer_version_is_refused(tmp_path):
    folder = folder_with(tmp_path)
    folder.identify({}, 0)
    path = folder.path / "job.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ResultsError, match="is of version 2, this program knows version 1: use a newer one"):
        folder.identity()
    path.unlink()
    folder.part(0, 0).write_bytes(framed({"version": 2}))
    with pytest.raises(ResultsError, match=r"part-0-0.log is of version 2, this program knows version 1: use a newer one"):
        folder.identity()
