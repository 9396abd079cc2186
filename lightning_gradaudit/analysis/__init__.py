"""What a gradient gives away whatever the attacker does."""

from lightning_gradaudit.analysis.layers import exact_leaks

__all__ = ["exact_leaks"]
