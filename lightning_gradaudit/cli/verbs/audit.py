"""`gradaudit audit`: attack one saved snapshot."""

from __future__ import annotations

import argparse
import json

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.cli.output import print_table, write_text
from lightning_gradaudit.cli.parser import LONGEST_MESSAGE
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.formatting import printable


def run(options: argparse.Namespace) -> int:
    """Attack the snapshot and show the record; return 0."""
    snapshot = Snapshot.load(options.snapshot, trust=options.trust)
    budget = Budget(evaluations=options.evaluations)
    record = audit_snapshot(snapshot, budget=budget, analysis=True, seed=options.seed)
    values = record.to_dict()
    if options.out is not None:
        write_text(options.out, f"audit_step_{record.step:08d}.json", json.dumps(values, indent=2))
    if options.json:
        print(json.dumps(values))
    else:
        print_table(record.table(), record.summary)
        if record.reason:
            print(printable(record.reason, LONGEST_MESSAGE))
    return 0
