"""OpenAI's chat completions: from a request to a job, from its answer to a response or events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException

from instructblip.core.example import IMAGE_MARK
from instructblip.data.templates import Rendered, without_front_marks
from instructblip.inference.chat import instruction_of
from instructblip.inference.engine import Engine
from instructblip.model.decoding import MIN_TEMPERATURE, Decoding
from instructblip.serving.batching import Answer, Job
from instructblip.serving.config import ServeConfig
from instructblip.serving.guard import error_body
from instructblip.serving.schema import (
    AnswerMessage,
    ChatRequest,
    ChatResponse,
    Choice,
    ChoiceLogprobs,
    ChosenLogprob,
    Message,
    TokenLogprob,
    Usage,
)
from instructblip.serving.service import Service

SYSTEM = ("system", "developer")
"""Roles whose texts come first."""


async def chat_job(service: Service, body: ChatRequest, engine: Engine) -> Job:
    """The job of a request, its images decoded. Raises HTTPException or BadImage."""
    deadline = service.deadline
    service.check_length(sum(message.num_characters for message in body.messages), "messages")
    instruction, urls = read_messages(body.messages)
    if not urls:
        raise HTTPException(400, "messages: no image; give one as a part of type image_url")
    service.check_marks(instruction.prompt, len(urls), "messages")
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Job(
        pixels=await service.pixels(urls, engine, "messages", deadline),
        instruction=instruction,
        decoding=_decoding(body, engine.decoding, service.config),
        seed=body.seed,
        stop=stop,
        details=(body.top_logprobs or 0) if body.logprobs else None,
        deadline=deadline,
    )


def read_messages(messages: list[Message]) -> tuple[Rendered, list[str]]:
    """The instruction: system texts, then earlier turns in the form of the training data, then the
    last message; and the URLs of the images, in the order of their marks in it."""
    if messages[-1].role != "user":
        raise HTTPException(400, "messages: the last one must be of the user")
    messages = sorted(messages, key=lambda message: message.role not in SYSTEM)
    urls = [url for message in messages for url in message.urls]
    system = [message.text for message in messages if message.role in SYSTEM]
    turns: list[tuple[str, str]] = []
    asked: list[str] = []
    for message in messages[len(system) :]:
        if message.role == "assistant":
            turns.append((" ".join(asked), message.text))
            asked = []
        else:
            text = message.text
            asked.append(text if asked or turns else without_front_marks(text))
    question = " ".join(text for text in asked if text)
    if not question.replace(IMAGE_MARK, "").strip():
        raise HTTPException(400, "messages: the last one has no text")
    return instruction_of(question, turns, " ".join(system)), urls


def _decoding(body: ChatRequest, stored: Decoding, config: ServeConfig) -> Decoding:
    """The settings of a request over those of the model, within the server's limits.

    Raises HTTPException for more beams, or a larger minimum of tokens, than the server allows.
    """
    if (body.num_beams or 0) > config.max_beams:
        raise HTTPException(
            422, f"num_beams: {body.num_beams} beams; this server allows {config.max_beams}"
        )
    most = body.max_completion_tokens or body.max_tokens or stored.max_new_tokens
    most = min(most, config.max_tokens)
    if (body.min_tokens or 0) > most:
        raise HTTPException(400, f"min_tokens is above the most tokens of an answer, {most}")
    temperature = body.temperature
    if temperature is not None and temperature < MIN_TEMPERATURE:
        temperature = 0
    return stored.override(
        max_new_tokens=most,
        min_new_tokens=body.min_tokens,
        num_beams=body.num_beams,
        repetition_penalty=body.repetition_penalty,
        length_penalty=body.length_penalty,
        temperature=temperature,
        top_p=body.top_p if temperature else None,
    )


def stream_events(service: Service, name: str, job: Job, body: ChatRequest) -> AsyncIterator[str]:
    """Server-sent events with the pieces of the answer; ends with ``[DONE]``. The chunk with the
    finish reason has the log-probabilities of all tokens."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def put(piece: str | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    job.listen(put)
    job.future.add_done_callback(lambda _: put(None))
    head = {**_head(name), "object": "chat.completion.chunk"}

    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content)}\n\n"

    def choice(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
        one = {"index": 0, "delta": delta, **more, "finish_reason": finish}
        return event({**head, "choices": [one]})

    async def events() -> AsyncIterator[str]:
        try:
            yield choice({"role": "assistant", "content": ""})
            # a timeout around a `yield` would fire in the reader of the events
            while (piece := await asyncio.wait_for(pieces.get(), job.seconds_left)) is not None:
                yield choice({"content": piece})
            answer: Answer = await service.result(job)
            service.metrics.tokens.inc(answer.tokens)
            known = logprobs_of(answer, job)
            more = {} if known is None else {"logprobs": known.model_dump()}
            yield choice({}, answer.finish_reason, **more)
            if body.stream_options and body.stream_options.include_usage:
                yield event({**head, "choices": [], "usage": _usage(answer).model_dump()})
        except (TimeoutError, HTTPException):
            yield event(error_body(504, "the answer took too long"))
        except Exception:
            yield event(error_body(500, "internal error"))
        finally:
            job.leave()
        yield "data: [DONE]\n\n"

    return events()


def response_of(model: str, answer: Answer, job: Job) -> ChatResponse:
    """The response with the whole answer."""
    choice = Choice(
        message=AnswerMessage(content=answer.text),
        logprobs=logprobs_of(answer, job),
        finish_reason=answer.finish_reason,
    )
    return ChatResponse(**_head(model), choices=[choice], usage=_usage(answer))


def logprobs_of(answer: Answer, job: Job) -> ChoiceLogprobs | None:
    """OpenAI's log-probabilities of the tokens of the text, if the job asked for them. Tokens
    behind a stop text are left out."""
    if answer.details is None or job.details is None:
        return None
    content: list[ChosenLogprob] = []
    length = 0
    for token in answer.details.tokens[: answer.tokens]:
        if length >= len(answer.text) and token.text:
            break
        length += len(token.text)
        top = [_logprob(*other) for other in token.likeliest[: job.details]]
        one = _logprob(token.text, token.log_prob)
        content.append(ChosenLogprob(**one.model_dump(), top_logprobs=top))
    known = answer.details
    return ChoiceLogprobs(
        content=content,
        log_likelihood=known.log_prob,
        confidence=known.confidence,
        blind_log_likelihood=known.blind_log_prob,
    )


def _logprob(text: str, log_prob: float) -> TokenLogprob:
    return TokenLogprob(token=text, logprob=log_prob, bytes=list(text.encode()))


def _head(model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.tokens,
        total_tokens=answer.prompt_tokens + answer.tokens,
        prompt_tokens_lost=answer.lost,
    )
