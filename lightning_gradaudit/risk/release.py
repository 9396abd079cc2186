"""Judge whether a checkpoint may be released, by evidence bound to it: its stamp, its sidecar or a run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.actions import TRAIN_AGAIN
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.history import RECORDS_FILE, SIDECAR_SUFFIX, STAMP, AuditHistory, check_stamp
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.risk.verdict import Verdict
from lightning_gradaudit.utils.digests import file_digest, weights_digest
from lightning_gradaudit.utils.files import check_plain, load_checkpoint, read_json, regular_file
from lightning_gradaudit.utils.formatting import printable

NOT_AUDITED = "carries no audit"


@dataclass(frozen=True)
class Bound:
    """Evidence and where it was found.

    Attributes:
        source: In words.
        evidence: What was found; its `damage` names what contradicts the file.
    """

    source: str
    evidence: AuditHistory


def judge(path: Path, gate: RiskGate, *, trust: bool = False) -> tuple[Verdict, str]:
    """Judge the evidence at a path; where two stamps disagree the stricter verdict counts.

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
        return Verdict.unknown(str(error), limit=gate.max_risk, action=_action_for(str(error))), str(path)
    except Exception as error:  # a forged file must not end the program without a verdict
        said = f"The audits could not be judged: {type(error).__name__}: {printable(error, 300)}"
        return Verdict.unknown(said, limit=gate.max_risk, action=TRAIN_AGAIN), str(path)
    return max(judged, key=lambda each: each[0].status.strictness)


def _action_for(message: str) -> str:
    """Return what would let evidence be read that was refused with this message."""
    if NOT_AUDITED in message:
        return "train it with GradAudit() among the Trainer's callbacks"
    if "--trust" in message:
        return "--trust (trust=True), if you know who made the file"
    if message.startswith("path: expected a checkpoint or a run folder"):
        return "give the path of a checkpoint, or of the folder of an audited run (it holds records.jsonl)"
    return TRAIN_AGAIN


def read_evidence(path: Path, *, trust: bool = False) -> list[Bound]:
    """Read all evidence that belongs to a path, at least one.

    Raises:
        InvalidInputError: When there is none, or the file cannot be read.
    """
    path = Path(path)
    # os.path answers False where Path raises: to a name that is too long.
    if os.path.isdir(path) or path.name == RECORDS_FILE:  # noqa: PTH112
        return _of_folder(path if path.name != RECORDS_FILE or path.is_dir() else path.parent)
    if path.name.endswith(SIDECAR_SUFFIX):
        path = path.with_name(path.name.removesuffix(SIDECAR_SUFFIX))
    try:
        regular_file(path)
    except InvalidInputError as error:
        raise InvalidInputError(f"path: expected a checkpoint or a run folder. {error}") from error
    sidecar = Path(f"{path}{SIDECAR_SUFFIX}")
    beside = os.path.lexists(sidecar)  # also a broken link: there was a sidecar
    try:
        checkpoint = load_checkpoint(path, trust=trust)
    except InvalidInputError:
        if not beside:
            raise
        checkpoint = None  # the sidecar's digest says whether these are the bytes that were judged
    found = [_of_sidecar(sidecar, path, checkpoint)] if beside else []
    if isinstance(checkpoint, dict) and STAMP in checkpoint:
        found.append(_of_stamp(checkpoint, path))
    if not found:
        raise InvalidInputError(f"path: {path} {NOT_AUDITED}; it was not trained with GradAudit.")
    return found


def _of_folder(folder: Path) -> list[Bound]:
    """Read the logs of a folder: its own and, as loggers make it, the one in the folder of ours below."""
    nested = folder / STAMP
    inner = [nested] if (nested / RECORDS_FILE).is_file() else []
    own = [folder] if os.path.lexists(folder / RECORDS_FILE) or not inner else []
    evidence = [(each, RunLog(each).evidence()) for each in own + inner]
    return [
        Bound(f"the newest run of {each} ({found.run or 'without an identity'})", found) for each, found in evidence
    ]


def _of_sidecar(sidecar: Path, path: Path, checkpoint: Any) -> Bound:
    stamp = read_json(sidecar)
    evidence = check_stamp(stamp)
    if stamp.get("file") != file_digest(path):
        evidence.damage.append(
            f"{sidecar.name} was not written for this file: its digest of the file does not fit, or is missing."
        )
    if stamp.get("weights") is not None:  # it was once in a checkpoint
        evidence.damage += _unfit(stamp, checkpoint if isinstance(checkpoint, dict) else {})
    return Bound(f"the sidecar of {path.name}", evidence)


def _of_stamp(checkpoint: dict[Any, Any], path: Path) -> Bound:
    stamp = check_plain(checkpoint[STAMP], what=f"the stamp in {path.name}")
    evidence = check_stamp(stamp)
    if evidence.run:  # stamps of version 1 name no weights, and cannot pass
        evidence.damage += _unfit(stamp, checkpoint)
    return Bound(f"the stamp in {path.name}", evidence)


def _unfit(stamp: dict[str, Any], checkpoint: dict[Any, Any]) -> list[str]:
    """Say where a checkpoint is not the one that was stamped."""
    damage = []
    if stamp.get("weights") is None or stamp["weights"] != _weights_of(checkpoint):
        damage.append(
            "The weights are not those that were audited: their digest does not fit the stamp. Either the file was "
            "changed, or a hook changed the state dictionary after it was stamped."
        )
    step = checkpoint.get("global_step")
    if type(step) is not int or type(stamp.get("global_step")) is not int or stamp["global_step"] != step:
        damage.append(
            f"The checkpoint says that it is of step {printable(step, 80)}, its stamp of step "
            f"{printable(stamp.get('global_step'), 80)}."
        )
    return damage


def _weights_of(checkpoint: dict[Any, Any]) -> str | None:
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return None
    try:
        return weights_digest(state)
    except Exception:  # tensors without bytes of their own: sparse, nested, on the meta device
        return None
