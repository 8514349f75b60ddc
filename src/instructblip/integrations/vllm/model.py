"""InstructBLIP for vLLM: our image encoder and Q-Former, vLLM's language model.

The Q-Former reads the instruction, so the embeddings of an image depend on the text beside it. vLLM
computes embeddings of an image once and finds them again by a hash of the image and of the
request's processor settings (``mm_processor_kwargs``). The instruction is one of these settings:
``Processor.apply`` puts it there, and no cache of vLLM confuses two instructions about one image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from vllm.config import VllmConfig  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.interfaces import (  # pyright: ignore[reportMissingImports]
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.utils import (  # pyright: ignore[reportMissingImports]
    AutoWeightsLoader,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # pyright: ignore[reportMissingImports]
from vllm.multimodal.inputs import MultiModalFieldConfig  # pyright: ignore[reportMissingImports]
from vllm.multimodal.processing import (  # pyright: ignore[reportMissingImports]
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from instructblip.core.files import read_json
from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import to_rgb
from instructblip.data.templates import Rendered
from instructblip.data.tokens import Tokens
from instructblip.inference.engine import MAX_CHARACTERS_PER_TOKEN
from instructblip.model.checkpoints.transformers import HARMLESS
from instructblip.model.config import InstructBlipConfig
from instructblip.model.encoders import build_vision
from instructblip.model.fast import PackedQFormer, encode_frozen
from instructblip.model.lora import FOLDERS

INSTRUCTION = "instruction"
"""The processor setting with the text of a request; absent, it is that of the prompt's tokens."""
IMAGES_AT_ONCE = 64
"""Images that the image encoder reads at a time: it limits memory and changes no result."""


def read_config(path: str) -> InstructBlipConfig:
    """The config of the model directory ``path``.

    Raises FileNotFoundError unless it is a local directory, and ValueError where adapters are apart
    from the weights and where vLLM could not mark the place of an image.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{path} is no local directory; expected one that `instructblip export` wrote: "
            "download a model of the Hub first"
        )
    for folder in FOLDERS.values():
        if (directory / folder).is_dir():
            raise ValueError(
                f"{directory / folder} has an adapter, which vLLM would leave out: run "
                "`instructblip export` without --keep-lora"
            )
    config = InstructBlipConfig.from_transformers(read_json(directory / "config.json"))
    if config.image_token_id is None:
        raise ValueError(
            f"{directory / 'config.json'} has no image_token_index; expected a token id that no "
            "text has: add it"
        )
    return config


class ProcessingInfo(BaseProcessingInfo):
    """What the processor reads in the model directory."""

    @cached_property
    def config(self) -> InstructBlipConfig:
        return read_config(self.model_id)

    @cached_property
    def transform(self) -> ImageTransform:
        return ImageTransform.from_pretrained(self.model_id)

    @cached_property
    def tokens(self) -> Tokens:
        """The tokenizers, with the limits of the engine. Raises ValueError for a model with an
        encoder-decoder, which vLLM does not have, and for one without a Q-Former tokenizer."""
        tokens = Tokens.from_pretrained(self.model_id)
        if not tokens.decoder_only:
            raise ValueError(
                f"{self.model_id} has an encoder-decoder as its language model; the vLLM plug-in "
                "takes decoders such as Llama and OPT: use `instructblip serve`"
            )
        if tokens.qformer is None:
            raise ValueError(f"{self.model_id} has no qformer_tokenizer/: export the model again")
        longest = self.config.qformer.max_position_embeddings
        return replace(tokens, max_instruction=min(tokens.max_instruction, longest))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.config.num_query_tokens}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The request with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        side = self.info.config.vision.image_size
        images = [Image.new("RGB", (side, side)) for _ in range(mm_counts.get("image", 0))]
        return {"image": images}


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Text and images in; ids and pixels out, by the steps of the engine."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """The prompt with Q placeholders for each image, and what is computed of the images.

        vLLM gives the prompt as token ids. They are read back to the text, of which the engine's
        tokenizers make the instruction, the prompt (in the chat format, if the model has one) and
        the places of the images.
        """
        given = inputs.hf_processor_mm_kwargs
        text = given[INSTRUCTION] if INSTRUCTION in given else self._text_of(inputs.prompt)
        if not isinstance(text, str):
            raise ValueError(f"{INSTRUCTION} must be a text; got {str(text)[:80]}")
        tokens, count = self.info.tokens, inputs.mm_data_items.get_all_counts().get("image", 0)
        limit = MAX_CHARACTERS_PER_TOKEN * max(tokens.max_prompt, tokens.max_instruction)
        rendered = Rendered.of(text).last(limit)
        texts = tokens.tokenize(rendered, count)
        prompt = list(texts.prompt_ids)
        for place in sorted(texts.image_places or (0,) * count, reverse=True):
            prompt.insert(place, self.info.config.image_token_id)
        settings = {**given, INSTRUCTION: rendered.instruction}
        inputs = replace(inputs, prompt=prompt, hf_processor_mm_kwargs=settings)
        return super().apply(inputs, timing_ctx)

    def _text_of(self, prompt: Sequence[int]) -> str:
        """The text of a prompt without its start token. Raises ValueError where another special
        token is in it: that of a chat format, or of what the tokenizer does not know."""
        tokens = self.info.tokens
        start = list(tokens.layout()["prompt"]["prefix"])
        ids = list(prompt[len(start) :] if list(prompt[: len(start)]) == start else prompt)
        special = sorted(set(ids) & set(tokens.language.all_special_ids))
        if special:
            names = tokens.language.convert_ids_to_tokens(special)
            raise ValueError(
                f"the prompt has {', '.join(names)}; expected plain text, which gets the format of "
                "the model here: give the text alone, or with the prompt "
                f'mm_processor_kwargs={{"{INSTRUCTION}": TEXT}}'
            )
        return str(tokens.language.decode(ids, clean_up_tokenization_spaces=False))

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        transform = self.info.transform
        for image in hf_data["images"]:
            if not isinstance(image, Image.Image):
                raise ValueError(f"got an image as {type(image).__name__}; expected one of Pillow")
        pixels = [transform(to_rgb(image, transform.window)) for image in hf_data["images"]]
        ids = self.info.tokens.instruction(hf_kwargs[INSTRUCTION])
        return BatchFeature(
            {
                "pixel_values": torch.stack(pixels),  # [F, 3, S, S]
                "qformer_input_ids": torch.tensor([ids] * len(pixels)),  # [F, I]
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        batched = MultiModalFieldConfig.batched("image")
        return {"pixel_values": batched, "qformer_input_ids": batched}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.config
        place = [config.image_token_id]
        return [PromptReplacement("image", place, place * config.num_query_tokens)]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class InstructBlipForVllm(nn.Module, SupportsMultiModal, SupportsPP):
    """The names of the parameters are those of an exported directory.

    Image encoder and language model have vLLM's dtype; the Q-Former, its projection and the last
    LayerNorm of the image encoder are fp32, as in the engine. Each rank of a tensor-parallel group
    has these parts whole.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # an image without a mark is where the engine has it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        theirs = vllm_config.model_config.hf_config.text_config
        self.config = config = read_config(vllm_config.model_config.model)
        with self._mark_tower_model(vllm_config, "image"):
            vision = build_vision(config.vision)
            vision.post_layernorm.float()
            self.vision_model = vision
            shape = 1, config.num_query_tokens, config.qformer.hidden_size
            self.query_tokens = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.qformer = PackedQFormer(config.qformer).float()
            self.language_projection = nn.Linear(shape[2], theirs.hidden_size).float()
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=theirs,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.configure_mm_token_handling(theirs.vocab_size, [config.image_token_id])
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        pixel_values: Float[Tensor, "M 3 S S"] | None = None,
        qformer_input_ids: Int[Tensor, "M I"] | list[Tensor] | None = None,
        **_: object,
    ) -> Sequence[Float[Tensor, "Q L"]]:
        """The projected queries of each image under its instruction."""
        if pixel_values is None or qformer_input_ids is None:
            return []
        mask = pad_sequence([torch.ones_like(ids) for ids in qformer_input_ids], True)
        ids = pad_sequence(list(qformer_input_ids), True)  # [M, I]
        vision = self.vision_model
        features = encode_frozen(vision, pixel_values.to(vision.dtype), IMAGES_AT_ONCE)
        queries = self.query_tokens.expand(len(features), -1, -1)
        queries = self.qformer(queries, vision.norm(features), ids, mask)  # [M, Q, D]
        return self.language_projection(queries).unbind()

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Any:
        """What the language model computes of text and queries."""
        return self.language_model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The logits of the language model."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of all parameters that ``weights`` set. vLLM raises for one that is missing."""
        read = ((name, value) for name, value in weights if not HARMLESS.fullmatch(name))
        return AutoWeightsLoader(self).load_weights(read)
