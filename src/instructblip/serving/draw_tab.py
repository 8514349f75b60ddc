"""The page's tab that draws: an instruction, a picture to take from or none, and what was drawn."""

import time
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from instructblip.serving.batching import (
    Job,
    QueueFull,
    TooLate,
)
from instructblip.serving.incoming import decode_picture
from instructblip.serving.service import Service

INSTRUCTIONS = (
    "draw a red circle at the top left",
    "draw a large green star in the middle and a small blue square at the bottom right",
    "draw the same shape in yellow at the right",
    "draw the same thing at the bottom left",
)
SHOWN = 256
"""Pixels of a side that a smaller picture is enlarged to, each pixel a square."""


def draw_tab(service: Service, words: Any) -> None:
    """The layout; what happens on a click is ``paint``."""
    with gr.Row():
        with gr.Column(scale=1):
            instruction = gr.Dropdown(
                choices=list(INSTRUCTIONS),
                value=INSTRUCTIONS[0],
                allow_custom_value=True,
                label=words("what"),
                elem_id="what",
            )
            subject = gr.Image(
                type="filepath",
                image_mode=None,
                label=words("subject"),
                sources=["upload", "clipboard"],
                height=240,
                elem_id="subject",
            )
            number = gr.Slider(1, 8, value=4, step=1, label=words("how_many"))
            guidance = gr.Slider(1, 5, value=2, step=0.5, label=words("guidance"))
            seed = gr.Number(value=0, precision=0, label=words("seed"))
            button = gr.Button(words("draw"), variant="primary", elem_id="draw-button")
        with gr.Column(scale=2):
            drawn = gr.Gallery(
                label=words("drawn"), show_label=False, columns=4, elem_id="drawn", format="png"
            )
    button.click(
        lambda *values: paint(service, *values),
        [instruction, subject, number, guidance, seed],
        drawn,
        concurrency_limit=4,
        api_visibility="private",
    )


def paint(
    service: Service,
    instruction: str,
    file: str | None,
    number: int,
    guidance: float,
    seed: int | None,
) -> list[Image.Image]:
    """Pictures by the first model that draws, enlarged to be seen."""
    batcher = next(iter(service.painters.values()))
    try:
        batcher.engine.painter.check(instruction or "", int(number))
        subject = None
        if file:
            subject = decode_picture(Path(file).read_bytes(), service.config, "the picture")
        settings = {
            "image": subject,
            "num_images": int(number),
            "guidance": float(guidance),
            "seed": None if seed is None or seed < 0 else int(seed),
        }
        deadline = time.monotonic() + service.config.timeout_s
        job = Job(pixels=(), instruction=instruction, drawing=settings, deadline=deadline)
        batcher.submit(job)
        try:
            pictures: list[Image.Image] = job.future.result(service.config.timeout_s)
        finally:
            job.left = True
    except ValueError as error:  # a BadPicture is one
        raise gr.Error(str(error)) from None
    except QueueFull:
        raise gr.Error("the server is busy; try again / 服务器繁忙，请重试") from None
    except (TooLate, TimeoutError):
        raise gr.Error("drawing took too long / 绘图超时") from None
    return [_enlarge(picture) for picture in pictures]


def _enlarge(picture: Image.Image) -> Image.Image:
    times = max(1, SHOWN // picture.width)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
