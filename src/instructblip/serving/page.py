"""The page: a picture, an instruction, and what the models say to it side by side; and drawing.

Mounted in the server, it asks the same batchers under the same limits. Labels follow the language
of the browser, English or Chinese.
"""

import math
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from PIL import Image
from torch import Tensor

from instructblip.scenes.world import render, sample_scene
from instructblip.serving.batching import (
    Job,
    QueueFull,
    TooLate,
)
from instructblip.serving.draw_tab import draw_tab
from instructblip.serving.incoming import BadPicture, decode_picture
from instructblip.serving.service import Service, probabilities
from instructblip.serving.words import EN, ZH

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # it would talk to a hub
import gradio as gr
from gradio.themes import Default
from gradio_client.utils import traverse

PATH = "/page"
COLOURS = "red, green, blue, yellow, purple, orange"
# seed of a picture of the embedded world, what to ask, and candidates
EXAMPLES = (
    (36, "A short image description.", ""),
    (30, "Question: what color is the circle? Short answer:", COLOURS),
    (24, "Question: how many shapes are there? Short answer:", "1, 2, 3, 4"),
    (26, "Question: what shape is red? Short answer:", "circle, square, triangle, star, heart"),
)
INSTRUCTIONS = [*(text for _, text, _ in EXAMPLES), "Describe the picture in detail."]

NAMES = {"instructblip": "InstructBLIP", "blip2": "BLIP-2"}
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#title h1 {margin-bottom: 0}
.gradio-container, .gradio-container main, .gradio-container .main, .gradio-container .column {
  min-width: 0 !important; max-width: 100vw}
.gradio-container .row > .column {min-width: min(320px, 100%) !important}
#history {max-width: 100%; overflow-x: auto}
"""


class Page(gr.Blocks):
    """Blocks that look at what was uploaded and at nothing else.

    gradio itself would fetch a file whose path is a URL, and before ``has_launched``, which only
    its own ``launch`` sets, would take any file of this machine.
    """

    def __init__(self) -> None:
        # what visitors upload and get is deleted after an hour, and when the server ends
        super().__init__(title="InstructBLIP", analytics_enabled=False, delete_cache=(600, 3600))

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any):
        """As in gradio, once no input names a file elsewhere."""
        traverse(inputs, _refuse, _is_elsewhere)
        return await super().preprocess_data(block_fn, inputs, *more, **options)


def _is_elsewhere(value: Any) -> bool:
    """Whether this is a file that was not uploaded but has its content behind or in a URL."""
    return isinstance(value, dict) and (
        "://" in str(value.get("path")) or str(value.get("url")).startswith("data:")
    )


def _refuse(_file: Any) -> None:
    raise gr.Error("a picture has to be uploaded, not named by a URL / 请上传图片，不能用网址")


def mount_page(app: FastAPI) -> FastAPI:
    """The page at ``/page`` of an application of ``create_app``.

    Where the server asks for API keys, so does the page: any user name, a key as the password.
    """
    service: Service = app.state.service
    keys = service.config.api_keys
    i18n = gr.I18n(en=EN, zh=ZH, **{"zh-CN": ZH, "zh-TW": ZH})
    # fonts of the reader's machine: the page asks no other address for anything
    theme = Default(primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("monospace",))
    page = make_page(service, i18n)
    page.has_launched = True

    @app.get(PATH + "/gradio_api/file=http{rest:path}", include_in_schema=False)
    async def elsewhere(rest: str) -> None:  # gradio would fetch it
        raise HTTPException(403, "the page fetches nothing")

    return gr.mount_gradio_app(
        app,
        page,
        path=PATH,
        auth=(lambda _user, password: password in keys) if keys else None,
        max_file_size=service.config.max_picture_bytes,
        theme=theme,
        css=CSS,
        i18n=i18n,
        footer_links=[],
        ssr_mode=False,
    )


def make_page(service: Service, words: Any) -> Page:
    """The layout: a tab to ask and, where a model holds a decoder, one to draw."""
    with Page() as page:
        if not service.painters:
            ask_tab(service, words)
            return page
        with gr.Tabs():
            with gr.Tab(words("ask_tab"), id="ask"):
                ask_tab(service, words)
            with gr.Tab(words("draw_tab"), id="draw", elem_id="draw-tab"):
                draw_tab(service, words)
    return page


def ask_tab(service: Service, words: Any) -> None:
    """Picture, instruction and candidates; what happens on a click is ``ask``."""
    models = {name: NAMES.get(name, name) for name in service.batchers}
    examples = draw_examples()
    history = gr.State([])
    gr.Markdown(words("title"), elem_id="title")
    gr.Markdown(words("about"))
    with gr.Row():
        with gr.Column(scale=2):
            picture = gr.Image(
                type="filepath",
                format="png",
                image_mode=None,  # as it was uploaded: gradio forgets the copies that it converts
                label=words("picture"),
                sources=["upload", "clipboard"],
                height=260,
                elem_id="picture",
            )
            instruction = gr.Dropdown(
                choices=INSTRUCTIONS,
                value=INSTRUCTIONS[0],
                allow_custom_value=True,
                label=words("instruction"),
                elem_id="instruction",
            )
            candidates = gr.Textbox(label=words("candidates"))
            button = gr.Button(words("ask"), variant="primary", elem_id="ask")
            # files of their own, which stay when a chosen example is deleted with the uploads
            thumbnails = gr.Dataset(
                components=[gr.Image(format="png", render=False)],
                samples=[[shown.resize((128, 128))] for shown, *_ in examples],
                type="index",
                label=words("examples"),
                elem_id="examples",
            )
        with gr.Column(scale=3):
            answers, rankings = _answers(models, words)
            gr.Markdown(words("looks"), elem_id="looks-title")
            looks = gr.Gallery(
                show_label=False, columns=6, height="auto", elem_id="looks", buttons=[]
            )
    table = gr.Dataframe(
        headers=["#", "Instruction / 指令", *models.values()],
        label=words("history"),
        elem_id="history",
        interactive=False,
        wrap=True,
    )
    asked = [picture, instruction, candidates]
    thumbnails.click(examples.__getitem__, thumbnails, asked, api_visibility="private")
    button.click(
        lambda *values: ask(service, *values),
        [*asked, history],
        [*answers, *rankings, looks, history, table],
        concurrency_limit=4,
        api_visibility="private",
    )


def _answers(models: dict[str, str], words: Any) -> tuple[list[gr.Textbox], list[gr.Label]]:
    """Side by side for each model: its name, its answer and its ranking."""
    answers, rankings = [], []
    with gr.Row():
        for name, title in models.items():
            with gr.Column():
                gr.Markdown(f"### {title}")
                answers.append(
                    gr.Textbox(label=words("answer_of"), elem_id=f"answer-{name}", lines=2)
                )
                rankings.append(
                    gr.Label(
                        label=words("ranking_of"), show_heading=False, elem_id=f"ranking-{name}"
                    )
                )
    return answers, rankings


def draw_examples() -> list[tuple[Image.Image, str, str]]:
    """Pictures of the embedded world; what to ask of each, and candidates."""
    return [
        (render(sample_scene(random.Random(seed)), 256), text, candidates)
        for seed, text, candidates in EXAMPLES
    ]


def ask(
    service: Service, file: str | None, instruction: str, candidates: str, history: list[list[Any]]
) -> tuple[Any, ...]:
    """Every model's answer and ranking, the attention of the first, and the longer history."""
    if not file or not (instruction or "").strip():
        raise gr.Error("a picture and an instruction are needed / 需要图片和指令")
    parts = (part.strip() for part in re.split("[,，、]", candidates or ""))
    options = tuple(dict.fromkeys(part for part in parts if part))
    try:
        service.check_candidates(options)
        picture = decode_picture(Path(file).read_bytes(), service.config, "the picture")
        jobs = {
            name: _jobs(service, name, picture, instruction, options) for name in service.batchers
        }
        found = {name: [_wait(job) for job in own] for name, own in jobs.items()}
    except BadPicture as error:
        raise gr.Error(str(error)) from None
    except HTTPException as error:
        raise gr.Error(error.detail) from None
    except QueueFull:
        raise gr.Error("the server is busy; try again / 服务器繁忙，请重试") from None
    except (TooLate, TimeoutError):
        raise gr.Error("the answer took too long / 回答超时") from None
    if any(results[0].lost for results in found.values()):
        gr.Warning(
            "the instruction is too long: its beginning was not read / 指令过长，开头未被读取"
        )
    said = [results[0].text for results in found.values()]
    bars = [
        dict(zip(options, probabilities(results[2]), strict=True)) if options else None
        for results in found.values()
    ]
    attention = next(iter(found.values()))[1]
    history = [*history, [len(history) + 1, instruction, *said]][-50:]
    return *said, *bars, overlays(picture, attention[0]), history, history


def _jobs(
    service: Service, name: str, picture: Image.Image, instruction: str, options: tuple[str, ...]
) -> list[Job]:
    """To answer, to look and, where there are candidates, to rank; all submitted."""
    batcher, config = service.batchers[name], service.config
    shared: dict[str, Any] = {
        "pixels": (batcher.engine.images.transform(picture),),
        "instruction": instruction,
        "deadline": time.monotonic() + config.timeout_s,
    }
    decoding = batcher.engine.decoding
    most = min(decoding.max_new_tokens, config.max_tokens)
    answering = Job(**shared, decoding=decoding.override(max_new_tokens=most))
    jobs = [answering, Job(**shared, look=True)]
    if options:
        jobs.append(Job(**shared, candidates=options))
    for job in jobs:
        batcher.submit(job)
    return jobs


def _wait(job: Job) -> Any:
    return job.future.result(max(0.0, job.deadline - time.monotonic()))


def overlays(picture: Image.Image, attention: Tensor, side: int = 160) -> list[tuple[Any, str]]:
    """The picture under a heat map of each query [Q, P], the mean of all of them first."""
    base = np.asarray(picture.resize((side, side))).astype(np.float32)
    grid = math.isqrt(attention.shape[1])
    patches = attention[:, -grid * grid :]  # without the class token, where there is one
    count = len(patches)
    maps = [(f"1-{count}", patches.mean(0)), *((str(i + 1), one) for i, one in enumerate(patches))]
    return [(_heat(base, one.unflatten(0, (grid, grid)).numpy()), name) for name, one in maps]


def _heat(base: np.ndarray, weights: np.ndarray) -> Image.Image:
    """Lit where the weight is, in the dark where it is not."""
    weights = weights / max(float(weights.max()), 1e-9)
    small = Image.fromarray((weights * 255).astype(np.uint8))
    heat = np.asarray(small.resize(base.shape[:2], Image.Resampling.BICUBIC), np.float32) / 255
    glow = np.stack([64 * heat, 36 * heat, 0 * heat], axis=-1)
    mixed = base * (0.25 + 0.75 * heat[..., None]) + glow
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
