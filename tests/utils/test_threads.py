"""What a thread of an audit takes of the process that trains, counted by the operating system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from lightning_gradaudit.attacks.compilation import evaluation_graph as compilation
from lightning_gradaudit.execution.executors import ProcessExecutor, make_executor

POOLS = {
    "plain": lambda: ThreadPoolExecutor(1),
    "audit": lambda: make_executor("thread", device=torch.device("cpu"))[0],
    "sender": lambda: ProcessExecutor()._packing,
    "compiler": lambda: compilation._compiler,
}

def threads():
    return len(os.listdir("/proc/self/task"))

def calculate():
    return torch.rand(1000, 1000).sin().sum()

torch.set_num_threads(2)
calculate()
pool = POOLS[sys.argv[1]]()
before = threads()
pool.submit(calculate).result()
print(threads() - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not count a process's threads")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch calculates without OpenMP")
@pytest.mark.parametrize(("pool", "more"), [("plain", 2), ("audit", 1), ("sender", 1), ("compiler", 1)])
def test_a_thread_of_an_audit_brings_no_helpers(pool, more):
    """Each would slow training for as long as it lives; training keeps its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, pool], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(more), "2"]
