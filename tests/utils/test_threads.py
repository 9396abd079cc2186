"""Threads that calculate alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_gradaudit.utils.threads import use_single_thread


@pytest.mark.parametrize("threads", [1, 2])
def test_later_threads_begin_as_they_did_before(threads):
    """The number of arithmetic threads that later threads begin with belongs to the process."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            with ThreadPoolExecutor(1, initializer=use_single_thread) as pool:
                alone = pool.submit(torch.get_num_threads).result()
            with ThreadPoolExecutor(1) as pool:
                later = pool.submit(torch.get_num_threads).result()
            assert (alone, later, torch.get_num_threads()) == (1, threads, threads)
    finally:
        torch.set_num_threads(usual)
