"""The engine of one audit, its record, the auditor that queues audits, and the comparison of models."""

from lightning_gradaudit.audit.engine import EngineCheck, check_engine

__all__ = ["EngineCheck", "check_engine"]
