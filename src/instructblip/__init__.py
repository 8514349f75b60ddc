"""Instruction tuning of vision-language models: from a BLIP-2 to an InstructBLIP, end to end.

>>> import instructblip
>>> engine = instructblip.load("starter")
>>> engine.answer("picture.png", "What is in the picture? Short answer:")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instructblip.model.instructblip import InstructBlip
    from instructblip.serving.engine import Engine, load

__version__ = "0.1.0"
__all__ = ["Engine", "InstructBlip", "__version__", "load"]

_HOMES = {
    "Engine": "instructblip.serving.engine",
    "InstructBlip": "instructblip.model.instructblip",
    "load": "instructblip.serving.engine",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'instructblip' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
