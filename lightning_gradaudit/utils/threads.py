"""Threads of an audit in the process that trains."""

from __future__ import annotations

import threading

import torch

_changing = threading.Lock()  # or one thread would take another's passing 1 for the usual


def use_single_thread() -> None:
    """Keep the calling thread's arithmetic to itself, for as long as it lives.

    A thread that once calculated in parallel keeps helpers of its own. As soon as the process has more of them than
    there are cores, OpenMP puts every thread to sleep wherever it would wait for a moment, those of training too: a
    small network's training steps then take three times as long, even while the other thread has nothing to do.
    """
    with _changing:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, but also what later threads begin with
        restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restoring.start()
        restoring.join()
