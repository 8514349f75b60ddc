"""Where the weights of a model that answers are and in how many bits: the settings, and the plan.

The command line, the Python API and the recipe read these settings; `spread.place` follows them.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

Kind = Literal["int8", "fp8", "nf4"]
DISK = "disk"

RESERVED = 0.07
"""Share of a device's memory that its context, the libraries, fragments and short-lived tensors
take."""


def _devices(text: str) -> str:
    device = r"(cpu|(cuda|mps|xpu)(:\d+)?)"
    if not re.fullmatch(rf"auto|disk|{device}(,{device})*(,disk)?", text):
        raise ValueError(
            f"devices must be auto, disk, or devices with commas, the last of which may be disk "
            f"(cuda:0,cuda:1 or cpu,disk); got {text!r}"
        )
    return text


Devices = Annotated[
    str,
    AfterValidator(_devices),
    Field(
        description="Where the layers of the language model are: auto, one device, several with "
        "commas, in order and equally full, or disk at the end for layers that do not fit; these "
        "are read again at each use."
    ),
]
Quantize = Annotated[
    Kind | None,
    Field(description="Weights of the language model in 8 or 4 bits: int8, fp8 or nf4."),
]


class Placement(BaseModel):
    """Where the language model is, and in how many bits. Everything else is on the first device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    devices: Devices = "auto"
    quantize: Quantize = None

    @model_validator(mode="after")
    def _disk_is_exact(self) -> "Placement":
        if self.quantize is not None and self.reads_disk:
            raise ValueError(
                f"devices={self.devices} reads layers as their files have them: leave out "
                f"quantize={self.quantize}, or {DISK}"
            )
        return self

    @property
    def reads_disk(self) -> bool:
        return self.devices.endswith(DISK)

    @property
    def names(self) -> tuple[str, ...]:
        """The devices that are named."""
        return tuple(name for name in self.devices.split(",") if name not in ("auto", DISK))


def check_placement(devices: str = "auto", quantize: str | None = None) -> Placement:
    """The settings, checked. Raises ValueError for values out of range."""
    try:
        return Placement.model_validate({"devices": devices, "quantize": quantize})
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"] == ("quantize",):
            message = f"quantize must be int8, fp8 or nf4; got {quantize!r}"
        raise ValueError(message) from None


def spread_layers(fixed: int, layers: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """The device of each layer, by its number; ``len(rooms)`` for layers that fit nowhere.

    Layers fill the devices in order, all to the same share of their room and to the smallest share
    that suffices: a stack passes each device once. ``fixed`` bytes are on the first device.
    """
    places: list[int] = []
    for share in range(1, 21):
        left = [room * share // 20 for room in rooms]
        if left:
            left[0] -= fixed
        places, device = [], 0
        for size in layers:
            while device < len(rooms) and left[device] < size:
                device += 1
            places.append(device)
            if device < len(rooms):
                left[device] -= size
        if len(rooms) not in places:
            break
    return places
