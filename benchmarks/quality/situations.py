"""Does the audit work on what people feed? One small real fit for each everyday training situation.

Prints a table: situation, valid audits of all, largest self-test error, the attack that ran, evaluations, exposure,
and the first sentence of the verdict. A situation that is refused shows the refusal. Images are faces.

    python -m benchmarks.quality.situations --evaluations 60 400
"""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks import common
from benchmarks.quality.fits import SITUATIONS, audit

HEADERS = ("situation", "valid", "self-test", "attack", "evaluations", "exposure", "verdict or refusal")
REFUSED = {"detection": "images of one size", "bits_of_bytes": "floating-point images"}
"""What is expected of the batch, in one sentence with the way round; everything else must be audited."""


def row(name: str, pixels: Tensor, evaluations: int, seed: int) -> dict[str, Any]:
    """Fit and audit one situation; return what its audits say."""
    start = time.perf_counter()
    callback = audit(SITUATIONS[name](), pixels, evaluations=evaluations, seed=seed)
    records = callback.evidence.records
    faults = [fault.message for fault in callback.evidence.faults]
    return {
        "situation": name,
        "audits": len(records),
        "valid": sum(record.valid for record in records),
        "attacked": sum(record.attacked for record in records),
        "self_test": max((record.self_test for record in records), default=math.nan),
        "attack": records[-1].attack if records and records[-1].attacked else "none",
        "evaluations": max((record.evaluations for record in records), default=0),
        "exposure": max((float(record.exposure.max()) for record in records), default=math.nan),
        "says": faults[0] if faults else callback.verdict().reasons[0],
        "seconds": time.perf_counter() - start,
    }


def failure(found: dict[str, Any]) -> str:
    """Return what is wrong with a row; empty: nothing."""
    if found["situation"] in REFUSED:
        return "" if not found["audits"] and "batch: " in found["says"] else "expected a refusal"
    if not found["audits"] or found["valid"] < found["audits"] or found["attacked"] < found["audits"]:
        return f"{found['valid']} valid and {found['attacked']} attacked of {found['audits']} audits: {found['says']}"
    return ""


def cells(found: dict[str, Any]) -> list[str]:
    attack = found["attack"].rsplit(" > ", 1)[-1]
    return [
        found["situation"], f"{found['valid']}/{found['audits']}", f"{found['self_test']:.0e}", attack,
        str(found["evaluations"]), f"{found['exposure']:.2f}", found["says"][:120],
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = common.parser("situations", __doc__)
    options.add_argument("--evaluations", type=int, nargs="+", default=[60, 400])
    options.add_argument("--situations", nargs="+", choices=list(SITUATIONS), default=list(SITUATIONS))
    args = options.parse_args(arguments)
    device = common.check_device(args.device, args.threads)
    images = common.load_images(args.data)
    logging.getLogger("lightning_gradaudit").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    for evaluations in args.evaluations[:1] if args.quick else args.evaluations:
        for name in args.situations:
            rows.append(row(name, images.pixels[images.audited], evaluations, args.seed))
            print(" | ".join(cells(rows[-1])), file=sys.stderr, flush=True)
    failures = [f"{found['situation']}: {why}" for found in rows if (why := failure(found))]
    common.print_table(HEADERS, [cells(found) for found in rows])
    common.write_json(
        args.out,
        {
            "benchmark": "situations",
            "rows": rows,
            "failures": failures,
            "settings": common.settings_of(args, images),
            "machine": common.machine(device),
            "versions": common.versions(),
        },
    )
    return common.judge(failures, len(rows))


if __name__ == "__main__":
    sys.exit(main())
