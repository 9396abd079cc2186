"""Threads of an audit in the process that trains."""

from __future__ import annotations

import threading

import torch

_changing = threading.Lock()  # else one thread would read the temporary 1 of another as the usual number


def use_single_thread() -> None:
    """Let the calling thread do its arithmetic alone, for as long as it lives.

    A thread that once calculated in parallel keeps its own helper threads. As soon as the process has more of them than
    there are cores, OpenMP puts every waiting thread to sleep instead of spinning, those of training too: a small
    network's training steps then take three times as long, even while the other thread is idle.
    """
    with _changing:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # for this thread, but also the default of later threads
        restoring = threading.Thread(target=torch.set_num_threads, args=(usual,))
        restoring.start()
        restoring.join()
