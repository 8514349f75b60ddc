"""The page: ask all models about an image and compare their answers; draw.

It is mounted in the server and submits to the same batchers under the same limits. Labels follow
the language of the browser, English or Chinese.
"""

import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI, HTTPException
from fastapi.responses import RedirectResponse
from PIL import Image

from instructblip.evaluation.scoring import probabilities
from instructblip.inference.looks import overlays
from instructblip.scenes.world import render, sample_scene
from instructblip.serving.batching import Job, QueueFull, TooLate
from instructblip.serving.incoming import BadImage, decode
from instructblip.serving.service import Service

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # it would contact a hub
import gradio as gr
from gradio.themes import Default
from gradio_client.utils import traverse

PATH = "/page"
_FOLDER = Path(__file__).parent
_TEXTS = yaml.safe_load((_FOLDER / "page.yaml").read_text(encoding="utf-8"))
EN = {key: english for key, (english, _) in _TEXTS["labels"].items()}
ZH = {key: chinese for key, (_, chinese) in _TEXTS["labels"].items()}
EXAMPLES = _TEXTS["examples"]
INSTRUCTIONS = [*(text for _, text, _ in EXAMPLES), *_TEXTS["more_instructions"]]
SHOWN = 256
"""Pixels to which a smaller side of a drawn image is enlarged, each pixel a square."""


class Page(gr.Blocks):
    """Blocks that read uploaded files only.

    gradio itself fetches a file whose path is a URL, and accepts any file of this machine until
    ``has_launched`` is set, which only its own ``launch`` does.
    """

    def __init__(self) -> None:
        # uploads and results are deleted after an hour, and when the server ends
        super().__init__(title="InstructBLIP", analytics_enabled=False, delete_cache=(600, 3600))

    def __exit__(self, *error: Any) -> None:
        """The layout is complete: from here on only uploaded files are accepted."""
        super().__exit__(*error)
        self.has_launched = True

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **options: Any):
        """As in gradio, once no input names a file elsewhere."""
        traverse(inputs, _refuse, _is_elsewhere)
        return await super().preprocess_data(block_fn, inputs, *more, **options)


def _is_elsewhere(value: Any) -> bool:
    """Whether this is a file that was not uploaded: its content is behind or in a URL."""
    return isinstance(value, dict) and (
        "://" in str(value.get("path")) or str(value.get("url")).startswith("data:")
    )


def _refuse(_file: Any) -> None:
    raise gr.Error("a picture has to be uploaded, not named by a URL / 请上传图片，不能用网址")


def mount_page(app: FastAPI) -> FastAPI:
    """Mount the page at ``/page`` of an application of ``create_app``; ``/`` leads there.

    If the server asks for API keys, so does the page: any user name, a key as the password.
    """
    service: Service = app.state.service
    keys = service.config.api_keys
    i18n = gr.I18n(en=EN, zh=ZH, **{"zh-CN": ZH, "zh-TW": ZH})
    # fonts of the reader's machine: the page loads nothing from other addresses
    theme = Default(primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("monospace",))

    @app.get("/", include_in_schema=False)
    async def front() -> RedirectResponse:
        return RedirectResponse(PATH)

    @app.get(PATH + "/gradio_api/file=http{rest:path}", include_in_schema=False)
    async def elsewhere(rest: str) -> None:  # gradio would fetch it
        raise HTTPException(403, "the page fetches nothing")

    return gr.mount_gradio_app(
        app,
        make_page(service, i18n),
        path=PATH,
        auth=(lambda _user, password: password in keys) if keys else None,
        max_file_size=service.config.max_picture_bytes,
        theme=theme,
        css_paths=_FOLDER / "page.css",
        i18n=i18n,
        footer_links=[],
        ssr_mode=False,
    )


def make_page(service: Service, words: Any) -> Page:
    """The layout: a tab to ask and, if a model has a decoder, one to draw."""
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


@contextlib.contextmanager
def _visitor_errors(late: str, refusals: type[Exception]) -> Iterator[None]:
    """Show a visitor the message of a refusal or an exceeded limit; ``late`` if time is up."""
    try:
        yield
    except HTTPException as error:
        raise gr.Error(error.detail) from None
    except QueueFull:
        raise gr.Error("the server is busy; try again / 服务器繁忙，请重试") from None
    except (TooLate, TimeoutError):
        raise gr.Error(late) from None
    except refusals as error:
        raise gr.Error(str(error)) from None


def _image_input(label: Any, height: int, elem_id: str, **options: Any) -> gr.Image:
    image = gr.Image(
        type="filepath",
        label=label,
        sources=["upload", "clipboard"],
        height=height,
        elem_id=elem_id,
        **options,
    )
    # The file is opened by ``ask`` and ``paint``; gradio's would open it without limits. A subclass
    # is no way: gradio writes a stub file beside its source.
    image.preprocess = lambda payload: payload and payload.path  # type: ignore[method-assign]
    return image


def _instruction_input(choices: list[str], label: Any, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(
        choices=choices, value=choices[0], allow_custom_value=True, label=label, elem_id=elem_id
    )


def ask_tab(service: Service, words: Any) -> None:
    """Image, instruction and candidates; the button calls ``ask``."""
    models = {name: _TEXTS["names"].get(name, name) for name in service.batchers}
    examples = [
        (render(sample_scene(random.Random(seed)), 256), text, candidates)
        for seed, text, candidates in EXAMPLES
    ]
    history = gr.State([])
    gr.Markdown(words("title"), elem_id="title")
    gr.Markdown(words("about"))
    with gr.Row():
        with gr.Column(scale=2):
            image = _image_input(words("picture"), 260, "picture", format="png")
            instruction = _instruction_input(INSTRUCTIONS, words("instruction"), "instruction")
            candidates = gr.Textbox(label=words("candidates"))
            button = gr.Button(words("ask"), variant="primary", elem_id="ask")
            # separate files, which stay when a chosen example is deleted with the uploads
            thumbnails = gr.Dataset(
                components=[gr.Image(format="png", render=False)],
                samples=[[shown.resize((128, 128))] for shown, *_ in examples],
                type="index",
                label=words("examples"),
                elem_id="examples",
            )
        with gr.Column(scale=3):
            answers: list[gr.Textbox] = []
            rankings: list[gr.Label] = []
            with gr.Row():
                for name, title in models.items():
                    with gr.Column():
                        gr.Markdown(f"### {title}")
                        label, place = words("answer_of"), f"answer-{name}"
                        answers.append(gr.Textbox(label=label, elem_id=place, lines=2))
                        label, place = words("ranking_of"), f"ranking-{name}"
                        rankings.append(gr.Label(label=label, show_heading=False, elem_id=place))
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
    inputs = [image, instruction, candidates]
    thumbnails.click(examples.__getitem__, thumbnails, inputs, api_visibility="private")
    button.click(
        lambda *values: ask(service, *values),
        [*inputs, history],
        [*answers, *rankings, looks, history, table],
        concurrency_limit=4,
        api_visibility="private",
    )


def ask(
    service: Service, file: str | None, instruction: str, candidates: str, history: list[list[Any]]
) -> tuple[Any, ...]:
    """Every model's answer and ranking, the attention of the first, and the longer history."""
    if not file or not (instruction or "").strip():
        raise gr.Error("a picture and an instruction are needed / 需要图片和指令")
    parts = (part.strip() for part in re.split("[,，、]", candidates or ""))
    options = tuple(dict.fromkeys(part for part in parts if part))
    with _visitor_errors("the answer took too long / 回答超时", BadImage):
        service.check_candidates(options)
        service.check_length(len(instruction), "instruction")
        service.check_marks(instruction, 1, "instruction")
        data = Path(file).read_bytes()
        image = decode(data, service.config, "the picture")
        first = next(iter(service.batchers.values())).engine.images.transform
        jobs = [_submit(service, name, data, instruction, options) for name in service.batchers]
        # of each model: the answer, the attention and, with candidates, their scores
        results = [[job.wait() for job in submitted] for submitted in jobs]
    if any(answer.lost for answer, *_ in results):
        gr.Warning(
            "the instruction is too long: its beginning was not read / 指令过长，开头未被读取"
        )
    answers = [answer.text for answer, *_ in results]
    bars = [
        dict(zip(options, probabilities(scores[0]), strict=True)) if scores else None
        for _, _, *scores in results
    ]
    history = [*history, [len(history) + 1, instruction, *answers]][-50:]
    shown = overlays(image.crop(first.seen(*image.size)), results[0][1][0])
    return *answers, *bars, shown, history, history


def _submit(
    service: Service, name: str, data: bytes, instruction: str, options: tuple[str, ...]
) -> list[Job]:
    """Submits a job to answer, one to look and, with candidates, one to rank."""
    batcher = service.batchers[name]
    transform = batcher.engine.images.transform
    image = decode(data, service.config, "the picture", transform.window)
    shared: dict[str, Any] = {
        "pixels": (transform(image),),
        "instruction": instruction,
        "deadline": service.deadline,
    }
    decoding = batcher.engine.decoding
    most = min(decoding.max_new_tokens, service.config.max_tokens)
    answering = Job(**shared, decoding=decoding.override(max_new_tokens=most))
    jobs = [answering, Job(**shared, look=True)]
    if options:
        jobs.append(Job(**shared, candidates=options))
    for job in jobs:
        batcher.submit(job)
    return jobs


def draw_tab(service: Service, words: Any) -> None:
    """Instruction, subject image and settings; the button calls ``paint``."""
    with gr.Row():
        with gr.Column(scale=1):
            instruction = _instruction_input(_TEXTS["draw_instructions"], words("what"), "what")
            subject = _image_input(words("subject"), 240, "subject")
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
    """Images by the first model that draws, enlarged for display."""
    batcher = service.choose_painter(None)
    with _visitor_errors("drawing took too long / 绘图超时", ValueError):
        batcher.engine.painter.check(instruction or "", int(number))
        subject = None
        if file:
            subject = decode(Path(file).read_bytes(), service.config, "the picture")
        drawing = {
            "image": subject,
            "num_images": int(number),
            "guidance": float(guidance),
            "seed": None if seed is None or seed < 0 else int(seed),
        }
        deadline = service.deadline
        job = Job(pixels=(), instruction=instruction, drawing=drawing, deadline=deadline)
        batcher.submit(job)
        images: list[Image.Image] = job.wait()
    times = max(1, SHOWN // images[0].width)
    return [
        image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        for image in images
    ]
