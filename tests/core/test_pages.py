"""What a page calls a model."""

import pytest

from instructblip.core.pages import title_of


@pytest.mark.parametrize(
    ("model", "title"),
    [
        ("starter", "starter"),
        ("out/tuned/run", "tuned"),
        ("/models/blip2-flan-t5-xl", "blip2-flan-t5-xl"),
        ("hf://owner/name", "name"),
        (".", "."),
    ],
)
def test_a_title_is_the_last_name_of_a_path(model: str, title: str) -> None:
    assert title_of(model) == title
