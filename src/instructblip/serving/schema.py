"""Requests and responses: OpenAI's chat completions and images, and ranking.

Unknown fields are refused: ignoring a setting silently would answer another question. Fields of
OpenAI that this server does not have are taken at the value that changes nothing.

A request has few errors however many values of it are wrong: a list ends at its first one, and an
unknown field is the only one of its object.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from instructblip.core.example import IMAGE_MARK
from instructblip.inference.details import FinishReason
from instructblip.model.decoding import (
    MAX_TEMPERATURE,
    LengthPenalty,
    MinNewTokens,
    NumBeams,
    RepetitionPenalty,
    TopP,
)
from instructblip.model.explain import Method

Text = Annotated[str, Field(max_length=16_000)]
ModelName = Annotated[
    str | None, Field(max_length=200, description="One of /v1/models; by default the first.")
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = next((key for key in data if key not in cls.model_fields), None)
            if unknown is not None:
                # it may hold half a surrogate pair, which no error can carry
                key = unknown[:40].encode(errors="replace").decode()
                message = "this server does not know the field; leave it out"
                raise PydanticCustomError("unknown_field", message, {"field": key})
        return data


def _only(*neutral: Any) -> AfterValidator:
    """Takes null or one of the values that change nothing, in a field that this server does not
    have."""

    def check(value: Any) -> Any:
        if value is not None and value not in neutral:
            shown = " or ".join(json.dumps(one) for one in neutral)
            other = f", or send {shown}" if neutral else ""
            raise ValueError(f"this server has no such setting; leave it out{other}")
        return value

    return AfterValidator(check)


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    url: str = Field(description="data:image/png;base64,..., or https where the server allows it")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _form(content: Any) -> str | None:
    """The form of a content, so that an error names that form only."""
    return "text" if isinstance(content, str) else "parts" if isinstance(content, list) else None


Content = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Part], Field(max_length=64, fail_fast=True), Tag("parts")],
    Discriminator(
        _form,
        custom_error_type="content",
        custom_error_message="Input should be a text or a list of parts",
    ),
]


class Message(_Body):
    """The model reads each image where it is among the parts of its message; those that are all
    before or all behind the text of the first message of the user are read first."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    @property
    def text(self) -> str:
        """The text, with an ``IMAGE_MARK`` for each image unless it has marks itself."""
        if isinstance(self.content, str):
            return self.content
        texts = "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        if IMAGE_MARK in texts:
            return texts
        return "\n".join(getattr(part, "text", IMAGE_MARK) for part in self.content)

    @property
    def num_characters(self) -> int:
        """Characters of all its texts."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Body):
    include_usage: bool | None = False
    include_obfuscation: Annotated[Any, _only(False)] = None


Name = Annotated[str | None, Field(max_length=200, description="Changes no answer.")]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[
    Annotated[StopText, Tag("text")]
    | Annotated[list[StopText], Field(max_length=4, fail_fast=True), Tag("parts")],
    Discriminator(
        _form,
        custom_error_type="stop",
        custom_error_message="Input should be a text or a list of texts",
    ),
]


class ChatRequest(_Body):
    """OpenAI's request; the last four fields are additions of this project."""

    model: ModelName = None
    messages: list[Message] = Field(min_length=1, max_length=64, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE, description="0: search.")
    top_p: TopP | None = None
    stop: Stop | None = Field(None, description="Texts before which the answer ends.")
    seed: int | None = Field(
        None, ge=-(1 << 63), lt=1 << 63, description="The same seed samples the same answer."
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Name = None
    safety_identifier: Name = None
    prompt_cache_key: Name = None
    n: Annotated[Any, _only(1)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    logprobs: bool | None = Field(None, description="Log-probability of each token, in nats.")
    top_logprobs: int | None = Field(
        None, ge=0, le=5, description="Tokens to list in the place of each; needs logprobs."
    )
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    store: Annotated[Any, _only(False)] = None
    metadata: Annotated[Any, _only({})] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    num_beams: NumBeams | None = None
    min_tokens: MinNewTokens | None = None
    repetition_penalty: RepetitionPenalty | None = None
    length_penalty: LengthPenalty | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: send true for it")
        return self


Candidate = Annotated[str, Field(min_length=1, max_length=1000)]


class _AboutImages(_Body):
    """An instruction about images."""

    model: ModelName = None
    images: list[str] = Field(
        fail_fast=True,
        min_length=1,
        max_length=64,
        description="URLs as in a chat; several are a video.",
    )
    instruction: Text


class RankRequest(_AboutImages):
    """Rank candidates as the answer, by log-likelihood."""

    candidates: list[Candidate] = Field(min_length=1, max_length=10_000, fail_fast=True)
    normalization: Literal["sum", "mean"] = "sum"
    coverage: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Probability with which the answer set has the right one; needs a calibration.",
    )


class ExplainRequest(_AboutImages):
    """Explain which part of each image the words of an answer come from."""

    answer: Text | None = Field(None, description="What to explain; by default the model's own.")
    method: Method = "occlusion"


class LookRequest(_AboutImages):
    """Where the queries look in images under an instruction."""


def _item(value: Any) -> str | None:
    """The form of an item, so that an error names that form only."""
    return "text" if isinstance(value, str) else "part" if isinstance(value, dict) else None


Item = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Part, Tag("part")],
    Discriminator(
        _item,
        custom_error_type="item",
        custom_error_message="Input should be a text, or a part with a text or an image",
    ),
]
Items = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[list[Item], Field(min_length=1, max_length=10_000, fail_fast=True), Tag("parts")],
    Discriminator(
        _form,
        custom_error_type="input",
        custom_error_message="Input should be a text or a list of texts and parts",
    ),
]


class EmbeddingRequest(_Body):
    """OpenAI's request; parts and the last two fields are additions of this project."""

    model: ModelName = None
    input: Items = Field(description="Texts, and parts as in a chat: each has an embedding.")
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[Any, _only()] = None
    user: Name = None
    instruction: Text | None = Field(
        None, description="What the embeddings of the images are about; by default everything."
    )
    pooling: Literal["mean"] | None = Field(
        None, description="One vector for an image: the mean of its vectors, of length 1."
    )

    @property
    def items(self) -> list[TextPart | ImagePart]:
        """What to embed, in turn."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [TextPart(type="text", text=i) if isinstance(i, str) else i for i in given]


class ImageRequest(_Body):
    """A subset of OpenAI's request; the last five fields are additions of this project."""

    prompt: Text = Field(description="What to draw.")
    model: ModelName = Field(None, description="One that draws; by default the first.")
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = Field(None, max_length=20, description="auto, or the size of the decoder.")
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    user: str | None = Field(None, max_length=200)
    image: str | None = Field(None, description="URL as in a chat: the subject to draw from.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="The same seed draws the same.")
    steps: int = Field(20, ge=1, le=100)
    guidance: float = Field(2.0, ge=0, le=30, description="Weight of the prompt; 1 is none extra.")
    image_guidance: float | None = Field(None, ge=0, le=30, description="None: as guidance.")


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """``content`` has the tokens of the text, as OpenAI's; the last three fields are additions
    of this project: the log-probability of the whole answer, its end token included; the
    probability that it is right, where the model is calibrated; and the log-probability of the same
    answer about other images, where the server has some (`serve --blind`)."""

    content: list[ChosenLogprob]
    refusal: None = None
    log_likelihood: float
    confidence: float | None
    blind_log_likelihood: float | None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_lost: int = Field(
        description="Tokens at the start of a too long prompt that the model did not read; at "
        "least so many where the prompt has more than 64 characters for each that it can read."
    )


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class RankedCandidate(BaseModel):
    """``probability`` is relative to the other candidates, and calibrated if the response says
    so."""

    text: str
    log_likelihood: float
    probability: float


class RankResponse(BaseModel):
    """The candidates in the order of the request, and the likeliest. ``answer_set`` has the right
    candidate with the probability ``coverage`` of the request, on average over questions like those
    of the calibration."""

    model: str
    best: str
    candidates: list[RankedCandidate]
    calibrated: bool
    answer_set: list[str] | None = None
    prompt_tokens_lost: int = Field(description="As in a chat's usage.")


Grid = list[list[float]]


class ExplainedImage(BaseModel):
    """Maps over the grid of the image encoder: of the whole answer, and of each word."""

    whole: Grid
    words: list[Grid]


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in fractions of the sides of an image."""


class ExplainResponse(BaseModel):
    """The words of the answer with their log-likelihoods, the part of each image that the model
    reads, and maps for each image, over this part."""

    model: str
    method: str
    answer: str
    words: list[str]
    log_likelihoods: list[float]
    seen: list[Box]
    images: list[ExplainedImage]


class LookResponse(BaseModel):
    """Of each image the part that the model reads, and the attention of each query to the rows of
    places in it."""

    model: str
    seen: list[Box]
    attention: list[list[list[list[float]]]] = Field(description="[image][query][row][column]")


Vector = list[float] | str
"""Numbers, or base64 of them as little-endian float32."""


class Embedded(BaseModel):
    """A text has ``embedding``; an image has ``embeddings``, one of each query: its similarity with
    a text is the greatest of their cosines. With the pooling of the request an image has
    ``embedding`` instead. All have length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: Vector | None = None
    embeddings: list[Vector] | None = None


class EmbeddingUsage(BaseModel):
    prompt_tokens: int = Field(description="Of the texts, and of the instruction at each image.")
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """In the order of the input."""

    object: Literal["list"] = "list"
    data: list[Embedded]
    model: str
    usage: EmbeddingUsage


class DrawnImage(BaseModel):
    b64_json: str


class ImageResponse(BaseModel):
    created: int
    data: list[DrawnImage]
    output_format: str
    size: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "instructblip"
    title: str = Field(description="What its owner calls it.")
    queries: int = Field(description="Query tokens of its Q-Former.")
    draws: bool = Field(description="Whether /v1/images/generations takes it.")
    embeds: bool = Field(description="Whether /v1/embeddings takes it.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]
    waiting: int


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail
