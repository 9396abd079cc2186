"""How far the replayed training step may lie from the true one."""

from __future__ import annotations

import threading

import torch

from lightning_gradaudit.audit.record_checks import LARGEST_TOLERANCE
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import SelfTest

SELF_TEST_TOLERANCE = {"32-true": 1e-3, "64-true": 1e-6}
"""Largest relative error of the simulated gradient by precision; reduced precisions get 5e-2."""
PROCESS_RANDOMNESS = "the step draws numpy's or Python's random numbers, which an audit in a thread cannot replay"
"""Why a self-test fails that would pass on a main thread; part of the record's reason."""

OTHER_BUFFERS = (
    "the buffers after the step are not those of a replay: was the momentum of a BatchNorm layer changed, or did other "
    "batches pass it between? Where the client keeps its buffers, say ThreatModel(buffers_shared=False)"
)
"""Why a self-test fails whose gradient is right; part of the record's reason."""


def self_test_tolerance(observation: Observation) -> float:
    """Return the largest relative error of the simulated gradient that is still rounding.

    An adaptive optimizer divides every coordinate by its own size, so that rounding in weights without a gradient
    (a bias before BatchNorm) moves them by a whole learning rate: its "delta" is known as well as reduced precision is.
    So is a gradient from another kind of device: unless told otherwise, GPUs multiply in TF32, of 10 bits.
    """
    local = observation.protocol.optimizer
    adaptive = local is not None and local.kind is not torch.optim.SGD
    exact = SELF_TEST_TOLERANCE.get(observation.threat_model.precision, LARGEST_TOLERANCE)
    return max(exact, LARGEST_TOLERANCE) if adaptive or observation.was_computed_on_other_device else exact


def why_self_test_failed(observation: Observation, found: SelfTest) -> str:
    """Return why a replay differs from the step; empty where it does not or nobody knows."""
    tolerance = self_test_tolerance(observation)
    if found.error <= tolerance < found.statistics:
        return OTHER_BUFFERS
    drew = any(part.process_rng is not None for step in observation.protocol.steps for part in step)
    if found.error <= tolerance or threading.current_thread() is threading.main_thread():
        return ""
    return PROCESS_RANDOMNESS if drew else ""
