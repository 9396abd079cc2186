"""The engine: audit one snapshot, or keep a queue of them. Knows nothing of Lightning."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_gradaudit.analysis.layers import exact_leaks
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.linear import LinearLayerInversion
from lightning_gradaudit.attacks.portfolio import Portfolio
from lightning_gradaudit.attacks.recipes import InvertingGradients
from lightning_gradaudit.baseline import Baseline
from lightning_gradaudit.budget import Budget
from lightning_gradaudit.defences import global_norm
from lightning_gradaudit.errors import InvalidInputError, NonFiniteGradientError
from lightning_gradaudit.executors import ExecutorName, leaves_process, make_executor, shut_down
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.snapshot import Snapshot

SELF_TEST_TOLERANCE = {"32-true": 1e-3, "64-true": 1e-6}
"""Largest relative error of the simulated gradient by precision; reduced precisions get 5e-2."""
_REDUCED_PRECISION_TOLERANCE = 5e-2
_IMAGE_FIELDS = ("exposure", "psnr", "ssim", "mse", "identified", "null", "exact_leaks", "copied")
COPY_PSNR = 30.0
"""dB from which a reconstruction counts as a copy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditRecord:
    """One audited step; tensors are (B,) in the order of the true batch.

    Attributes:
        step: The logger's step at capture.
        attack: What ran.
        outcome: How the attack ended.
        exposure: In [0, 1], against the null baseline.
        psnr, ssim, mse: In pixel space with data range 1; PSNR in dB, capped at 100.
        identified: 1, 0 or NaN (gallery too small).
        null: Similarity that a guess without the gradient reaches, in [0, 1].
        exact_leaks: Whether algebra alone gives the image away (`analysis.exact_leaks`).
        copied: Whether the reconstruction is a copy (>= 30 dB).
        gallery: Fewest candidates an image was compared with.
        chance_hits, chance_trials: Identification by mismatched reconstructions.
        null_complete: Whether the null's reservoir was full.
        label_accuracy: Share of the labels recovered as a multiset; NaN when not applicable.
        matching_loss: Relative squared error of the gradient at the reconstruction.
        gradient_similarity: Cosine between its gradient and the observed one.
        self_test: Relative error of the simulated gradient of the truth; about 0, or the audit is invalid.
        self_test_tolerance: What still counts as about 0 in this precision.
        defence_gap: The same without the declared defences.
        evaluations: Simulated gradients spent.
        seconds: Wall-clock time of the audit.
        threat_model: Who sees what, as plain JSON.
        measure: Similarity behind `exposure` and `null`: "ssim" or "nmse".
        reason: What the attacks had to say.
        reconstruction: What the attack returned; private data.
        pixels, truth: (B, C, H, W) in [0, 1], reconstruction in the order of the truth; private data.
    """

    step: int
    attack: str
    outcome: Outcome
    exposure: Tensor
    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    identified: Tensor
    null: Tensor
    exact_leaks: Tensor
    copied: Tensor
    gallery: int
    chance_hits: float
    chance_trials: int
    null_complete: bool
    label_accuracy: float
    matching_loss: float
    gradient_similarity: float
    self_test: float
    self_test_tolerance: float
    defence_gap: float
    evaluations: int
    seconds: float
    threat_model: dict[str, Any]
    measure: str
    reason: str = ""
    reconstruction: Reconstruction | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    truth: Tensor | None = field(default=None, repr=False)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.exposure)

    @property
    def valid(self) -> bool:
        """Whether the simulator describes the training step and the attack ended without non-finite values."""
        return self.self_test <= self.self_test_tolerance and self.outcome is not Outcome.NONFINITE

    @property
    def uncopied_leaks(self) -> int:
        """Images that algebra gives away but the attacks did not turn into a copy: evidence of a weak attack."""
        return int((self.exact_leaks.bool() & ~self.copied.bool()).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, without images; NaN and infinity become None."""
        skipped = ("reconstruction", "pixels", "truth")
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in skipped}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AuditRecord:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When a field is missing.
        """
        known = {f.name: f for f in fields(cls)}
        try:
            restored: dict[str, Any] = {
                name: torch.tensor([math.nan if v is None else float(v) for v in values[name]])
                for name in _IMAGE_FIELDS
            }
            for name, value in values.items():
                if name in known and name not in restored:
                    restored[name] = math.nan if value is None else value
            restored["outcome"] = Outcome(values["outcome"])
            return cls(**restored)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"record: not an audit record of this version ({error!r}).") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, Outcome):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def default_attack() -> Attack:
    """Return the matching attack used when none is given."""
    return InvertingGradients()


def full_attack(attack: Attack | None, *, closed_forms: bool) -> Attack:
    """Put the closed forms before a matching attack: they are cheap and exact where they apply."""
    attack = default_attack() if attack is None else attack
    if not isinstance(attack, Attack):
        raise InvalidInputError(
            f"attack: expected an Attack such as InvertingGradients(), got {attack!r}. "
            "Pass an instance, not a class or a name."
        )
    return Portfolio(attacks=(LinearLayerInversion(), attack)) if closed_forms else attack


def audit_snapshot(
    snapshot: Snapshot,
    *,
    attack: Attack | None = None,
    budget: Budget = Budget(evaluations=400),  # noqa: B008 - immutable
    closed_forms: bool = True,
    baseline: Baseline | None = None,
    seed: int = 0,
) -> AuditRecord:
    """Audit one step: self-test, structural certificate, attack, score against truth and null.

    Args:
        snapshot: The step; only its `observation` reaches the attack.
        attack: Matching attack; None: Inverting Gradients.
        budget: Largest effort of all attacks together.
        closed_forms: Try exact solutions first. Turning them off is for studies, not for audits.
        baseline: Gallery and null; None: an empty one (the null is 0, nobody can be identified).
        seed: Seeds the attack, together with the step.

    Raises:
        NonFiniteGradientError: When the gradient holds NaN or infinity.
        DoubleBackwardError: When the model has an operation without a second derivative.
        ReplayError: When the training step cannot be simulated.
    """
    start = time.monotonic()
    attack = full_attack(attack, closed_forms=closed_forms)
    observation = snapshot.observation
    if not torch.isfinite(global_norm(observation.gradients)):
        raise NonFiniteGradientError(f"gradients: step {snapshot.step} has NaN or infinite values; not audited.")
    generator = torch.Generator().manual_seed((seed * 1_000_003 + snapshot.step) % 2**63)
    self_test = snapshot.self_test()
    leaks = exact_leaks(snapshot, generator=generator)
    reconstruction = attack(observation, budget=budget, generator=generator)
    pixels = observation.normalization.to_pixels(reconstruction.inputs.float()).clamp(0, 1).nan_to_num(0.5)
    scores = (baseline or Baseline()).score(pixels, snapshot.truth_pixels, snapshot.truth.labels)
    precision = observation.threat_model.precision
    return AuditRecord(
        step=snapshot.step,
        attack=attack.name,
        outcome=reconstruction.outcome,
        exposure=scores.exposure,
        psnr=scores.psnr,
        ssim=scores.ssim,
        mse=scores.mse,
        identified=scores.identified,
        null=scores.null,
        exact_leaks=leaks,
        copied=scores.psnr >= COPY_PSNR,
        gallery=int(scores.gallery.min()),
        chance_hits=scores.chance_hits,
        chance_trials=scores.chance_trials,
        null_complete=scores.null_complete,
        label_accuracy=_label_accuracy(reconstruction, snapshot),
        matching_loss=reconstruction.matching_loss,
        gradient_similarity=_gradient_similarity(reconstruction, snapshot),
        self_test=self_test.error,
        self_test_tolerance=SELF_TEST_TOLERANCE.get(precision, _REDUCED_PRECISION_TOLERANCE),
        defence_gap=self_test.defence_gap,
        evaluations=reconstruction.evaluations,
        seconds=time.monotonic() - start,
        threat_model=observation.threat_model.to_dict(),
        measure=scores.measure,
        reason=reconstruction.reason,
        reconstruction=reconstruction,
        pixels=pixels.cpu()[scores.order],
        truth=snapshot.truth_pixels.cpu(),
    )


def _label_accuracy(reconstruction: Reconstruction, snapshot: Snapshot) -> float:
    labels, truth = reconstruction.labels, snapshot.truth.labels
    if labels is None or truth.is_floating_point() or truth.ndim != 1:
        return math.nan
    return float(label_multiset_accuracy(labels.to(truth), truth))


def _gradient_similarity(reconstruction: Reconstruction, snapshot: Snapshot) -> float:
    if reconstruction.labels is None or reconstruction.outcome is Outcome.NOT_APPLICABLE:
        return math.nan
    observation = snapshot.observation
    simulated = observation.simulate(reconstruction.inputs, reconstruction.labels)
    return float(gradient_similarity(simulated, observation.gradients))


@dataclass(frozen=True)
class EngineCheck:
    """Whether the attacks recover a leaky reference in this environment, with this budget.

    Attributes:
        passed: Both closed form and attack reached `REFERENCE_PSNR`.
        psnr: What each reached, in dB.
    """

    passed: bool
    psnr: dict[str, float]

    def __str__(self) -> str:
        reached = ", ".join(f"{name} {value:.1f} dB" for name, value in self.psnr.items())
        return f"engine check {'passed' if self.passed else 'FAILED'}: {reached} (needs {REFERENCE_PSNR:.0f} dB)"


REFERENCE_PSNR = 18.0
"""dB that every attack must reach on the built-in reference: recognisable, far above any guess."""


def reference_snapshot() -> Snapshot:
    """Return a step that leaks by construction: one image through a small smooth network that keeps it whole."""
    side = torch.linspace(-1, 1, 16)
    y, x = torch.meshgrid(side, side, indexing="ij")
    disc = torch.sigmoid(12 * (0.6 - (x**2 + (y - 0.1) ** 2).sqrt()))
    image = (0.2 + 0.5 * disc + 0.2 * x.clamp_min(0)).clamp(0, 1)[None, None]
    with torch.device("meta"):  # initialising real layers here would consume training's random numbers
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.Softplus(), nn.Linear(128, 4))
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return Snapshot.from_batch(model, (image, torch.tensor([1])), loss=nn.functional.cross_entropy)


def check_engine(attack: Attack | None, budget: Budget, *, closed_forms: bool = True) -> EngineCheck:
    """Attack the built-in leaky reference with each configured attack alone.

    An attack that fails here, for want of budget or because something is broken, proves nothing about the user's
    model; the gate must not pass on its word.
    """
    attack = full_attack(attack, closed_forms=False)
    attacks: Iterable[Attack] = (LinearLayerInversion(), attack) if closed_forms else (attack,)
    snapshot = reference_snapshot()
    reached = {}
    for each in attacks:
        result = each(snapshot.observation, budget=budget, generator=torch.Generator().manual_seed(0))
        error = ((result.inputs.clamp(0, 1) - snapshot.truth.inputs) ** 2).mean().clamp_min(1e-10)
        reached[each.name] = float(-10 * torch.log10(error))
    return EngineCheck(all(value >= REFERENCE_PSNR for value in reached.values()), reached)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What every job of one auditor shares; travels to the worker."""

    attack: Attack | None
    budget: Budget
    closed_forms: bool
    seed: int
    device: str | None


def _run_job(snapshot: Snapshot, settings: _Settings, baseline: Baseline, ready: Any) -> AuditRecord:
    """Audit one snapshot where the worker lives, on a CUDA stream of its own where there is one."""
    with ExitStack() as stack:
        for context in _side_stream(snapshot.observation.device, settings.device, ready):
            stack.enter_context(context)
        if settings.device is not None:
            snapshot = snapshot.to(settings.device)
        return audit_snapshot(
            snapshot,
            attack=settings.attack,
            budget=settings.budget,
            closed_forms=settings.closed_forms,
            baseline=baseline,
            seed=settings.seed,
        )


def _side_stream(source: torch.device, target: str | None, ready: Any) -> list[AbstractContextManager[Any]]:
    """Order a side stream behind the capture; the training stream never waits for it.

    The record comes back on the CPU, so the worker has synchronised its own stream before it lets go of the
    snapshot: no `record_stream` is needed. Autograd's device thread is shared with training, so the worker's
    backward passes run on its own thread.
    """
    if source.type != "cuda" or ready is None:
        return []
    stream = torch.cuda.Stream(device=target if target is not None else source)
    stream.wait_event(ready)
    return [torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False)]


class Auditor:
    """A bounded queue of audits that needs no Trainer and never stalls its caller.

    Args:
        attack, budget, closed_forms, seed: As in `audit_snapshot`.
        baseline: Gallery and null; it grows with every finished audit.
        executor: Where audits run (see `executors.make_executor`).
        queue_size: Most unfinished audits; beyond it `submit` drops.
        device: Where to attack, e.g. "cuda:1"; None: where the snapshot lies (the CPU for processes).
        engine_check: Attack the built-in reference before the first audit.

    Attributes:
        submitted, dropped, completed, failed: Counters.
        engine: Result of the engine check; None until it is known.
    """

    def __init__(
        self,
        *,
        attack: Attack | None = None,
        budget: Budget = Budget(evaluations=400),  # noqa: B008 - immutable
        closed_forms: bool = True,
        baseline: Baseline | None = None,
        executor: ExecutorName | Executor = "auto",
        queue_size: int = 4,
        seed: int = 0,
        device: str | None = None,
        engine_check: bool = True,
    ) -> None:
        if queue_size < 1:
            raise InvalidInputError(f"queue_size must be >= 1, got {queue_size!r}.")
        if not isinstance(executor, Executor) and executor not in get_args(ExecutorName):
            raise InvalidInputError(
                f"executor: expected one of {get_args(ExecutorName)} or a concurrent.futures.Executor, "
                f"got {executor!r}."
            )
        full_attack(attack, closed_forms=closed_forms)
        self._settings = _Settings(attack=attack, budget=budget, closed_forms=closed_forms, seed=seed, device=device)
        self.baseline = Baseline() if baseline is None else baseline
        self.queue_size = queue_size
        self._wanted = executor
        self._executor: Executor | None = None
        self._owned = False
        self._pending: deque[tuple[int, Future[AuditRecord]]] = deque()
        self._engine: Future[EngineCheck] | None = None
        self._check_engine = engine_check
        self.engine: EngineCheck | None = None
        self.submitted = self.dropped = self.completed = self.failed = 0

    @property
    def pending(self) -> int:
        """Audits submitted and not yet collected."""
        return len(self._pending)

    def submit(self, snapshot: Snapshot) -> bool:
        """Queue an audit; return False when the queue is full and the snapshot was dropped (and counted)."""
        if self.pending >= self.queue_size:
            self.dropped += 1
            return False
        executor = self._start(snapshot.observation.device)
        ready = None
        if leaves_process(executor):
            snapshot = snapshot.to("cpu")
        elif snapshot.observation.device.type == "cuda":
            ready = torch.cuda.current_stream(snapshot.observation.device).record_event()
        future = executor.submit(_run_job, snapshot, self._settings, self.baseline.frozen(), ready)
        self._pending.append((snapshot.step, future))
        self.submitted += 1
        return True

    def _start(self, device: torch.device) -> Executor:
        if self._executor is None:
            self._executor, self._owned = make_executor(self._wanted, device=device)
            if self._check_engine and self._engine is None:
                s = self._settings
                self._engine = self._executor.submit(check_engine, s.attack, s.budget, closed_forms=s.closed_forms)
        return self._executor

    def collect(self, *, wait: float | None = None) -> list[AuditRecord]:
        """Return finished audits, first in, first out.

        Args:
            wait: Seconds to wait for those under way; None: take what is there.

        Raises:
            Exception: A worker's error, once, when its turn comes; audits before and after it are not lost.
        """
        deadline = None if wait is None else time.monotonic() + wait
        self._read_engine(deadline)
        records: list[AuditRecord] = []
        while self._pending:
            step, future = self._pending[0]
            if not future.done():
                left = 0.0 if deadline is None else deadline - time.monotonic()
                if left <= 0 or not wait_for([future], timeout=left).done:
                    break
            if future.exception() is not None and records:
                break  # hand over what is good first
            self._pending.popleft()
            records.append(self._finish(step, future))
        return records

    def _finish(self, step: int, future: Future[AuditRecord]) -> AuditRecord:
        try:
            record = future.result()
        except Exception as error:
            self.failed += 1
            self._recover(error)
            error.add_note(f"(audit of step {step})") if hasattr(error, "add_note") else None
            raise
        self.completed += 1
        if record.pixels is not None and record.truth is not None and record.outcome is not Outcome.NOT_APPLICABLE:
            self.baseline.remember(record.pixels, record.truth)
        return record

    def _read_engine(self, deadline: float | None) -> None:
        if self._engine is None or self.engine is not None:
            return
        left = 0.0 if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            self.engine = self._engine.result(timeout=left)
        except FutureTimeoutError:
            return
        except Exception as error:
            self._engine = None
            self._recover(error)
            raise

    def _recover(self, error: Exception) -> None:
        """After the loss of a worker process, start afresh with the next submission."""
        if type(error).__name__ in ("BrokenProcessPool", "TerminatedWorkerError") and self._owned:
            if self._executor is not None:
                shut_down(self._executor, wait=False)
            self._executor = None

    def close(self, *, wait: bool = True) -> None:
        """Shut the executor down if it was made here; safe to call twice. Uncollected audits are given up."""
        if self._executor is not None and self._owned:
            shut_down(self._executor, wait=wait)
        self._executor = None
        self._pending.clear()
