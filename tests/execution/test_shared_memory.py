"""Objects on their way to another process: what arrives, what is sent again, and what is left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import current_thread

import pytest
import torch
from conftest import QUICK_WORKERS
from support import HoldingExecutor
from torch import nn

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.execution import executors, shared_memory
from lightning_gradaudit.execution.executors import ProcessExecutor
from lightning_gradaudit.execution.remote import Deferred
from lightning_gradaudit.execution.shared_memory import PackedObject, Packer, SharedMemoryFile
from lightning_gradaudit.utils.pickling import join_tensors, split_tensors

LARGE = 1 << 15
SECONDS = 60  # for what takes two or three where the cores are not busy


def test_an_object_is_put_together_from_other_tensors():
    shared = torch.arange(3.0)
    item = {"a": shared, "again": shared, "b": [torch.ones(2, 2, dtype=torch.bool)], "meta": nn.Linear(2, 1).to("meta")}
    pickled, tensors = split_tensors(item)
    assert [t.shape for t in tensors] == [(3,), (2, 2)]
    found = join_tensors(pickled, [shared + 1, ~tensors[1]])
    assert torch.equal(found["a"], shared + 1)
    assert found["a"] is found["again"]
    assert not found["b"][0].any()
    assert found["meta"].weight.is_meta
    assert split_tensors(item | {"a": -shared, "again": 2 * shared})[0] != pickled, "one tensor is not two"


def test_what_is_pickled_says_nothing_of_the_values():
    assert split_tensors({"a": torch.zeros(9)})[0] == split_tensors({"a": torch.rand(9)})[0]
    assert split_tensors({"a": torch.zeros(9)})[0] != split_tensors({"a": torch.zeros(8)})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_packed_object_arrives_as_it_was_sent(tmp_path, dtype):
    sent = (torch.rand(3, LARGE) * 9).to(dtype).t(), torch.tensor(1.5), "word"
    packed = Packer(partial(SharedMemoryFile, folder=tmp_path)).pack(sent)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == sent[0].numel() * sent[0].element_size()
    large, small, word = PackedObject(packed.pickled, packed.buffers, packed.forms).unpack()
    assert torch.equal(large, sent[0])
    assert large.dtype == dtype
    assert (small, word) == (sent[1], "word")
    large.zero_()
    assert torch.equal(packed.unpack()[0], sent[0]), "whoever changes what arrived changes a copy"


def test_only_what_has_changed_is_written_again(tmp_path):
    sender = Packer(partial(SharedMemoryFile, folder=tmp_path))
    frozen, trained = torch.rand(LARGE), torch.rand(LARGE)
    first = sender.pack([frozen, trained])
    second = sender.pack([frozen.clone(), trained + 1])
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(second.unpack()[0], frozen)
    assert torch.equal(second.unpack()[1], trained + 1)
    assert torch.equal(first.unpack()[1], trained)
    del first
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 2, "what nobody refers to is gone"
    torch.testing.assert_close(sender.pack([torch.zeros(2 * LARGE), trained + 1]).unpack()[0], torch.zeros(2 * LARGE))


def _total(tensor: torch.Tensor, factor: float) -> tuple[float, float, int]:
    tensor += 1
    return float(tensor.sum()), factor, torch.get_num_threads()


needs_shared_memory = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")


@needs_shared_memory
def test_a_worker_process_reads_what_was_shared():
    executor = ProcessExecutor(threads=2)
    folder = Path(executor._packer.write.keywords["folder"])
    assert folder.stat().st_mode & 0o077 == 0, "snapshots are private"
    try:
        tensor = torch.ones(LARGE)
        futures = [executor.submit(_total, tensor, factor=number) for number in range(3)]
        assert [future.result(timeout=120) for future in futures] == [(2.0 * LARGE, n, 2) for n in range(3)]
        assert len(list(folder.iterdir())) == 1
        assert float(tensor.sum()) == LARGE
    finally:
        executor.shutdown(wait=True)
    assert not folder.exists()


@pytest.mark.parametrize("why", ["full", "absent"])
def test_without_room_in_shared_memory_a_worker_gets_a_pickle(monkeypatch, why):
    def full(content, folder):
        raise OSError(28, "No space left on device")

    if why == "full":
        monkeypatch.setattr(executors, "SharedMemoryFile", full)
    else:
        monkeypatch.setattr(executors, "shared_memory_folder", lambda: None)
    executor = ProcessExecutor()
    executor._pool = HoldingExecutor()
    executor.submit(_total, torch.ones(LARGE), factor=1)
    executor._packing.shutdown(wait=True)
    ((sent, arguments),) = executor._pool.jobs
    assert sent is _total
    assert arguments[0].sum() == LARGE


def test_what_is_made_on_the_way_is_made_by_the_packing_thread():
    executor = ProcessExecutor()
    executor._pool = HoldingExecutor()
    threads = []
    executor.submit(_total, Deferred(lambda: threads.append(current_thread().name) or torch.ones(5)), factor=1)
    failed = executor.submit(_total, Deferred(lambda: 1 / 0), factor=1)
    executor._packing.shutdown(wait=True)
    ((_, (packed,)),) = executor._pool.jobs
    _, (made,), _ = packed.unpack()
    assert torch.equal(made, torch.ones(5))
    assert threads[0].startswith("gradaudit-packer")
    assert isinstance(failed.exception(timeout=0), ZeroDivisionError)


def test_settings_out_of_range_are_refused_by_name():
    with pytest.raises(InvalidInputError, match="threads"):
        ProcessExecutor(threads=0)


def test_a_lost_worker_and_a_shutdown_settle_every_future():
    executor = ProcessExecutor()
    lost = executor.submit(os._exit, 1)
    assert type(lost.exception(timeout=120)).__name__ in ("TerminatedWorkerError", "BrokenProcessPool")
    executor.shutdown(wait=True)

    executor = ProcessExecutor()
    with pytest.raises(ZeroDivisionError):
        executor.submit(divmod, 1, 0).result(timeout=120)
    busy = [executor.submit(time.sleep, 600) for _ in range(3)]
    assert busy[2].cancel()
    start = time.monotonic()
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in busy)
    assert time.monotonic() - start < 60
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(abs, -1)


def test_a_worker_has_the_lowest_priority(monkeypatch):
    without = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if Path(path) != QUICK_WORKERS]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(without))
    executor = ProcessExecutor()
    try:
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert executor.submit(os.getpriority, os.PRIO_PROCESS, 0).result(timeout=120) == min(19, own + 19)
    finally:
        executor.shutdown(wait=True)


# What is left behind by those who are killed

FIT = """
import os, sys, time, torch
from lightning_gradaudit.execution.executors import ProcessExecutor
executor = ProcessExecutor()
def hang(tensor):
    time.sleep(600)
for number in range(4):
    executor.submit(hang, torch.ones(1 << 20) * number)
while len(os.listdir(executor._folder.path)) < 4:
    time.sleep(0.01)
print(executor._folder.path, *executor._pool._processes, flush=True)
time.sleep(600)
"""


def _is_gone(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def _wait_until(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@needs_shared_memory
def test_a_busy_worker_and_what_it_reads_end_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", FIT], stdout=subprocess.PIPE, text=True) as parent:
        folder, worker = parent.stdout.readline().split()
        try:
            assert len(list(Path(folder).iterdir())) == 4
            assert not _is_gone(int(worker))
        finally:
            parent.kill()
            parent.wait()
        _wait_until(lambda: _is_gone(int(worker)) and not Path(folder).exists())


def test_a_process_whose_parent_is_dead_before_it_looks_ends_at_once():
    code = (
        "import time; from lightning_gradaudit.execution.executors import exit_with_parent; exit_with_parent(1 << 30);"
    )
    assert subprocess.run([sys.executable, "-c", f"{code} time.sleep(60)"], timeout=50, check=False).returncode == 1


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder in place of /dev/shm."""
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    return tmp_path


def _leave(path: Path) -> Path:
    path.mkdir()
    (path / "0").write_bytes(b"private")
    return path


def test_what_dead_processes_left_is_swept_and_nothing_else(memory):
    mine = shared_memory.shared_memory_folder()
    dead = _leave(memory / "gradaudit-snapshots-dead")
    others = [_leave(memory / name) for name in ("gradaudit-run", "other", "gradaudit-snapshot")]
    (memory / "gradaudit-snapshots-link").symlink_to(others[1])
    (memory / "gradaudit-snapshots-file").write_text("no folder")
    next_one = shared_memory.shared_memory_folder()
    assert not dead.exists()
    assert mine.path.is_dir(), "its maker lives"
    assert next_one.path.stat().st_mode & 0o077 == 0
    assert all((other / "0").exists() for other in others)
    assert (memory / "gradaudit-snapshots-link").is_symlink()
    assert (memory / "gradaudit-snapshots-file").exists()
    mine.remove()
    mine.remove()
    assert not mine.path.exists()
    assert next_one.path.is_dir()
    next_one.remove()


def test_a_link_inside_a_dead_folder_is_removed_and_not_followed(memory):
    precious = _leave(memory / "precious")
    (_leave(memory / "gradaudit-snapshots-dead") / "link").symlink_to(precious)
    shared_memory.shared_memory_folder().remove()
    assert (precious / "0").exists()
    assert [path.name for path in memory.iterdir()] == ["precious"]


def test_a_folder_of_another_user_is_left_alone(memory, monkeypatch):
    theirs = _leave(memory / "gradaudit-snapshots-theirs")
    monkeypatch.setattr(shared_memory.os, "geteuid", lambda: os.getuid() + 1)
    assert shared_memory.shared_memory_folder() is None, "nor is one used that is not this user's"
    assert theirs.exists()


def test_whoever_makes_a_folder_that_is_swept_meanwhile_makes_another(memory, monkeypatch):
    locked, swept = shared_memory.lock_folder, []

    def late(path):
        if not swept:
            swept.append(path)
            path.rmdir()
        return locked(path)

    monkeypatch.setattr(shared_memory, "lock_folder", late)
    folder = shared_memory.shared_memory_folder()
    assert folder.path.is_dir()
    assert folder.path not in swept
    folder.remove()


@needs_shared_memory
def test_the_folder_of_a_process_that_died_without_a_worker_is_swept_by_the_next():
    code = (
        "import os; from lightning_gradaudit.execution.shared_memory import shared_memory_folder "
        "as f; print(f().path, flush=True);"
    )
    killed = subprocess.run(
        [sys.executable, "-c", f"{code} os.kill(os.getpid(), 9)"], capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not left.exists()
    assert not Path(ended.stdout.strip()).exists(), "whoever ends as usual leaves nothing"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking
def test_a_forked_copy_has_no_say(memory):
    folder = shared_memory.shared_memory_folder()
    child = os.fork()
    if not child:
        folder.remove()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert folder.path.is_dir()
    assert shared_memory.lock_folder(folder.path) is None
    folder.remove()
