"""How each logger takes late steps, pictures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import save_image

from lightning_gradaudit.callbacks.lightning_compat import is_a
from lightning_gradaudit.errors import InvalidInputError

STEP_KEY = "gradaudit/step"
"""W&B's horizontal axis of the curves: its own step cannot go back to the step of capture."""


class Sink:
    """A logger as the audit writes to it. Any of Lightning's takes numbers; subclasses know what else theirs takes.

    Args:
        logger: One of the Trainer's.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def declare(self, keys: Sequence[str]) -> None:
        """Announce the curves, and lay them out where the logger has layouts."""

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        """Log a row at the step of capture, which may lie behind what the logger has already seen."""
        self.logger.log_metrics(dict(values), step=step)

    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        """Log a picture (3, H, W) in [0, 1] where the logger can hold one."""

    def table(self, rows: Sequence[Mapping[str, Any]], *, key: str, step: int) -> None:
        """Log a table, at least one row and all with the same columns, where the logger can hold one."""

    def finish(self) -> None:
        """Flush and close what a finished run wrote, so that the next run starts its own."""
        self.logger.finalize("success")


class _WandbSink(Sink):
    def declare(self, keys: Sequence[str]) -> None:
        # Late results are drawn at the step of capture only for exactly named metrics.
        run = self.logger.experiment
        run.define_metric(STEP_KEY, hidden=True)
        for key in keys:
            run.define_metric(key, step_metric=STEP_KEY, step_sync=False)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self.logger.experiment.log({**values, STEP_KEY: step})

    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        import wandb

        image = wandb.Image(_to_bytes(picture), caption=f"step {step}: truth above, reconstruction below")
        self.logger.experiment.log({key: image, STEP_KEY: step})

    def table(self, rows: Sequence[Mapping[str, Any]], *, key: str, step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self.logger.experiment.log({key: table, STEP_KEY: step})

    def finish(self) -> None:
        super().finish()
        self.logger.experiment.finish()


def wandb_workspace(entity: str, project: str, *, name: str = "gradaudit") -> Any:
    """Return a ready-made layout of the curves for a W&B project; `save()` on it, online, makes it a view there.

    Args:
        entity, project: Of W&B.
        name: Of the callback, which the curves' names begin with.

    Raises:
        InvalidInputError: When `wandb-workspaces` is missing.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise InvalidInputError("wandb-workspaces is missing: pip install 'lightning-gradaudit[wandb]'.") from error

    def plot(title: str, *curves: str, top: float | None = None) -> Any:
        keys: list[Any] = [f"{name}/{curve}" for curve in curves]
        limits = (None if top is None else 0, top)
        return panels.LinePlot(title=title, x=STEP_KEY, y=keys, range_y=limits)

    leakage = [
        plot("Risk with its 95% bounds", "risk", "risk_low", "risk_high", top=1),
        plot("Exposure and ceiling", "exposure_max", "exposure", "ceiling", top=1),
        plot("Named", "identified", "excess_identification", "confirmed", top=1),
        plot("Effort", "effort"),
        panels.MediaBrowser(media_keys=[f"{name}/reconstructions"]),
    ]
    trust = [
        plot("Did the attack match the gradient?", "gradient_similarity", top=1),
        plot("Is the simulator the step?", "self_test"),
        plot("Age and lag in steps", "age_steps", "lag_steps"),
        plot("Dropped and failed", "dropped", "failed"),
    ]
    sections = [
        workspaces.Section(name=title, is_open=True, panels=shown)
        for title, shown in (("Leakage", leakage), ("Can the audits be trusted?", trust))
    ]
    return workspaces.Workspace(entity=entity, project=project, name="Gradient leakage", sections=sections)


class _TensorBoardSink(Sink):
    def declare(self, keys: Sequence[str]) -> None:
        prefix = keys[0].rpartition("/")[0]
        band = [f"{prefix}/{name}" for name in ("risk", "risk_low", "risk_high")]
        images = [f"{prefix}/{name}" for name in ("exposure_max", "exposure", "identified", "ceiling")]
        self.logger.experiment.add_custom_scalars(
            {prefix: {"risk with its 95% bounds": ["Margin", band], "images": ["Multiline", images]}}
        )

    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        self.logger.experiment.add_image(key, picture, step)

    def table(self, rows: Sequence[Mapping[str, Any]], *, key: str, step: int) -> None:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        self.logger.experiment.add_text(key, "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines), step)


class _CsvSink(Sink):
    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        save_image(picture, Path(self.logger.log_dir) / f"{key.replace('/', '_')}_{step:08d}.png")


class _MlflowSink(Sink):
    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        self.logger.experiment.log_image(self.logger.run_id, _to_bytes(picture), key=key, step=step)

    def table(self, rows: Sequence[Mapping[str, Any]], *, key: str, step: int) -> None:
        data = {name: [row[name] for row in rows] for name in rows[0]}
        self.logger.experiment.log_table(self.logger.run_id, data, artifact_file=f"{key}.json")


class _CometSink(Sink):
    def picture(self, picture: Tensor, *, key: str, step: int) -> None:
        self.logger.experiment.log_image(_to_bytes(picture), name=key, step=step)

    def table(self, rows: Sequence[Mapping[str, Any]], *, key: str, step: int) -> None:
        name = f"{key.replace('/', '_')}.csv"
        data = [list(row.values()) for row in rows]
        self.logger.experiment.log_table(name, tabular_data=data, headers=list(rows[0]))

    def finish(self) -> None:
        super().finish()
        self.logger.experiment.end()


_SINKS: dict[str, type[Sink]] = {
    "WandbLogger": _WandbSink,
    "TensorBoardLogger": _TensorBoardSink,
    "CSVLogger": _CsvSink,
    "MLFlowLogger": _MlflowSink,
    "CometLogger": _CometSink,
}


def sink(logger: Any) -> Sink:
    """Return how the audit writes to a logger, of either of Lightning's packages."""
    return next((kind for name, kind in _SINKS.items() if is_a(logger, name)), Sink)(logger)


def describe(logger: Any) -> str:
    """Name a logger in messages."""
    return type(logger).__name__


def _to_bytes(picture: Tensor) -> Any:
    """Return an array (H, W, 3) of bytes, which no logger rescales."""
    return (picture.permute(1, 2, 0) * 255).round().byte().numpy()
