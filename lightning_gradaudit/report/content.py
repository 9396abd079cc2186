"""The content of a report on a run, before it becomes HTML or Markdown."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gradaudit.audit.summary import MEASURES, measured
from lightning_gradaudit.metrics.functional.effort import effort_more_than, effort_quantile
from lightning_gradaudit.report.run import Row, Run
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.utils.formatting import numbers_beside, printable, sentences, settling

CAVEATS = (
    "PASS is demonstrated, not proven: valid audits showed no exposure above the limit, with this attack and budget. "
    "A stronger attack may recover more.",
    "Exposure 0 means that the reconstruction is no better than a guess without the gradient; 1 means a copy. "
    "Identification asks whether a reconstruction is nearest to its own image among at least 100. It can succeed under "
    "noise that hides the image from the eye.",
    "The ceiling is a local estimate of what any attack could recover, not a guarantee. A low exposure under a high "
    "ceiling means that the attack failed, not that the images are safe.",
    "UNKNOWN does not release a checkpoint by default. Its causes: too few audits, old or failed ones, or an exact "
    "leak that the attack did not turn into a copy.",
    "Only sampled steps were audited, under the threat model stated here. Other views of the gradient (after "
    "aggregation, several local steps) need their own audit.",
)
VIEWS = {
    "local": "the gradient of one micro-batch of one process, before accumulation, reduction and clipping",
    "step": "the gradient of one process, summed over the micro-batches of an optimizer step",
    "reduced": "the mean gradient of all processes, before clipping",
    "update": "what the optimizer is given: the gradient after clipping and, under DP-SGD, after noise",
    "delta": "the change of the weights over several optimizer steps",
}
LONGEST_TEXT = 5000
"""Characters of a text that a report shows at most."""
COLUMNS = ("exposure", "exposure_max", "psnr", "ssim", "null", "ceiling", "identified", "label_accuracy")
"""Measured values in the table of audits, by their names in `summary.MEASURES`."""
LISTED = 200
"""Audits that are tabulated at most; the run folder has all."""


def section(run: Run) -> dict[str, Any]:
    """Return everything that a report says of one run, as plain values."""
    limit = run.limit if run.limit is not None else RiskGate().max_risk
    listed = [worst_of(group) for group in groups(run.rows, LISTED)]
    verdict = run.verdict(RiskGate(limit)).to_dict()
    return {
        "name": run.name,
        "verdict": verdict | {"reasons": [*verdict["reasons"], *settling(verdict)]},
        "figures": _beside_limit(verdict),
        "audits": len(run.rows),
        "columns": {name: MEASURES[name] for name in COLUMNS},
        "rows": [_row(row) for row in listed],
        "exposed": run.evidence.most_exposed(),
        "decisions": [decision | _said_of(decision) for decision in run.decisions],
        "threat_model": threat_sentences(run.rows[-1].record.threat_model) if run.rows else [],
        "settings": {key: value for key, value in run.evidence.settings.items() if key != "threat_model"},
        "faults": [(fault[0], fault[1]) for fault in run.evidence.faults],
        "engine": str(run.evidence.engine) if run.evidence.engine else "engine check: no result",
        "effort": effort_sentence(run.rows),
        "layers": list(layer_shares(run).items()),
        "cost": cost_sentence(run),
    }


def groups(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Divide audits into at most so many groups of consecutive ones, all but the last of equal size."""
    size = max(1, math.ceil(len(rows) / most))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def worst_of(group: Sequence[Row]) -> Row:
    """Return the audit that stands for a group: the one with the most exposed image."""
    return max(group, key=lambda row: float(row.record.exposure.nan_to_num(-1.0).max()))


def plain(value: Any) -> str:
    """Return text that is only shown, wherever it came from: one line, without control characters."""
    return printable(value, LONGEST_TEXT)


def markdown(value: Any) -> str:
    """Return text that Markdown only shows, in a paragraph, a list, a heading or a cell of a table.

    HTML stands as entities; what marks emphasis, code, links, formulas, cells and, at the start, blocks is escaped.
    """
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*_\[\]|~$]|:(?=//)|(?<=www)\.", r"\\\g<0>", text, flags=re.IGNORECASE)
    return re.sub(r"^(\d*)([-#+=.)])", r"\1\\\2", text)


def threat_sentences(model: Mapping[str, Any]) -> list[str]:
    """Return sentences about what the adversary of a record sees and knows."""
    view = str(model.get("view"))
    known = {
        "labels_known": (
            "are given the labels",
            "are not given the labels and recover them from the gradient as far as they can",
        ),
        "dropout_known": ("are given the random state of dropout", "are not given the random state of dropout"),
        "buffers_shared": (
            "also hold the buffers after the step, which tell the batch statistics of "
            f"{model.get('layers_with_batch_statistics', 0)} BatchNorm layer(s)",
            "do not hold the buffers after the step",
        ),
    }
    said = [
        f"The adversary is honest but curious and sees {VIEWS.get(view, view)} (view “{view}”), besides the model, its "
        "weights and buffers at that step, the loss, the batch size and the normalisation of pixels.",
        *(f"They {yes if model[key] else no}." for key, (yes, no) in known.items() if key in model),
    ]
    defences = model.get("defences") or []
    if defences:
        said.append(f"Defences of the client: {', '.join(defences)}.")
        said.append(
            "They acted in training: the optimizer stepped with the defended gradient."
            if model.get("defences_act")
            else "They are imagined: applied to the audited copies only, while training itself went on with the clean "
            "gradient."
        )
    else:
        said.append("The client applies no defence.")
    if model.get("what_if_batch_size"):
        said.append(
            f"The batch was cut to {model['what_if_batch_size']} images, as if the client had trained on these alone."
        )
    if model.get("looks", 1) > 1:
        said.append(f"They see the same batch in {model['looks']} rounds, at different weights.")
    if model.get("public_images"):
        said.append(f"They hold {model['public_images']} public images of the same kind.")
    return said


def efforts(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the effort of all images where it was measured, and the evaluations they were attacked for, (N,) each."""
    measured = [row.record for row in rows if row.record.effort is not None]
    if not measured:
        return torch.zeros(0), torch.zeros(0)
    found = torch.cat([record.effort.double() for record in measured if record.effort is not None])
    followed = torch.cat([torch.full_like(record.effort, record.followed).double() for record in measured])  # type: ignore[arg-type]
    return found, followed


def effort_sentence(rows: Sequence[Row]) -> str:
    """Return a sentence about the simulated gradients that exposing half of the images took."""
    found, followed = efforts(rows)
    if not len(found):
        return "not measured"
    level = next(row.record.effort_exposure for row in rows if row.record.effort is not None)
    exposed, median = int(found.isfinite().sum()), float(effort_quantile(found, followed))
    share = f"{exposed} of {len(found)} images were exposed beyond {level:.2f}"
    if math.isfinite(median):
        return f"{share}; half of the images after {median:.0f} simulated gradients"
    least = float(effort_more_than(found, followed))
    more = (
        f"takes more than {least:.0f} simulated gradients"
        if math.isfinite(least)
        else "is impossible for these attacks at any budget"
    )
    return f"{share}; exposing half of them {more}"


def layer_shares(run: Run) -> dict[str, float]:
    """Return each layer's median share of the leak-R², in the order of the architecture where it is known.

    The median, because in single audits layers that contradict each other can have shares of any size.
    """
    analysed = [row.record.leakage for row in run.rows if row.record.leakage is not None]
    order = [name for name in str(run.evidence.settings.get("layers", "")).split(", ") if name]
    names = dict.fromkeys((*order, *(name for leakage in analysed for name in leakage.layers)))
    shares = {name: [leakage.layers.get(name, 0.0) for leakage in analysed] for name in names}
    return {name: statistics.median(found) for name, found in shares.items()} if analysed else {}


def cost_sentence(run: Run) -> str:
    """Return a sentence about the time and the evaluations of a run's audits."""
    records = [row.record for row in run.rows]
    seconds, evaluations = sum(r.seconds for r in records), sum(r.evaluations for r in records)
    text = (
        f"{len(records)} audits in {seconds:.0f} s of worker time and {evaluations} simulated gradients; "
        f"{run.evidence.dropped} samples dropped"
    )
    analysed = [r.leakage.training_steps for r in records if r.leakage is not None]
    return (
        f"{text}; the analysis took {sum(analysed) / len(analysed):.0f} training steps' time an audit"
        if analysed
        else text
    )


def _beside_limit(verdict: Mapping[str, Any]) -> dict[str, str]:
    """Return limit and figures of a verdict as text, by name."""
    wanted = ("limit", "risk", "low", "high", "exposure", "excess_identification")
    names = [name for name in wanted if name in verdict]
    return dict(zip(names, numbers_beside(*(verdict[name] for name in names)), strict=True))


def _said_of(decision: Mapping[str, Any]) -> dict[str, str]:
    _, risk = numbers_beside(decision.get("limit"), decision.get("risk"))
    return {"said": sentences(decision), "shown": risk}


def _row(row: Row) -> dict[str, Any]:
    return {
        "step": row.record.step,
        "risk": row.risk,
        "figures": _beside_limit({name: row.risk.get(name) for name in ("limit", "risk", "low", "high")}),
        "outcome": str(row.record.outcome),
        "lag": row.lag,
        "measured": measured(row.record, COLUMNS),
    }
