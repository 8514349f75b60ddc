"""The commands that use a model: answering, serving, drawing, and bringing it in and out."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from instructblip.cli import stages_use as stages

app = typer.Typer()

Model = Annotated[
    str, typer.Option("--model", help="A run or model directory, hf://OWNER/NAME, or `starter`.")
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="A picture or a video; several are looked at together."),
]


def _decoding(
    num_beams: Annotated[int | None, typer.Option(help="Beams; 5 in the paper.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; 256.")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at least; 1.")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Above 0 beams favour length; 1.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 repeats less; 1.5.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Draw at this temperature; else search.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the likeliest tokens to draw from.")
    ] = None,
) -> stages.Decoding:
    """What was given; the rest is as the model's directory says, then as in the paper."""
    given = dict(locals())
    from instructblip.model.decoding import check_overrides

    return check_overrides(given)


def _decodes(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of ``_decoding`` in place of its last parameter, ``decoding``.

    typer reads the options of a command off its signature and its annotations.
    """
    options = inspect.signature(_decoding).parameters
    own = inspect.signature(command).parameters
    shown = [own[name] for name in own if name != "decoding"] + list(options.values())

    @functools.wraps(command)
    def decoding_command(**given: Any) -> None:
        settings = {name: given.pop(name) for name in options}
        command(**given, decoding=_decoding(**settings))

    decoding_command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    decoding_command.__annotations__ = {option.name: option.annotation for option in shown}
    return decoding_command


@app.command()
@_decodes
def answer(
    image: Images = None,
    instruction: Annotated[str | None, typer.Option(help="What to ask.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help="A folder of pictures, or a JSONL of requests.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where the answers of --batch go.", dir_okay=False)
    ] = Path("out/answers.jsonl"),
    model: Model = "starter",
    *,
    decoding: stages.Decoding,
) -> None:
    """Answer an instruction about a picture, or about every picture of a folder or a JSONL."""
    if (batch is None) == (image is None):
        raise ValueError("give either --image PICTURE or --batch FOLDER_OR_JSONL")
    if instruction is not None and not instruction.strip():
        raise ValueError("--instruction is empty; say what to ask")
    if batch is not None:
        raise typer.Exit(1 if stages.answer_many(model, batch, instruction, out, decoding) else 0)
    if not instruction:
        raise ValueError("say with --instruction what to ask")
    stages.answer(model, image or [], instruction, decoding)


@app.command()
@_decodes
def chat(
    image: Images = None,
    model: Model = "starter",
    *,
    decoding: stages.Decoding,
) -> None:
    """Ask about pictures in the terminal, over several turns."""
    stages.chat(model, image or [], decoding)


@app.command()
def serve(
    model: Model = "starter",
    before: Annotated[
        str | None, typer.Option(help="A BLIP-2 to answer beside it, as model `blip2`.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    page: Annotated[bool, typer.Option(help="Whether to show the page at /page.")] = True,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; none: open to all.")
    ] = None,
    image_host: Annotated[
        list[str] | None, typer.Option(help="Host that pictures may be fetched from; none.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Requests answered together.")] = 32,
    max_queue: Annotated[int, typer.Option(help="Requests that wait; beyond them 429.")] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    max_beams: Annotated[int, typer.Option(help="Beams that a request may ask for.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds of a request.")] = 60.0,
) -> None:
    """Serve a model over HTTP: OpenAI's chat completions, ranking, metrics and a page."""
    from pydantic import ValidationError

    from instructblip.serving.config import ServeConfig

    keys = tuple(api_keys.read_text(encoding="utf-8-sig").split()) if api_keys else ()
    if api_keys and not keys:
        raise ValueError(f"{api_keys} holds no keys; expected one a line")
    try:
        config = ServeConfig(
            max_batch=max_batch,
            max_queue=max_queue,
            max_tokens=max_tokens,
            max_beams=max_beams,
            timeout_s=timeout,
            api_keys=keys,
            image_hosts=tuple(name.lower() for name in image_host or ()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).removesuffix("_s").replace("_", "-")
        raise ValueError(f"--{option}: {first['msg']}; got {first['input']}") from None
    stages.serve(model, before, host, port, config, page)


@app.command()
def draw(
    instruction: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture file.", dir_okay=False)] = Path(
        "drawn.png"
    ),
    image: Annotated[Path | None, typer.Option(help="A picture to take from.")] = None,
    model: Annotated[str, typer.Option(help="A directory that draws, or `starter`.")] = "starter",
    num_images: Annotated[int, typer.Option(help="Number of pictures.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    steps: Annotated[int, typer.Option(help="Steps from noise to picture.")] = 20,
    guidance: Annotated[float, typer.Option(help="How strictly to follow; 1 is plain.")] = 2.0,
    image_guidance: Annotated[
        float | None, typer.Option(help="The same for --image; by default as --guidance.")
    ] = None,
) -> None:
    """Draw what an instruction says, on its own or about a picture."""
    stages.draw(instruction, out, model, image, num_images, seed, steps, guidance, image_guidance)


@app.command(name="inspect")
def inspect_(
    path: Annotated[str, typer.Argument(help="A model or run directory, `starter`, or a .pth.")],
) -> None:
    """Tell what a checkpoint is: its sizes, what is trainable, what is missing."""
    stages.inspect(path)


@app.command(name="import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .pth of the official code (LAVIS).")],
    vision: Annotated[Path, typer.Option(help="eva_vit_g.pth, or weights of an image encoder.")],
    language: Annotated[Path, typer.Option(help="transformers directory of the language model.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    qformer_tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of BERT's tokenizer; none for a BLIP-2.")
    ] = None,
) -> None:
    """Bring a checkpoint of the official code into a directory that transformers reads too."""
    stages.import_checkpoint(checkpoint, vision, language, qformer_tokenizer, out)


@app.command()
def combine(
    vision: Annotated[Path, typer.Option(help="CLIP, SigLIP, or a BLIP-2 with its EVA-CLIP.")],
    language: Annotated[Path, typer.Option(help="A Llama, Qwen, Gemma, OPT or T5 directory.")],
    qformer_tokenizer: Annotated[Path, typer.Option(help="Directory of BERT's tokenizer.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    queries: Annotated[int, typer.Option(help="Query tokens.", min=1)] = 32,
    layers: Annotated[int, typer.Option(help="Layers of the Q-Former.", min=1)] = 12,
) -> None:
    """Put an image encoder and a language model together, with a fresh Q-Former between them."""
    stages.combine(vision, language, qformer_tokenizer, out, queries, layers)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run or model directory, or `starter`.")],
    out: Annotated[Path, typer.Argument(help="Directory, or .pth file, to write.")],
    form: Annotated[str, typer.Option("--format", help="transformers or lavis.")] = "transformers",
    results: Annotated[
        list[Path] | None, typer.Option(help="Result folder whose figures the card shows.")
    ] = None,
    image_encoder: Annotated[
        bool, typer.Option("--image-encoder", help="lavis: with the image encoder.")
    ] = False,
    keep_lora: Annotated[
        bool, typer.Option("--keep-lora", help="Leave a LoRA adapter apart, in PEFT's files.")
    ] = False,
) -> None:
    """Write a model for others, with its card."""
    if form not in get_args(stages.ModelForm):
        expected = " or ".join(get_args(stages.ModelForm))
        raise ValueError(f"--format {form}: expected {expected}")
    chosen = cast("stages.ModelForm", form)
    stages.export(model, out, chosen, results or [], image_encoder, keep_lora)
