"""May this file leave? Judge a checkpoint, its sidecar or a run folder, and only what is bound to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gradaudit.digests import file_digest, weights_digest
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.evidence import RECORDS_FILE, SIDECAR_SUFFIX, STAMP, Evidence, RunFolder, check_stamp
from lightning_gradaudit.files import check_plain, load_checkpoint, read_json, regular_file
from lightning_gradaudit.risk import RiskGate
from lightning_gradaudit.verdict import Verdict


@dataclass(frozen=True)
class Bound:
    """Evidence and where it lay.

    Attributes:
        source: In words.
        evidence: What was found; its `damage` says what does not fit.
    """

    source: str
    evidence: Evidence


def judge(path: Path, gate: RiskGate, *, trust: bool = False) -> tuple[Verdict, str]:
    """Judge whatever lies at a path; where two stamps disagree the stricter counts.

    Args:
        path: A checkpoint, its sidecar (`.gradaudit.json`) or a run folder.
        gate: Limit and rules.
        trust: Unpickle a checkpoint that holds more than plain data.

    Returns:
        The verdict, and what it is about. What cannot be read is UNKNOWN, with the reason.
    """
    try:
        judged = [(bound.evidence.verdict(gate), bound.source) for bound in read_evidence(path, trust=trust)]
    except InvalidInputError as error:
        return Verdict.unknown(str(error), limit=gate.max_risk), str(path)
    return max(judged, key=lambda each: each[0].status.strictness)


def read_evidence(path: Path, *, trust: bool = False) -> list[Bound]:
    """Read all evidence that belongs to a path, at least one.

    Raises:
        InvalidInputError: When there is none, or the file cannot be read.
    """
    path = Path(path)
    if path.is_dir() or path.name == RECORDS_FILE:
        folder = path if path.is_dir() else path.parent
        nested = folder / STAMP
        folder = nested if (nested / RECORDS_FILE).is_file() else folder
        evidence = RunFolder(folder).evidence()
        return [Bound(f"the newest run of {folder} ({evidence.run or 'without an identity'})", evidence)]
    if path.name.endswith(SIDECAR_SUFFIX):
        path = path.with_name(path.name.removesuffix(SIDECAR_SUFFIX))
    try:
        regular_file(path)
    except InvalidInputError as error:
        raise InvalidInputError(f"path: expected a checkpoint or a run folder. {error}") from error
    sidecar = Path(f"{path}{SIDECAR_SUFFIX}")
    found = [Bound(f"the sidecar of {path.name}", _of_sidecar(sidecar, path))] if sidecar.exists() else []
    inside = _of_checkpoint(path, trust=trust, required=not found)
    return found if inside is None else [*found, Bound(f"the stamp in {path.name}", inside)]


def _of_sidecar(sidecar: Path, path: Path) -> Evidence:
    stamp = read_json(sidecar)
    evidence = check_stamp(stamp)
    if stamp.get("file") != file_digest(path):
        evidence.damage.append(
            f"{sidecar.name} was not written for this file: its digest of the file does not fit, or is missing."
        )
    return evidence


def _of_checkpoint(path: Path, *, trust: bool, required: bool) -> Evidence | None:
    """Return the evidence in a checkpoint; None where there is none and a sidecar stands for it.

    Raises:
        InvalidInputError: When it cannot be read, and nothing else stands for it.
    """
    try:
        checkpoint = load_checkpoint(path, trust=trust)
    except InvalidInputError:
        if required:
            raise
        return None  # the sidecar's digest says whether these are the bytes that were judged
    if not isinstance(checkpoint, dict) or STAMP not in checkpoint:
        if required:
            raise InvalidInputError(f"path: {path} carries no audit; it was not trained with GradAudit.")
        return None
    stamp = checkpoint[STAMP]
    check_plain(stamp, what=f"the stamp in {path.name}")
    evidence = check_stamp(stamp)
    if evidence.run:
        evidence.damage += _unfit(stamp, checkpoint)
    return evidence


def _unfit(stamp: dict[str, Any], checkpoint: dict[Any, Any]) -> list[str]:
    """Say where a checkpoint is not the one that was stamped."""
    damage = []
    state = checkpoint.get("state_dict")
    found = weights_digest(state) if isinstance(state, dict) and all(isinstance(k, str) for k in state) else None
    if stamp.get("weights") is None or stamp["weights"] != found:
        damage.append(
            "The weights are not those that were audited: their digest does not fit the stamp. Either the file was "
            "changed, or a hook changed the state dictionary after it was stamped."
        )
    if stamp.get("global_step") != checkpoint.get("global_step"):
        damage.append(
            f"The checkpoint says that it is of step {checkpoint.get('global_step')}, its stamp of step "
            f"{stamp.get('global_step')}."
        )
    return damage
