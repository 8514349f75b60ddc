"""Instruction tuning of vision-language models: from a BLIP-2 to an InstructBLIP, end to end.

>>> import instructblip
>>> engine = instructblip.load("starter")
>>> engine.answer("picture.png", "What is in the picture? Short answer:")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from instructblip.core.version import __version__

if TYPE_CHECKING:
    from instructblip.inference.engine import Engine, load
    from instructblip.model.instructblip import InstructBlip

__all__ = ["Engine", "InstructBlip", "__version__", "load"]

_HOMES = {
    "Engine": "instructblip.inference.engine",
    "InstructBlip": "instructblip.model.instructblip",
    "load": "instructblip.inference.engine",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'instructblip' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
