"""The page: a picture, an instruction, and what the models say to it side by side; and drawing.

Mounted in the server, it asks the same batchers under the same limits. Labels follow the language
of the browser, English or Chinese.
"""

import math
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from instructblip.data.scenes.world import render, sample_scene
from instructblip.serving.api import probabilities
from instructblip.serving.batching import Job, QueueFull, TooLate
from instructblip.serving.draw_tab import draw_tab
from instructblip.serving.incoming import BadPicture, decode_picture
from instructblip.serving.service import Service

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
import gradio as gr
from gradio.themes import Default

PATH = "/page"
INSTRUCTIONS = (
    "A short image description.",
    "Question: what colour is the circle? Short answer:",
    "Question: how many shapes are there? Short answer:",
    "Describe the picture in detail.",
)
CANDIDATES = "red, green, blue, yellow, purple, orange"

EN = {
    "title": "Ask about a picture",
    "picture": "Picture",
    "instruction": "Instruction (choose one or write your own)",
    "candidates": "Answers to rank, separated by commas (may be empty)",
    "ask": "Ask",
    "answer_of": "Answer",
    "ranking_of": "Ranking",
    "looks": "Where each query token looks, under this instruction",
    "history": "History",
    "examples": "Examples",
    "ask_tab": "Ask",
    "draw_tab": "Draw",
    "what": "What to draw (choose one or write your own)",
    "subject": "A picture to take from (may be empty)",
    "number": "Pictures",
    "seed": "Seed: the same draws the same (-1: another every time)",
    "guidance": "How strictly to follow the instruction",
    "draw": "Draw",
    "drawn": "Drawn",
}
ZH = {
    "title": "看图问答",
    "picture": "图片",
    "instruction": "指令（可选择，也可自己写）",
    "candidates": "候选答案，用逗号分隔（可为空）",
    "ask": "提问",
    "answer_of": "回答",
    "ranking_of": "候选排序",
    "looks": "在该指令下，每个查询向量关注的位置",
    "history": "历史记录",
    "examples": "示例",
    "ask_tab": "提问",
    "draw_tab": "绘图",
    "what": "要画什么（可选择，也可自己写）",
    "subject": "参考图片（可为空）",
    "number": "张数",
    "seed": "随机种子：相同则结果相同（-1：每次不同）",
    "guidance": "遵循指令的程度",
    "draw": "绘图",
    "drawn": "结果",
}
NAMES = {"instructblip": "InstructBLIP", "blip2": "BLIP-2"}


def mount_page(app: FastAPI) -> FastAPI:
    """The page at ``/page`` of an application of ``create_app``.

    Where the server asks for API keys, so does the page: any user name, a key as the password.
    """
    service: Service = app.state.service
    keys = service.config.api_keys
    i18n = gr.I18n(en=EN, zh=ZH, **{"zh-CN": ZH, "zh-TW": ZH})
    theme = Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    return gr.mount_gradio_app(
        app,
        make_page(service, i18n),
        path=PATH,
        auth=(lambda _user, password: password in keys) if keys else None,
        max_file_size=service.config.max_picture_bytes,
        theme=theme,
        i18n=i18n,
        footer_links=[],
        ssr_mode=False,
    )


def make_page(service: Service, words: Any) -> gr.Blocks:
    """The layout: a tab to ask and, where a model holds a decoder, one to draw."""
    with gr.Blocks(title="InstructBLIP", analytics_enabled=False) as page:
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
    models = list(service.batchers)
    history = gr.State([])
    gr.Markdown(words("title"), elem_id="title")
    with gr.Row():
        with gr.Column(scale=1):
            picture = gr.Image(
                type="filepath",
                label=words("picture"),
                sources=["upload", "clipboard"],
                elem_id="picture",
            )
            instruction = gr.Dropdown(
                choices=list(INSTRUCTIONS),
                value=INSTRUCTIONS[0],
                allow_custom_value=True,
                label=words("instruction"),
                elem_id="instruction",
            )
            candidates = gr.Textbox(value=CANDIDATES, label=words("candidates"))
            button = gr.Button(words("ask"), variant="primary", elem_id="ask")
        with gr.Column(scale=2), gr.Row():
            answers, rankings = [], []
            for name in models:
                with gr.Column():
                    gr.Markdown(f"### {NAMES.get(name, name)}")
                    answers.append(
                        gr.Textbox(label=words("answer_of"), elem_id=f"answer-{name}", lines=3)
                    )
                    rankings.append(gr.Label(label=words("ranking_of"), elem_id=f"ranking-{name}"))
    looks = gr.Gallery(label=words("looks"), columns=9, height=260, elem_id="looks")
    table = gr.Dataframe(
        headers=["#", "instruction", *(NAMES.get(name, name) for name in models)],
        label=words("history"),
        elem_id="history",
        interactive=False,
        wrap=True,
    )
    gr.Examples(draw_examples(), [picture, instruction, candidates], label=words("examples"))
    button.click(
        lambda *values: ask(service, *values),
        [picture, instruction, candidates, history],
        [*answers, *rankings, looks, history, table],
        concurrency_limit=4,
        api_visibility="private",
    )


def draw_examples() -> list[list[str]]:
    """Three pictures of the embedded world with an instruction and candidates each."""
    folder = Path(tempfile.mkdtemp(prefix="instructblip-examples-"))
    rows = []
    for number, text in enumerate(INSTRUCTIONS[:3]):
        file = folder / f"{number}.png"
        render(sample_scene(random.Random(number)), 192).save(file)
        options = "0, 1, 2, 3, 4" if "how many" in text else CANDIDATES
        rows.append([str(file), text, options])
    return rows


def ask(
    service: Service, file: str | None, instruction: str, candidates: str, history: list[list[Any]]
) -> tuple[Any, ...]:
    """Every model's answer and ranking, the attention of the first, and the longer history."""
    if not file or not (instruction or "").strip():
        raise gr.Error("a picture and an instruction are needed / 需要图片和指令")
    options = tuple(dict.fromkeys(c.strip() for c in (candidates or "").split(",") if c.strip()))
    options = options[: service.config.max_candidates]
    try:
        picture = decode_picture(Path(file).read_bytes(), service.config, "the picture")
        jobs = {
            name: _jobs(service, name, picture, instruction, options) for name in service.batchers
        }
        found = {name: [_wait(job) for job in own] for name, own in jobs.items()}
    except BadPicture as error:
        raise gr.Error(str(error)) from None
    except QueueFull:
        raise gr.Error("the server is busy; try again / 服务器繁忙，请重试") from None
    except (TooLate, TimeoutError):
        raise gr.Error("the answer took too long / 回答超时") from None
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
        "pixels": (batcher.engine.pictures.transform(picture),),
        "instruction": instruction,
        "deadline": time.monotonic() + config.timeout_s,
    }
    most = min(batcher.engine.decoding.get("max_new_tokens", config.max_tokens), config.max_tokens)
    jobs = [Job(**shared, decoding={"max_new_tokens": most}), Job(**shared, look=True)]
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
    maps = [("all", patches.mean(0)), *((str(i + 1), one) for i, one in enumerate(patches))]
    return [(_heat(base, one.unflatten(0, (grid, grid)).numpy()), name) for name, one in maps]


def _heat(base: np.ndarray, weights: np.ndarray) -> Image.Image:
    """Bright and warm where the weight is, dark where it is not."""
    weights = weights / max(float(weights.max()), 1e-9)
    small = Image.fromarray((weights * 255).astype(np.uint8))
    heat = np.asarray(small.resize(base.shape[:2], Image.Resampling.BICUBIC), np.float32) / 255
    warm = np.stack([255 * heat, 140 * heat, 0 * heat], axis=-1)
    mixed = base * (0.35 + 0.35 * heat[..., None]) + 0.5 * warm
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
