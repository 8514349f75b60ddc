"""What a model is used for, one function a stage, as in ``stages``: answering, serving, drawing."""

import functools
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from instructblip.inference.engine import Engine
    from instructblip.serving.config import ServeConfig

Decoding = dict[str, int | float | bool]
ModelForm = Literal["transformers", "lavis"]


def answer(model: str, images: Sequence[Path], instruction: str, decoding: Decoding) -> str:
    """Print the answer as it comes; several pictures, or a video file, are looked at together."""
    from instructblip.inference.inputs import open_images

    pictures = open_images(images)  # a wrong path is told before the model is read
    engine = load_engine(model)
    said = ""
    for piece in engine.stream(pictures, instruction, **decoding):
        print(piece, end="", flush=True)
        said += piece
    print()
    return said


def answer_many(
    model: str, source: Path, instruction: str | None, out: Path, decoding: Decoding
) -> int:
    """Answer a folder or a JSONL into a JSONL; returns how many pictures could not be read."""
    from instructblip.core.files import replacing
    from instructblip.core.progress import progress_bar
    from instructblip.inference.batch import answer_requests, read_requests

    requests = read_requests(source, instruction)
    out.parent.mkdir(parents=True, exist_ok=True)  # told before the model is read
    engine = load_engine(model)
    bad = 0
    with (
        replacing(out) as temporary,
        temporary.open("w", encoding="utf-8") as file,
        progress_bar("answering", "images") as bar,
    ):
        for records in answer_requests(engine, requests, **decoding):
            for record in records:
                bad += "error" in record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            bar.advance(len(records), len(requests))
    print(f"{len(requests) - bad} answers in {out}" + (f"; {bad} with an error" if bad else ""))
    return bad


def chat(model: str, images: Sequence[Path], decoding: Decoding) -> None:
    """Ask about pictures in the terminal, turn by turn."""
    from instructblip.inference.chat import Conversation, run_chat
    from instructblip.inference.inputs import open_images

    conversation = Conversation(open_images(images))
    engine = load_engine(model)
    show = functools.partial(print, end="", flush=True)
    run_chat(engine, conversation, lambda: input("> "), show, **decoding)


def serve(
    model: str, before: str | None, host: str, port: int, config: "ServeConfig", page: bool
) -> None:
    """Answer over HTTP until the process is told to stop; requests under way are finished."""
    try:
        import uvicorn

        from instructblip.serving.api import create_app
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'instructblip[serve]'") from error

    _check_address(host, port)  # told before the model is read
    engines = {"instructblip": load_engine(model)}
    if before is not None:
        engines["blip2"] = load_engine(before, instruction_aware=False)
    app = create_app(engines, config)
    if page:
        from instructblip.serving.page import mount_page

        app = mount_page(app)
    grace = int(config.timeout_s) + 1
    uvicorn.run(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=75,  # not while a busy client is about to send its next request
        server_header=False,
    )


def _check_address(host: str, port: int) -> None:
    """ValueError unless a server may listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on: {error.strerror}; choose another with --port, "
            "or another address with --host"
        ) from error


def draw(
    instruction: str,
    out: Path,
    model: str = "starter",
    image: Path | None = None,
    num_images: int = 1,
    seed: int | None = None,
    steps: int = 20,
    guidance: float = 2.0,
    image_guidance: float | None = None,
) -> list[Path]:
    """Draw ``instruction`` into ``out``; several pictures get a number each: x_0.png, x_1.png."""
    from instructblip.text_to_image.sample import Painter, save_picture

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out}: expected a file that ends in .png, .jpg or .webp")
    pictures = Painter.from_pretrained(model).draw(
        instruction, image, num_images, seed,
        steps=steps, guidance=guidance, image_guidance=image_guidance,
    )  # fmt: skip
    names = [out] if num_images == 1 else [
        out.with_stem(f"{out.stem}_{i}") for i in range(num_images)
    ]  # fmt: skip
    for picture, name in zip(pictures, names, strict=True):
        save_picture(picture, name)
        print(name)
    return names


def inspect(path: str) -> None:
    """Print what a checkpoint is, its sizes, what is trainable and what is missing."""
    from instructblip.model.checkpoints.inspection import inspect_checkpoint

    print(inspect_checkpoint(path).describe())


def import_checkpoint(
    checkpoint: Path, vision: Path, language: Path, qformer_tokenizer: Path | None, out: Path
) -> None:
    """Write a checkpoint of the official code as a directory that transformers reads too."""
    from instructblip.release import assemble

    assemble.import_checkpoint(checkpoint, vision, language, qformer_tokenizer, out)
    inspect(str(out))


def combine(
    vision: Path, language: Path, qformer_tokenizer: Path, out: Path, queries: int, layers: int
) -> None:
    """Write a model of two frozen parts and a fresh Q-Former, ready to be trained."""
    from instructblip.release.assemble import combine_parts

    combine_parts(vision, language, qformer_tokenizer, out, queries, layers)
    inspect(str(out))


def export(
    model: str,
    out: Path,
    form: ModelForm,
    results: Sequence[Path],
    image_encoder: bool,
    keep_lora: bool = False,
) -> None:
    """Write a model for others: a transformers directory with its card, or a LAVIS file."""
    from instructblip.evaluation.result import load_results
    from instructblip.model.language.lora import FOLDER
    from instructblip.release.export import export_model

    scores = [result for each in load_results(results).values() for result in each]
    export_model(model, out, form, scores, image_encoder, keep_lora)
    inspect(str(out))
    if keep_lora:
        print(f"adapter in PEFT's files: {out / FOLDER}")


def load_engine(model: str, **options: Any) -> "Engine":
    """A model ready to answer."""
    from instructblip.inference.engine import Engine

    return Engine.from_pretrained(model, **options)
