"""What HTML pages share: their style, their Jinja templates, the images inside them."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

STYLE = Path(__file__).with_name("page.css")


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


def title_of(model: str | Path) -> str:
    """What people call a model: its name, or that of its folder, without the rest of the path."""
    parts = [part for part in Path(model).parts if part not in ("run", "best", "last")]
    return parts[-1] if parts else str(model)
