"""Every test run checks shapes: an annotated function compares its tensors with its signature."""

from jaxtyping import install_import_hook

CHECKED: list[str] = [
    "instructblip.data",
    "instructblip.inference",
    "instructblip.model.language",
    "instructblip.text_to_image",
]
"""Packages whose annotations are checked, when their modules are imported."""

install_import_hook(CHECKED, "beartype.beartype")
