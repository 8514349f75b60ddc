"""HTML pages from Jinja templates that ship with the package, and the images inside them."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image


def page_template(path: Path, **filters: Callable[..., Any]) -> Template:
    """A template that escapes what it inserts, and in which an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name)


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """Return an image as a ``data:`` URL; ``options`` are those of ``Image.save``."""
    data = io.BytesIO()
    image.save(data, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
