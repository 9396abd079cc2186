"""Imported by every Python that a test starts: audits there keep the priority of the tests.

At their own, the lowest, they would hardly run while tests keep all cores busy.
"""

import os

if hasattr(os, "nice"):
    os.nice = lambda increment: 0
