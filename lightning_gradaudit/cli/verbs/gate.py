"""`gradaudit gate`: decide about a checkpoint or a run."""

from __future__ import annotations

import argparse
import json

from lightning_gradaudit.cli.output import print_verdict, write_text
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.release import judge
from lightning_gradaudit.risk.verdict import Status


def run(options: argparse.Namespace) -> int:
    """Print the verdict and return its exit status."""
    gate = RiskGate(
        options.max_risk,
        statistic=options.statistic,
        memory=options.memory,
        independent=options.independent,
        max_age=options.max_age,
    )
    verdict, about = judge(options.path, gate, trust=options.trust)
    result = verdict.to_dict() | {"judged": about}
    if options.out is not None:
        write_text(options.out, "verdict.json", json.dumps(result, indent=2))
    print_verdict(options, result)
    return Status(result["status"]).exit_code
