"""The commands that use a model: answering, serving, drawing, and converting checkpoints."""

import functools
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from instructblip.cli.options import (
    Images,
    Model,
    Overrides,
    Settings,
    SettingsCommand,
    complete_model,
    read_recipe,
    to_dir,
    to_file,
)

if TYPE_CHECKING:
    from instructblip.inference.details import DetailedAnswer
    from instructblip.inference.engine import Engine
    from instructblip.inference.inputs import FramesInput

app = typer.Typer()

ModelForm = Literal["transformers", "retrieval", "lavis", "onnx", "web"]
Method = Literal["occlusion", "features", "gradient", "rollout", "attention"]
"""That of `model/explain.py`, which is not imported before it is needed."""
CardResults = Annotated[
    list[Path] | None, Option("--results", help="Results that the card shows, with intervals.")
]
Licence = Annotated[
    str | None, Option(help="Licence for the card, as the Hub writes it: apache-2.0, mit, other.")
]
Datasets = Annotated[
    list[str] | None, Option("--dataset", help="OWNER/NAME of a data set of the Hub, for the card.")
]

MIN_KEY = 16
"""Characters of an API key: the server answers wrong ones slowly, but to any number of clients."""


@app.command(cls=SettingsCommand)
def answer(
    image: Images = None,
    instruction: Annotated[str | None, Option(help="What to ask.")] = None,
    batch: Annotated[Path | None, Option(help="Folder of images, or JSONL of requests.")] = None,
    out: Annotated[Path, to_file("Answers of --batch: .jsonl or .csv.")] = Path(
        "out/answers.jsonl"
    ),
    txt: Annotated[bool, Option("--txt", help="--batch: also a .txt beside each image.")] = False,
    candidates: Annotated[
        str | None, Option(help="The answers to choose from, with commas.")
    ] = None,
    coverage: Annotated[
        float | None,
        Option(help="Print candidates that have the right one with this probability, as 0.9."),
    ] = None,
    min_confidence: Annotated[
        str | None, Option(help="Say so where the model is less sure: 0.7, or `auto`.")
    ] = None,
    details: Annotated[
        bool, Option("--details", help="Print log-probability and confidence too.")
    ] = False,
    blind: Annotated[
        list[Path] | None,
        Option(help="Another image, or a folder of some: how likely is the answer about them?"),
    ] = None,
    model: Model = "starter",
    decoding: Settings = None,
    placement: Settings = None,
) -> None:
    """Answer an instruction about an image, or about every image of a folder or a JSONL."""
    if (batch is None) == (image is None):
        raise ValueError("give either --image IMAGE or --batch FOLDER_OR_JSONL")
    if txt and batch is None:
        raise ValueError("--txt writes beside the images of --batch: give a folder there")
    if instruction is not None and not instruction.strip():
        raise ValueError("--instruction is empty; say what to ask")
    if batch is None and not instruction:
        raise ValueError("say with --instruction what to ask")
    texts_of = [text.strip() for text in (candidates or "").split(",") if text.strip()]
    if coverage is not None and not texts_of:
        raise ValueError("--coverage is of a closed question: give its answers with --candidates")
    if coverage is not None and not 0 < coverage < 1:
        raise ValueError(f"--coverage must be between 0 and 1, such as 0.9; got {coverage:g}")
    if batch is not None and (texts_of or min_confidence or blind):
        raise ValueError("--candidates, --min-confidence and --blind are of one --image")
    if texts_of and (details or blind):
        raise ValueError("--details and --blind are of generated answers: leave out --candidates")
    from instructblip.inference.batch import read_requests, text_files, write_answers
    from instructblip.inference.engine import Engine
    from instructblip.inference.inputs import open_images, open_others

    settings = decoding or {}
    if batch is not None:
        requests = read_requests(batch, instruction)
        texts = text_files(requests) if txt else None
        out.parent.mkdir(parents=True, exist_ok=True)  # an error comes before the model is read
        engine = Engine.from_pretrained(model, **(placement or {}))
        errors = write_answers(engine, requests, out, texts, details, **settings)
        failed = f"; {errors} with an error" if errors else ""
        print(f"{len(requests) - errors} answers in {out}{failed}")
        raise typer.Exit(1 if errors else 0)
    images = open_images(image or [])  # a wrong path is reported before the model is read
    others = open_others(blind or [])
    engine = Engine.from_pretrained(model, **(placement or {}))
    question = instruction or ""
    if texts_of:
        print(_describe_choice(engine, images, question, texts_of, coverage, min_confidence))
    elif details or others or min_confidence is not None:
        least = _threshold_of(engine, "answers", min_confidence)
        (known,) = engine.answer([images], [question], details=True, blind=others, **settings)
        print(_describe_answer(known, least))
    else:
        for piece in engine.stream(images, question, **settings):
            print(piece, end="", flush=True)
        print()


_UNSURE = "The model does not know"


def _threshold_of(
    engine: "Engine", part: Literal["answers", "candidates"], wanted: str | None
) -> float | None:
    """The least confidence with which an answer is given: a number, or the calibration's for
    "auto". Raises ValueError for anything else, and without a calibration."""
    if wanted is None:
        return None
    fitted = engine.require_calibration(part)
    if wanted == "auto":
        if fitted.abstain_below is None:
            raise ValueError("at no confidence are enough answers right: give a number from 0 to 1")
        return fitted.abstain_below
    try:
        least = float(wanted)
    except ValueError:
        least = -1.0
    if not 0 <= least <= 1:
        raise ValueError(f"the least confidence is a number from 0 to 1, or auto; got {wanted!r}")
    return least


def _describe_answer(answer: "DetailedAnswer", least: float | None = None) -> str:
    """The answer with what is known of it, or that the confidence is below ``least``."""
    if least is not None and answer.confidence is not None and answer.confidence < least:
        return f"{_UNSURE} (confidence {answer.confidence:.2f}, below {least:.2f})."
    known = [f"log-probability {answer.log_prob:.2f}"]
    if answer.confidence is not None:
        known.insert(0, f"confidence {answer.confidence:.2f}")
    if answer.blind_log_prob is not None:
        known.append(f"about other images {answer.blind_log_prob:.2f}")
    return f"{answer.text}\n({', '.join(known)})"


def _describe_choice(
    engine: "Engine",
    image: "FramesInput",
    instruction: str,
    candidates: Sequence[str],
    coverage: float | None = None,
    min_confidence: str | None = None,
) -> str:
    """The likeliest candidate with its probability, or those of the set with ``coverage``, or that
    the probability is below ``min_confidence``."""
    least = _threshold_of(engine, "candidates", min_confidence)
    if coverage is not None:
        engine.require_calibration("candidates")
    ranked = engine.rank(image, instruction, candidates, details=True)
    best = max(ranked, key=lambda candidate: candidate.probability)
    if least is not None and best.probability < least:
        return f"{_UNSURE} (confidence {best.probability:.2f}, below {least:.2f})."
    if coverage is None:
        kind = "" if best.calibrated else ", not calibrated"
        return f"{best.text} ({100 * best.probability:.0f} %{kind})"
    fitted = engine.require_calibration("candidates")
    chosen = fitted.answer_set([each.log_likelihood for each in ranked], coverage)
    return f"{' or '.join(candidates[i] for i in chosen)} ({100 * coverage:g} %)"


@app.command(cls=SettingsCommand)
def look(
    image: Annotated[Path, Argument(help="The image.")],
    instructions: Annotated[list[str], Argument(help="One instruction or several.")],
    out: Annotated[Path, to_file("The picture to write: .png, .svg or .pdf.")] = Path("looks.png"),
    model: Model = "starter",
    placement: Settings = None,
) -> None:
    """Draw where the queries look under each instruction, with the answers."""
    opened = _to_draw_on(image, out)
    from instructblip.inference.engine import Engine
    from instructblip.inference.looks import draw_looks

    engine = Engine.from_pretrained(model, **(placement or {}))
    answers = draw_looks(engine, opened, instructions, out)
    for text, given in zip(instructions, answers, strict=True):
        print(f"{text} -> {given}")
    print(out)


@app.command()
def search(
    folder: Annotated[Path, Argument(help="The images, in folders below it too.")],
    query: Annotated[str | None, Argument(help="What they show.")] = None,
    like: Annotated[Path | None, Option(help="An image to compare with, instead of words.")] = None,
    limit: Annotated[int, Option(help="Images to show.", min=1, max=1000)] = 10,
    rerank: Annotated[
        int, Option(help="Similar images that are read together with the words.", min=0, max=4096)
    ] = 32,
    out: Annotated[Path | None, to_file("Also write the images: .html, .png or .jpg.")] = None,
    cache: Annotated[
        Path | None, to_dir("Where embeddings are stored; else the user's cache.")
    ] = None,
    model: Model = "starter",
    device: Annotated[str, Option(help="Where the model runs: auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Search a folder of images by words or by an image, best first.

    The first search embeds the images, later ones those that are new or changed.
    """
    if (query is None) == (like is None):
        raise ValueError('give either words to look for, such as "red heart", or --like IMAGE')
    if query is not None and not query.strip():
        raise ValueError("the words to look for are empty")
    if out is not None and out.suffix.lower() not in (".html", ".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out {out}: expected a file that ends in .html, .png or .jpg")
    from instructblip.inference.embedder import Embedder
    from instructblip.inference.inputs import open_images
    from instructblip.inference.search import open_gallery, write_page

    image = open_images([like])[0] if like is not None else None
    gallery = open_gallery(Embedder.from_pretrained(model, device), folder, cache)
    if image is not None:
        found = gallery.like(image, limit)
    else:
        found = gallery.find(query or "", limit, rerank)
    for number, each in enumerate(found, 1):
        print(f"{number:4}  {each.scores}  {each.path}")
    if out is not None:
        write_page(out, query or f"like {like}", found)
        print(out)


def _to_draw_on(path: Path, out: Path) -> Any:
    """The image at ``path``. Raises what is wrong with it, or with ``out``, before a model is
    read."""
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out {out}: expected a file that ends in .png, .svg or .pdf")
    from instructblip.inference.inputs import open_images

    images = open_images([path])
    if len(images) > 1:
        raise ValueError(f"{path} is a video; give an image")
    return images[0]


@app.command(cls=SettingsCommand)
def explain(
    image: Annotated[Path, Argument(help="The image.")],
    instruction: Annotated[str, Argument(help="The instruction.")],
    answer: Annotated[str | None, Option(help="The answer to explain; else the model's.")] = None,
    method: Annotated[Method, Option(help="How; docs/explain.md compares them.")] = "occlusion",
    out: Annotated[Path, to_file("The picture to write: .png, .svg or .pdf.")] = Path(
        "explain.png"
    ),
    model: Model = "starter",
    placement: Settings = None,
) -> None:
    """Draw which part of an image each word of an answer comes from."""
    if answer is not None and not answer.strip():
        raise ValueError("--answer is empty; give the answer to explain, or leave it out")
    opened = _to_draw_on(image, out)
    from instructblip.inference.engine import Engine
    from instructblip.inference.explain import measured
    from instructblip.inference.looks import draw_explanation

    engine = Engine.from_pretrained(model, **(placement or {}))
    explained = draw_explanation(engine, opened, instruction, out, answer, method)
    print(f"{instruction} -> {explained.answer}")
    for word, score in zip(explained.words, explained.scores, strict=True):
        print(f"{100 * math.exp(score):3.0f} % {word}")
    known = measured()
    if method == known["method"]:
        print(
            f"on Scenes the brightest place is on the thing asked about in {known['right']:.0f} % "
            f"of right answers (plain attention: {known['attention']:.0f} %)"
        )
    print(out)


@app.command(cls=SettingsCommand)
def chat(
    image: Images = None,
    model: Model = "starter",
    decoding: Settings = None,
    placement: Settings = None,
) -> None:
    """Ask about images in the terminal, over several turns."""
    from instructblip.inference.chat import Conversation, run_chat
    from instructblip.inference.engine import Engine
    from instructblip.inference.inputs import open_images

    conversation = Conversation(open_images(image or []))
    engine = Engine.from_pretrained(model, **(placement or {}))
    show = functools.partial(print, end="", flush=True)
    run_chat(engine, conversation, lambda: input("> "), show, **(decoding or {}))


@app.command(cls=SettingsCommand)
def serve(
    model: Model = "starter",
    before: Annotated[str | None, Option(help="A BLIP-2 to serve as well, as `blip2`.")] = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    page: Annotated[bool, Option(help="Whether to show the page at /page.")] = True,
    api_keys: Annotated[Path | None, Option(help="API keys, one a line; else open to all.")] = None,
    allow_host: Annotated[list[str] | None, Option(help="Name that the server goes by.")] = None,
    image_host: Annotated[list[str] | None, Option(help="Host to fetch images from; none.")] = None,
    max_batch: Annotated[int, Option(help="Requests answered together.")] = 32,
    max_queue: Annotated[int, Option(help="Requests that wait; beyond them 429.")] = 128,
    max_tokens: Annotated[int, Option(help="Tokens of an answer.")] = 256,
    max_beams: Annotated[int, Option(help="Beams that a request may ask for.")] = 8,
    timeout: Annotated[float, Option(help="Seconds of a request.")] = 60.0,
    shared_mb: Annotated[int, Option(help="MiB kept for requests about the same images.")] = 128,
    blind: Annotated[
        list[Path] | None,
        Option(help="Another image, or a folder of some: how likely is an answer about them?"),
    ] = None,
    placement: Settings = None,
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, ranking, metrics and a page."""
    from pydantic import ValidationError

    from instructblip.inference.engine import Engine
    from instructblip.inference.inputs import open_others
    from instructblip.serving.config import ServeConfig

    keys = tuple(api_keys.read_text(encoding="utf-8-sig").split()) if api_keys else ()
    if api_keys and not keys:
        raise ValueError(f"{api_keys} holds no keys; expected one a line")
    if short := [key for key in keys if len(key) < MIN_KEY]:
        raise ValueError(
            f"{api_keys} holds a key of {len(short[0])} characters, which can be guessed; expected "
            f"at least {MIN_KEY}, such as those of `openssl rand -hex 16`"
        )
    try:
        config = ServeConfig(
            max_batch=max_batch,
            max_queue=max_queue,
            max_tokens=max_tokens,
            max_beams=max_beams,
            timeout_s=timeout,
            shared_mb=shared_mb,
            api_keys=keys,
            allowed_hosts=_names(host, allow_host or ()),
            image_hosts=tuple(name.lower() for name in image_host or ()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).removesuffix("_s").replace("_", "-")
        raise ValueError(f"--{option}: {first['msg']}; got {first['input']}") from None
    try:
        from instructblip.core.pages import title_of
        from instructblip.serving.api import create_app
        from instructblip.serving.connections import run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'instructblip[serve]'") from error

    _check_address(host, port)  # before the model is read
    others = open_others(blind or [])
    places = placement or {}
    engines = {"instructblip": Engine.from_pretrained(model, **places)}
    titles = {"instructblip": title_of(model)}
    if before is not None:
        engines["blip2"] = Engine.from_pretrained(before, instruction_aware=False, **places)
        titles["blip2"] = title_of(before)
    app = create_app(engines, config, titles, others)
    if page:
        from instructblip.serving.page import add_page

        add_page(app)
    run_server(app, host, port)


@app.command()
def studio(
    folder: Annotated[Path, Argument(help="Folder of your images; made if it is not there.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        Option(
            help="The start: a model directory, `starter` or `small`; as in the run, or small.",
            autocompletion=complete_model,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        to_dir("Folder of the first run, of later ones with -2, ...; the newest, or FOLDER/tuned."),
    ] = None,
    port: Annotated[int, Option(help="Port on this machine.", min=0, max=65535)] = 8100,
) -> None:
    """Open a page on a folder: add images, write answers, tune, compare, try, export."""
    import secrets

    try:
        from instructblip.serving.connections import run_server
        from instructblip.studio.app import create_studio
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'instructblip[serve]'") from error
    from instructblip.inference.engine import Engine
    from instructblip.serving.config import ServeConfig
    from instructblip.studio.project import opened
    from instructblip.studio.runs import Runs, start_of, usual_out

    folder = folder.absolute()
    out = out.absolute() if out else usual_out(folder)
    with opened(folder, out) as project:  # refused before the model is read
        _check_address("127.0.0.1", port)
        start = model or start_of(out) or _usual_start()
        runs = Runs(project, out, start, overrides or ())
        config = ServeConfig(
            api_keys=(secrets.token_urlsafe(24),),
            max_pixels=1 << 26,  # photos of phones
            max_picture_bytes=32 << 20,
            max_body_bytes=48 << 20,  # one of them as a data URL
        )
        app = create_studio(project, Engine.from_pretrained(start), start, runs, config)
        run_server(app, "127.0.0.1", port, access_log=False)
        if runs.busy:
            print(f"the run continues; `instructblip studio {folder}` shows it")


def _usual_start() -> str:
    """`small`, which has read English, if its packages are installed, else the starter."""
    from instructblip.model.checkpoints.directory import SMALL, model_directory

    try:
        model_directory(SMALL)
    except FileNotFoundError:
        return "starter"
    return SMALL


def _names(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """The names of a server that listens at ``host``, beside those that every server has."""
    names = [*allowed]
    if host in ("0.0.0.0", "::"):
        names += [socket.gethostname(), f"{socket.gethostname()}.local"]
    elif ":" not in host and not host.replace(".", "").isdigit():
        names.append(host)
    return tuple(name.lower() for name in names)


def _check_address(host: str, port: int) -> None:
    """Raise ValueError unless a server may listen there."""
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


@app.command()
def draw(
    instruction: Annotated[str, Argument(help="What to draw.")],
    out: Annotated[Path, to_file("The image file.")] = Path("drawn.png"),
    image: Annotated[Path | None, Option(help="An image to take from.")] = None,
    model: Annotated[str, Option(help="A directory that draws, or `starter`.")] = "starter",
    num_images: Annotated[int, Option(help="Number of images.")] = 1,
    seed: Annotated[int | None, Option(help="The same seed draws the same.")] = None,
    steps: Annotated[int, Option(help="Steps from noise to image.")] = 20,
    guidance: Annotated[float, Option(help="How strictly to follow; 1 is plain.")] = 2.0,
    image_guidance: Annotated[
        float | None, Option(help="The same for --image; else as --guidance.")
    ] = None,
) -> None:
    """Draw what an instruction describes, alone or about an image.

    Several images are numbered: x_0.png, x_1.png.
    """
    from instructblip.text_to_image.sample import Painter, save_image

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out}: expected a file that ends in .png, .jpg or .webp")
    images = Painter.from_pretrained(model).draw(
        instruction,
        image,
        num_images,
        seed,
        steps=steps,
        guidance=guidance,
        image_guidance=image_guidance,
    )
    for number, drawn in enumerate(images):
        file = out if num_images == 1 else out.with_stem(f"{out.stem}_{number}")
        save_image(drawn, file)
        print(file)


@app.command(name="inspect")
def inspect_(
    path: Annotated[str, Argument(help="A model or run directory, a .pth, `starter` or `small`.")],
) -> None:
    """Print what a checkpoint is: its sizes, what is trainable, what is missing."""
    from instructblip.model.checkpoints.inspection import inspect_checkpoint

    print(inspect_checkpoint(path).describe())


@app.command()
def load(
    model: Annotated[Literal["small"], Argument(help="The model to assemble.")],
    out: Annotated[Path | None, Option(help="Directory to write; else the cache.")] = None,
) -> None:
    """Assemble `small`, a BLIP-2 for real images, from installed packages and our weights.

    Prints what it is, from which packages, and under which licences.
    """
    from instructblip.model.checkpoints.directory import check_output, model_directory
    from instructblip.model.checkpoints.small import LICENCES, assemble, shipped_parts

    if out is not None:
        check_output(out)
        assemble(out)
    directory = out or model_directory(model)
    inspect_(str(directory))
    for name, part in shipped_parts().items():
        print(f"{name} from {part.package} {part.version}, {part.licence}")
    print(f"all else from this package, Apache-2.0; texts of the licences: {directory / LICENCES}")


@app.command(name="import")
def import_(
    checkpoint: Annotated[Path, Argument(help="A .pth of the official code (LAVIS).")],
    vision: Annotated[Path, Option(help="eva_vit_g.pth, or weights of an image encoder.")],
    language: Annotated[Path, Option(help="transformers directory of the language model.")],
    out: Annotated[Path, Option(help="Directory to write.")],
    qformer_tokenizer: Annotated[
        Path | None, Option(help="BERT's tokenizer; none for a BLIP-2.")
    ] = None,
) -> None:
    """Convert a checkpoint of the official code to a directory that transformers reads too."""
    from instructblip.release.assemble import import_checkpoint

    import_checkpoint(checkpoint, vision, language, qformer_tokenizer, out)
    inspect_(str(out))


@app.command()
def combine(
    vision: Annotated[
        str, Option(help="Directory of an image encoder, or efficientnet-lite0 or -lite2.")
    ],
    language: Annotated[str, Option(help="A Llama, Qwen, Gemma, OPT or T5 directory, or a GGUF.")],
    out: Annotated[Path, Option(help="Directory to write.")],
    qformer_tokenizer: Annotated[
        str | None, Option(help="Directory of a BERT's tokenizer; else the language model's own.")
    ] = None,
    text_branch: Annotated[
        str | None, Option(help="A BERT whose words the Q-Former starts from; else random.")
    ] = None,
    queries: Annotated[int, Option(help="Query tokens.", min=1)] = 32,
    layers: Annotated[int, Option(help="Layers of the Q-Former.", min=1)] = 12,
    width: Annotated[
        int | None, Option(help="Its width; 768, at most the language model's.", min=1)
    ] = None,
    heads: Annotated[int | None, Option(help="Its attention heads; width / 64.", min=1)] = None,
    feed_forward: Annotated[
        int | None, Option(help="Width of its feed-forwards; 4 x width.", min=1)
    ] = None,
    image_every: Annotated[int, Option(help="Each n-th layer reads the image.", min=1)] = 2,
) -> None:
    """Combine an image encoder and a language model, with a new Q-Former between them.

    Each part may also be hf://OWNER/NAME of the Hub. Prints what was built, what each part starts
    from, and the memory and disk that it needs.
    """
    from instructblip.experiment.memory import predict_memory
    from instructblip.release.assemble import combine_parts

    sizes = {
        "num_hidden_layers": layers,
        "cross_attention_frequency": image_every,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
    }
    given = {name: size for name, size in sizes.items() if size is not None}
    made = combine_parts(vision, language, qformer_tokenizer, out, queries, text_branch, given)
    print(made.describe())
    samples = 32
    step = [f"model.start={out}", f"training.batch_size={samples}", "training.accumulate=1"]
    peak = predict_memory(read_recipe("pretrain_captions", step)).peak
    print(
        f"on disk: {made.bytes_on_disk / 2**20:,.0f} MiB; memory to pre-train with {samples} "
        f"samples a step: {peak / 2**30:.1f} GiB (`instructblip memory` predicts it for a recipe)"
    )


@app.command()
def export(
    model: Annotated[str, Argument(help="A run or model directory, `starter` or `small`.")],
    out: Annotated[Path, Argument(help="Directory, or .pth or .md file, to write.")],
    form: Annotated[ModelForm, Option("--to", "--format", help="What reads it.")] = "transformers",
    results: CardResults = None,
    licence: Licence = None,
    dataset: Datasets = None,
    card: Annotated[bool, Option("--card", help="Write only the card, to a new .md file.")] = False,
    image_encoder: Annotated[
        bool, Option("--image-encoder", help="lavis: with the image encoder.")
    ] = False,
    keep_lora: Annotated[
        bool,
        Option("--keep-lora", help="Write LoRA adapters separately, in PEFT's files."),
    ] = False,
    weights: Annotated[
        Literal["fp32", "int8"] | None,
        Option(help="onnx, web: type of stored weights; fp32 for onnx, int8 for web."),
    ] = None,
    runtime: Annotated[
        Path | None, Option(help="web: the unpacked npm package onnxruntime-web.")
    ] = None,
) -> None:
    """Write a model for others, with its card. LoRA adapters are merged unless they are kept.

    The form "retrieval" is transformers' Blip2ForImageTextRetrieval: the parts that search needs.
    onnx: three graphs for onnxruntime. web: one HTML file that answers in a browser, offline.
    """
    if card and (form != "transformers" or image_encoder or keep_lora):
        raise ValueError("--card writes no model: leave out --format and the options of a model")
    if form in ("onnx", "web"):
        if results or licence or dataset or image_encoder or keep_lora:
            raise ValueError(f"--to {form} has no card, parts or adapters: leave their options out")
        if runtime is not None and form == "onnx":
            raise ValueError("--runtime is of --to web")
        from instructblip.release.onnx import export_onnx
        from instructblip.release.web import export_web

        if form == "onnx":
            export_onnx(model, out, weights or "fp32")
        else:
            export_web(model, out, runtime, weights or "int8")
        for file in sorted(out.rglob("*")):
            if file.is_file():
                print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}")
        if form == "web":
            print(
                f"Open {out / 'index.html'} in a browser; the file is complete without the others."
            )
        return
    if weights or runtime:
        raise ValueError("--weights and --runtime are of --to onnx and --to web")
    from instructblip.evaluation.result import load_results
    from instructblip.model.lora import FOLDERS
    from instructblip.release.export import Given, export_model, left_out, write_card

    scores = [result for each in load_results(results or []).values() for result in each]
    given = Given(licence, tuple(dataset or ()))
    if card:
        write_card(model, out, scores, given)
    else:
        export_model(model, out, form, scores, image_encoder, keep_lora, given)
    if form == "transformers":
        written_card = out if card else out / "README.md"
        for fact in left_out(written_card.read_text(encoding="utf-8")):
            print(f"the card leaves out {fact}")
    if card or form == "retrieval":
        print(out if card else f"{out}: Blip2ForImageTextRetrieval")
        return
    inspect_(str(out))
    if keep_lora:
        written = [out / name for name in FOLDERS.values() if (out / name).is_dir()]
        print(f"adapter in PEFT's files: {', '.join(map(str, written))}")


@app.command()
def push(
    model: Annotated[str, Argument(help="A run or model directory, `starter` or `small`.")],
    name: Annotated[str, Argument(metavar="OWNER/NAME", help="The repository of the Hub.")],
    results: CardResults = None,
    licence: Licence = None,
    dataset: Datasets = None,
    private: Annotated[bool, Option("--private", help="If it is new, only you see it.")] = False,
    revision: Annotated[str | None, Option(help="Branch, made if new; else main.")] = None,
    token_file: Annotated[
        Path | None, Option(help="File of the token; else HF_TOKEN, or that of `hf auth login`.")
    ] = None,
    keep_lora: Annotated[
        bool, Option("--keep-lora", help="LoRA adapters separately, in PEFT's files.")
    ] = False,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Send a model with its card to the Hugging Face Hub, as one commit, after asking."""
    import tempfile

    from instructblip.evaluation.result import load_results
    from instructblip.release.export import Given, export_model, left_out
    from instructblip.release.hub import Hub

    hub = Hub.connect(name, token_file)  # refused before the model is read
    scores = [result for each in load_results(results or []).values() for result in each]
    given = Given(licence, tuple(dataset or ()))
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model"
        title = name.partition("/")[2]
        export_model(model, written, "transformers", scores, False, keep_lora, given, title)
        files = hub.check(written)
        for fact in left_out((written / "README.md").read_text(encoding="utf-8")):
            print(f"the card leaves out {fact}")
        for file in files:
            print(f"{file.stat().st_size:15,} bytes  {file.relative_to(written).as_posix()}")
        total = sum(file.stat().st_size for file in files)
        print(f"{total:15,} bytes in {len(files)} files to {hub.where(revision)}")
        if not yes:
            typer.confirm("Send these?", abort=True)
        print(hub.send(written, private, revision))
