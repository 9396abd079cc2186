"""What surrounds a CUDA graph, with a recording in its place that replays at fixed addresses as one does."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from lightning_gradaudit.attacks.compilation.cuda_graph import CudaGraphFunction


def scaled_sum(weights, inputs):
    return (weights * inputs).sum(), weights + inputs


class Recording:
    """Replays a call on the tensors of its capture, into the tensors of its first results."""

    def __init__(self):
        self.captures = 0

    def __call__(self, function, arguments):
        self.captures += 1
        results = function(*arguments)

        def replay():
            for place, value in zip(results, function(*arguments), strict=True):
                place.copy_(value)

        return replay, results


@pytest.fixture
def recording():
    return Recording()


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_every_call_has_its_own_results(recording):
    captured = CudaGraphFunction(scaled_sum, recording)
    weights = torch.rand(5)
    inputs = [torch.rand(5) for _ in range(4)]
    found = [captured(weights, x) for x in inputs]
    for each, x in zip(found, inputs, strict=True):
        assert_equal(each, scaled_sum(weights, x))
    assert recording.captures == 1


def test_weights_that_change_in_place_are_noticed(recording):
    captured = CudaGraphFunction(scaled_sum, recording)
    weights, inputs = torch.rand(5), torch.rand(5)
    captured(weights, inputs)
    weights.mul_(2)
    assert_equal(captured(weights, inputs), scaled_sum(weights, inputs))


def test_problems_that_take_turns_do_not_see_each_other_s_weights(recording):
    captured = CudaGraphFunction(scaled_sum, recording)
    problems = [(torch.rand(5), torch.rand(5)) for _ in range(2)]
    for _ in range(2):
        for problem in problems:
            assert_equal(captured(*problem), scaled_sum(*problem))
    del problem, problems
    for _ in range(20):  # new weights at the addresses of those that are gone
        problem = torch.rand(5), torch.rand(5)
        assert_equal(captured(*problem), scaled_sum(*problem))


def test_threads_take_turns(recording):
    captured = CudaGraphFunction(scaled_sum, recording)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(1000, generator=generator)
        for _ in range(50):
            inputs = torch.rand(1000, generator=generator)
            total, moved = captured(weights, inputs)
            if not torch.equal(moved, weights + inputs) or not torch.equal(total, (weights * inputs).sum()):
                wrong.append(seed)

    threads = [Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert recording.captures == 1


def test_without_a_capture_the_function_is_called():
    attempts = []

    def refuses(function, arguments):
        attempts.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    captured = CudaGraphFunction(scaled_sum, refuses)
    for _ in range(2):
        problem = torch.rand(5), torch.rand(5)
        assert_equal(captured(*problem), scaled_sum(*problem))
    assert len(attempts) == 1
