"""Any transformers image-text-to-text model in a local directory, as a baseline for evaluation.

One sample at a time, so that an answer does not depend on how the processor pads. Nothing is
downloaded and no code of the directory is run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from instructblip.core.example import IMAGE_MARK, Example
from instructblip.core.files import read_json
from instructblip.data.reading.decode import Window
from instructblip.data.reading.frames import evenly_spaced
from instructblip.data.reading.images import load_image
from instructblip.data.templates import Rendered, in_parts
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.config import is_known


def is_baseline(directory: Path) -> bool:
    """Whether ``directory`` holds a transformers model that is not a BLIP-2 or InstructBLIP."""
    config = directory / "config.json"
    return config.is_file() and not is_known(read_json(config).get("model_type"))


class TransformersModel:
    """A model with its processor: an ``Answerer`` for `evaluate`.

    Args:
        directory: as ``save_pretrained`` of model and processor writes it.
        device: where to run.
        num_frames: frames of a video that the model sees.
        window: of images with more than 8 bits.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        num_frames: int = 4,
        window: Window = "auto",
    ) -> None:
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor: Any = AutoProcessor.from_pretrained(directory, **local)
            model: Any = AutoModelForImageTextToText.from_pretrained(directory, **local)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{directory} is neither a BLIP-2, an InstructBLIP nor a transformers "
                f"image-text-to-text model with its processor: {error}"
            ) from error
        self.model = model.to(device).eval()
        self.device = device
        self.num_frames = num_frames
        self.window: Window = window
        self.fingerprint = fingerprint(directory, False, window)

    @torch.no_grad()
    def answer_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        **decoding: Any,
    ) -> list[str]:
        """One answer per example, without prompt and end token."""
        answers = []
        for example, prompt in zip(examples, prompts, strict=True):
            inputs = self._inputs(example, prompt.prompt, image_root)
            row = self.model.generate(**inputs, do_sample=False, **decoding)[0]
            prompt_ids = inputs["input_ids"][0]
            # Some models return the prompt before the answer, some do not.
            if len(row) >= len(prompt_ids) and torch.equal(row[: len(prompt_ids)], prompt_ids):
                row = row[len(prompt_ids) :]
            answers.append(self.processor.decode(row, skip_special_tokens=True).strip())
        return answers

    @torch.no_grad()
    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Summed log-likelihoods of the candidates and their end token, one forward each."""
        ranked = []
        for example, prompt, texts in zip(examples, prompts, candidates, strict=True):
            inputs = self._inputs(example, prompt.prompt, image_root)
            ranked.append([self._likelihood(inputs, text) for text in texts])
        return ranked

    def _likelihood(self, inputs: dict[str, Tensor], candidate: str) -> float:
        tokenizer = self.processor.tokenizer
        seq2seq = self.model.config.is_encoder_decoder
        # After a prompt in the same row, the answer begins a new word.
        text = candidate if seq2seq else f" {candidate}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        response = torch.tensor([[*ids, tokenizer.eos_token_id]], device=self.device)
        if seq2seq:
            logits = self.model(**inputs, labels=response).logits[0]
        else:
            whole = dict(inputs)
            for name, ids in (("input_ids", response), ("attention_mask", response * 0 + 1)):
                whole[name] = torch.cat([inputs[name], ids], dim=1)
            logits = self.model(**whole).logits[0, -response.shape[1] - 1 : -1]
        scores = logits.float().log_softmax(-1).gather(1, response[0][:, None])
        return float(scores.sum())

    def _inputs(self, example: Example, prompt: str, image_root: Path) -> dict[str, Tensor]:
        names = example.images
        frames = [names[i] for i in evenly_spaced(len(names), self.num_frames)]
        images = [load_image(name, image_root, self.window) for name in frames]
        text = self._text(prompt, len(images))
        one_or_many = images[0] if len(images) == 1 else images
        inputs = self.processor(images=one_or_many, text=text, return_tensors="pt")
        inputs = {k: v for k, v in inputs.items() if k != "token_type_ids"}
        return {k: v.to(self.device) for k, v in inputs.items()}

    def _text(self, prompt: str, num_images: int) -> str:
        """The prompt in the model's chat template if it has one, else after its image tokens."""
        if getattr(self.processor, "chat_template", None):
            parts = in_parts(prompt, num_images)
            image = {"type": "image"}
            content = [image if p == IMAGE_MARK else {"type": "text", "text": p} for p in parts]
            turns = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(turns, add_generation_prompt=True)
        token = getattr(self.processor, "image_token", None)
        in_front = num_images - prompt.count(IMAGE_MARK)
        if token and in_front:
            prompt = f"{IMAGE_MARK * in_front}\n{prompt}"
        return prompt.replace(IMAGE_MARK, token or "")
