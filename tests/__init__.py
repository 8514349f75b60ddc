"""Every test run checks shapes: an annotated function compares its tensors with its signature."""

from jaxtyping import install_import_hook

CHECKED: list[str] = [
    "instructblip.core",
    "instructblip.data",
    "instructblip.evaluation",
    "instructblip.release",
    "instructblip.scenes",
    "instructblip.inference",
    "instructblip.model",
    "instructblip.text_to_image",
    "instructblip.training",
]
"""Packages whose annotations are checked, when their modules are imported."""

install_import_hook(CHECKED, "beartype.beartype")
