"""Audits on a real Ray cluster of two nodes, one of which is lost on the way."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn

from lightning_gradaudit import Auditor, Budget, Snapshot, audit_snapshot
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.execution.ray_executor import RayExecutor

AUDITS = 6
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True, kw_only=True)
class Held(Attack):
    """Note the node in a folder, wait for leave, and return mid-grey."""

    folder: str

    def run(self, observation, *, budget, generator):
        import ray

        node = ray.get_runtime_context().get_node_id()
        (Path(self.folder) / f"{node}-{os.getpid()}-{time.time_ns()}").touch()
        while not (Path(self.folder) / "go").exists():
            time.sleep(0.02)
        return grey(observation)


def grey(observation) -> Reconstruction:
    return Reconstruction(
        inputs=torch.full(observation.shape, 0.5),
        labels=None,
        matching_loss=1.0,
        evaluations=1,
        outcome=Outcome.BUDGET_SPENT,
    )


def snapshot(step: int) -> Snapshot:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = torch.rand(2, 1, 32, 32), torch.tensor([0, 2])
    return Snapshot.from_batch(model, batch, loss=nn.functional.cross_entropy, labels_known=True, step=step)


@pytest.fixture(scope="module")
def cluster():
    """A head without room for audits, and nodes that come and go."""
    import ray
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", ":".join(sys.path))
        memory = {"object_store_memory": 100 * 1024**2}
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
        try:
            ray.init(address=started.address, log_to_driver=False, configure_logging=False)
            for _ in range(2):
                started.add_node(num_cpus=1, resources={"audit": 1}, **memory)
            started.wait_for_nodes()
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def wait_until(condition, *, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the cluster is too slow"
        time.sleep(0.05)


def workers_on(folder: Path, node: str) -> list[int]:
    """Return the processes that audits have begun in."""
    return [int(path.name.split("-")[1]) for path in folder.iterdir() if path.name.startswith(node)]


def is_gone(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_audits_survive_the_loss_of_a_node_and_count_once(cluster, tmp_path):
    attack = Held(folder=str(tmp_path))
    executor = RayExecutor(cpus=1, resources={"audit": 1})
    auditor = Auditor(
        attack=attack,
        closed_forms=False,
        budget=Budget(evaluations=5),
        executor=executor,
        queue_size=AUDITS,
        engine_check=False,
    )
    doomed = cluster.list_all_nodes()[-1]
    for step in range(AUDITS):
        assert auditor.submit(snapshot(step))
    wait_until(lambda: workers_on(tmp_path, doomed.node_id) and len(list(tmp_path.iterdir())) == 2)
    (lost,) = workers_on(tmp_path, doomed.node_id)
    cluster.remove_node(doomed, allow_graceful=False)
    wait_until(lambda: is_gone(lost))  # in the middle of its audit
    (tmp_path / "go").touch()
    records = auditor.collect(wait=300)

    assert [record.step for record in records] == list(range(AUDITS)), "none is lost, none comes twice"
    assert all(record.valid for record in records)
    assert auditor.collect() == []
    assert (auditor.completed, auditor.failed, auditor.pending) == (AUDITS, 0, 0)
    assert len(list(tmp_path.iterdir())) == AUDITS + 1 + 1, "what was lost was run again, and nothing else"
    expected = audit_snapshot(snapshot(3), attack=Grey(), closed_forms=False, budget=Budget(evaluations=5))
    torch.testing.assert_close(records[3].psnr, expected.psnr)
    auditor.close()
    assert executor.submit(abs, -1).result(timeout=120) == 1, "an executor of the user's stays open"


class Grey(Attack):
    """What `Held` comes to, here."""

    def run(self, observation, *, budget, generator):
        return grey(observation)


def _fail(tensor):
    raise KeyError(str(tuple(tensor.shape)))


def _sleep(seconds):
    time.sleep(seconds)


def test_errors_and_cancellation_are_those_of_any_executor(cluster):
    executor = RayExecutor(cpus=1, retries=0)
    with pytest.raises(KeyError, match="300, 300"):
        executor.submit(_fail, torch.zeros(300, 300)).result(timeout=120)
    futures: list[Future] = [executor.submit(_sleep, 600) for _ in range(3)]
    assert futures[2].cancel()
    executor.shutdown(wait=False, cancel_futures=True)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=60)
    with pytest.raises(RuntimeError, match="shutdown"):
        executor.submit(abs, -1)
    other = RayExecutor(cpus=1)
    assert other.submit(abs, -1).result(timeout=120) == 1, "what was given up makes room"


def test_unchanged_tensors_are_not_put_into_the_store_again(cluster):
    executor = RayExecutor(cpus=1)
    tensor = torch.rand(300, 300)
    assert [executor.submit(torch.sum, tensor.clone()).result(timeout=120) for _ in range(2)] == [tensor.sum()] * 2
    (written,) = executor._packer.last
    executor.submit(torch.sum, tensor.clone()).result(timeout=120)
    assert executor._packer.last[0] is written
    executor.submit(torch.sum, tensor + 1).result(timeout=120)
    assert executor._packer.last[0] is not written


@pytest.mark.parametrize("options", [{"cpus": -1}, {"gpus": -0.5}, {"retries": -2}, {"retries": True}])
def test_settings_out_of_range_are_refused_by_name(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        RayExecutor(**options)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"lightning-gradaudit\[ray\]"):
        RayExecutor().submit(abs, -1)
