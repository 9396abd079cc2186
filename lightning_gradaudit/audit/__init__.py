"""The engine of one audit, its record, the auditor that queues audits, and the comparison of models."""

from lightning_gradaudit.audit.engine_check import EngineCheck, check_engine

__all__ = ["EngineCheck", "check_engine"]
