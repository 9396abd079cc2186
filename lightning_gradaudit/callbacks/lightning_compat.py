"""Lightning comes under two names, `pytorch_lightning` and `lightning.pytorch`, whose classes are unrelated."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec


def resolve_base(path: str) -> type:
    """Return a base class that the Trainers of both packages take for their own.

    Args:
        path: Module and name below either package, such as "callbacks.Callback".
    """
    module, name = path.rsplit(".", maxsplit=1)
    packages = ["pytorch_lightning"]
    if find_spec("lightning") is not None:
        packages.append("lightning.pytorch")
    bases = tuple(getattr(import_module(f"{package}.{module}"), name) for package in packages)
    return bases[0] if len(bases) == 1 else type(name, bases, {"__doc__": bases[0].__doc__})


def is_a(thing: object, name: str) -> bool:
    """Whether an object is of a Lightning class, by whichever package."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)
