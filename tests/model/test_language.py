"""Loss, generation and ranking do not depend on padding, batching or the shared prefix."""

from dataclasses import replace

import pytest
import torch

from instructblip.model.config import InstructBlipConfig, QFormerConfig, VisionConfig
from instructblip.model.decoding import GREEDY
from instructblip.model.inference import generate_responses, rank_candidates
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import build_language_model, language_of
from instructblip.model.language.beams import BeamTree
from instructblip.model.language.ranking import Forest, in_chunks, sort_candidates
from tests.parity.tiny import LANGUAGES, VOCAB, padded, tiny_batch

GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BLOOM = {"model_type": "bloom", "hidden_size": 24, "n_layer": 2, "n_head": 2}
OPT_PROJECTED = {**LANGUAGES["opt"], "word_embed_proj_dim": 10}
TEXT_CONFIGS = {
    **LANGUAGES,
    "gpt2": {**GPT2, "eos_token_id": 2, "bos_token_id": 2},
    "qwen2": QWEN2,
    "bloom": {**BLOOM, "eos_token_id": 2, "pad_token_id": 3},
    "opt-projected": OPT_PROJECTED,
}


def tiny_model(language: str) -> InstructBlip:
    torch.manual_seed(0)
    config = InstructBlipConfig(
        vision=VisionConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        qformer=QFormerConfig(
            vocab_size=40,
            hidden_size=20,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=16,
            max_position_embeddings=12,
        ),
        language={"vocab_size": VOCAB, **TEXT_CONFIGS[language]},
        num_query_tokens=3,
    )
    model = InstructBlip(config)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
        model.language_projection.weight.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(params=list(TEXT_CONFIGS))
def model(request):
    return tiny_model(request.param)


def respond(model, batch, **settings):
    return generate_responses(model, batch, decoding=GREEDY.override(**settings))


def single(batch, sample, extra_padding=0):
    """Sample ``sample`` alone, its text cut to its own length plus some padding."""
    fields = {}
    for name in ("qformer", "prompt", "response"):
        mask = getattr(batch, f"{name}_mask")[sample]
        ids = getattr(batch, f"{name}_ids")[sample][mask.bool()].tolist()
        text = padded(name, [ids, ids + [7] * extra_padding])
        fields |= {f"{name}_ids": text[f"{name}_ids"][:1], f"{name}_mask": text[f"{name}_mask"][:1]}
    return replace(
        batch,
        pixel_values=batch.pixel_values[batch.image_index[sample]],
        image_index=torch.zeros(1, 1, dtype=torch.long),
        **fields,
    )


@pytest.mark.parametrize("extra_padding", [0, 3])
def test_batch_equals_single(model, extra_padding):
    batch = tiny_batch(model.config)
    losses = model.loss(batch).sample_losses
    answers = respond(model, batch, max_new_tokens=6)
    for sample in range(len(batch)):
        alone = single(batch, sample, extra_padding)
        torch.testing.assert_close(
            model.loss(alone).sample_losses[0], losses[sample], rtol=1e-5, atol=1e-5
        )
        assert respond(model, alone, max_new_tokens=6) == [answers[sample]]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_is_no_part_of_a_repetition_penalty(num_beams):
    model = tiny_model("llama")
    with torch.no_grad():  # the same few tokens again and again
        model.language_model.get_input_embeddings().weight.mul_(8)
    batch = tiny_batch(model.config)
    options = {"num_beams": num_beams, "max_new_tokens": 8, "min_new_tokens": 8}
    answers = respond(model, batch, repetition_penalty=5.0, **options)
    assert answers != respond(model, batch, **options)
    for sample in range(len(batch)):
        alone = single(batch, sample)
        assert respond(model, alone, repetition_penalty=5.0, **options) == [answers[sample]]


def test_rows_end_where_the_caller_says(model):
    batch = tiny_batch(model.config)
    six = GREEDY.override(max_new_tokens=6, min_new_tokens=6)
    whole = generate_responses(model, batch, decoding=six)
    seen = []

    def on_tokens(tokens):
        seen.append(tokens)
        return [row == 0 and len(seen) == 2 for row in range(len(tokens))]

    assert generate_responses(model, batch, on_tokens, six) == [whole[0][:2], *whole[1:]]
    assert [tokens[1] for tokens in seen] == whole[1]
    seen.clear()
    ended = generate_responses(
        model, batch, lambda tokens: seen.append(tokens) or [True] * len(tokens), six
    )
    assert ended == [ids[:1] for ids in whole]
    assert len(seen) == 1


def test_first_greedy_token_is_the_most_likely_candidate(model):
    """Generation pads on the left and ranking continues a cache; both continue the same prefix."""
    batch = tiny_batch(model.config)
    best = respond(model, batch, max_new_tokens=1)
    candidates = [[[token] for token in range(VOCAB)] for _ in best]
    for row, scores in zip(best, rank_candidates(model, batch, candidates), strict=True):
        first = int(scores.argmax())
        assert row == [first] or (row == [] and first in (1, 2))  # the end token is cut off


def candidates_for(batch):
    generator = torch.Generator().manual_seed(9)
    return [
        [[*torch.randint(4, 58, (length,), generator=generator).tolist(), 2] for length in lengths]
        for lengths in ([1, 3, 2, 5], [4], [0, 2])
    ]


@pytest.mark.parametrize(
    ("normalization", "include_end"), [("sum", True), ("mean", True), ("sum", False)]
)
@pytest.mark.parametrize("chunk", [2, 64])
def test_rank_equals_one_forward_per_candidate(model, normalization, include_end, chunk):
    batch = tiny_batch(model.config)
    candidates = candidates_for(batch)
    if not include_end:
        candidates[2] = candidates[2][1:]  # the lone end token has nothing else to score
    ranked = rank_candidates(model, batch, candidates, normalization, include_end, chunk)
    for sample, group in enumerate(candidates):
        assert ranked[sample].shape == (len(group),)
        for index, ids in enumerate(group):
            ids = ids if include_end else ids[:-1]
            alone = replace(single(batch, sample, 2), **padded("response", [ids]))
            expected = -model.loss(alone).loss_sum.detach()
            if normalization == "mean":
                expected = expected / len(ids)
            torch.testing.assert_close(ranked[sample][index], expected, rtol=0, atol=1e-4)


def plain_scores(model, alone, candidates):
    """The definition: the loss of each candidate as the response of a batch of one sample."""
    return torch.stack(
        [-model.loss(replace(alone, **padded("response", [ids]))).loss_sum for ids in candidates]
    ).detach()


FAMILY = [[5, 6, 7, 2], [5, 6, 2], [5, 6, 8, 9, 2], [5, 2], [10, 6, 7, 2], [5, 6, 7, 2], [2]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_common_prefixes_change_no_score(model, attention, chunk):
    batch = tiny_batch(model.config)
    model.language_model.set_attn_implementation(attention)
    groups = [FAMILY, FAMILY[2:4], FAMILY[::-1]]
    ranked = rank_candidates(model, batch, groups, chunk=chunk)
    for sample, group in enumerate(groups):
        expected = plain_scores(model, single(batch, sample), group)
        torch.testing.assert_close(ranked[sample], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_shared_tokens_of_candidates_are_computed_once(language):
    """The prefix runs once per sample, and a packed tree holds each of its nodes once."""
    model = tiny_model(language)
    batch = single(tiny_batch(model.config), 2)
    parts = ("encoder", "decoder") if language == "t5" else ("base_model",)  # prefix and candidates
    seen = {part: [] for part in parts}
    for part in parts:
        getattr(model.language_model, part).register_forward_pre_hook(
            lambda module, _, kwargs, part=part: seen[part].append(_size(kwargs)), with_kwargs=True
        )
    rank_candidates(model, batch, [FAMILY])
    prefix = 3 + 6  # queries and prompt
    if language == "t5":
        # Rows: 5 6 7; 5 6 8 9; 10 6 7. They contain "5" and "5 6".
        assert seen == {"encoder": [(1, prefix)], "decoder": [(1, 1), (3, 4)]}
    else:
        assert seen == {"base_model": [(1, prefix), (1, 8)]}  # 5 6 7 8 9 and 10 6 7


def test_a_chunk_ends_before_its_trees_have_too_many_nodes():
    long = [[i % 7, i, *[8] * 190, 2] for i in range(100, 356)]
    pairs = sort_candidates([long, FAMILY, [[9] * 5000]], True, 3)
    chunks = list(in_chunks(pairs, 256))
    assert [pair for chunk in chunks for pair in chunk] == pairs
    sizes = [len(Forest.of(chunk)) for chunk in chunks]
    assert sizes.pop() == 4999  # a candidate is never cut
    assert all(1800 < size <= 2000 for size in sizes[:-1])
    family = sort_candidates([FAMILY] * 60, True, 60)
    assert [len(chunk) for chunk in in_chunks(family, 256)] == [256, 164]
    assert list(in_chunks([], 256)) == []


def _size(kwargs):
    given = kwargs.get("inputs_embeds")
    return tuple((given if given is not None else kwargs["input_ids"]).shape[:2])


def test_rank_refuses_candidates_without_tokens():
    model = tiny_model("llama")
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match="no token to score"):
        rank_candidates(model, batch, [[[2]], [[2]], [[2]]], include_end=False)
    with pytest.raises(ValueError, match="one list per sample"):
        rank_candidates(model, batch, [[[2]]])
    assert [len(s) for s in rank_candidates(model, batch, [[], [[5, 2]], []])] == [0, 1, 0]
    assert [len(s) for s in rank_candidates(model, batch, [[], [], []])] == [0, 0, 0]
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        rank_candidates(model, batch, [[[2]], [[2]], [[2]]], chunk=0)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_generation_options(language):
    model = tiny_model(language)
    batch = tiny_batch(model.config)
    ends = model.language_model.generation_config.eos_token_id
    for options in (
        {"num_beams": 3, "length_penalty": -1.0},
        {"min_new_tokens": 5},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    ):
        rows = respond(model, batch, max_new_tokens=5, **options)
        assert len(rows) == len(batch)
        assert all(len(row) <= 5 and ends not in row for row in rows)
        if "min_new_tokens" in options:
            assert all(len(row) == 5 for row in rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", ["llama", "opt", "gpt2", "qwen2", "qwen3", "gemma", "phi3"])
def test_beams_in_one_row_equal_those_of_transformers(
    language: str, attention: str, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(language)
    with torch.no_grad():  # large enough weights that beams change places
        model.language_projection.weight.mul_(10)
        model.language_model.get_input_embeddings().weight.mul_(5)
    model.language_model.set_attn_implementation(attention)
    batch = tiny_batch(model.config)
    settings = [
        {"num_beams": 4},
        {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.5},
        {"num_beams": 2, "min_new_tokens": 8},
    ]
    moved: list[bool] = []
    reorder = BeamTree.reorder_cache

    def note(tree: BeamTree, beams: torch.Tensor) -> None:
        moved.append(not torch.equal(beams, torch.arange(len(beams))))
        reorder(tree, beams)

    monkeypatch.setattr(BeamTree, "reorder_cache", note)
    rows = [respond(model, batch, max_new_tokens=8, **o) for o in settings]
    assert any(moved)
    replaced: list[int] = []

    def plain(tree: BeamTree) -> object:
        replaced.append(tree.beams)
        return tree.language.model

    monkeypatch.setattr(BeamTree, "model", plain)
    for options, expected in zip(settings, rows, strict=True):
        assert respond(model, batch, max_new_tokens=8, **options) == expected
    assert replaced == [4, 3, 2]


def test_a_response_is_cut_at_its_end_token():
    """An end token in the middle of a greedy response cuts it there."""
    model = tiny_model("llama")
    batch = tiny_batch(model.config)
    rows = respond(model, batch, max_new_tokens=6)
    model.language_model.generation_config.eos_token_id = rows[0][2]
    cut = respond(model, batch, max_new_tokens=6)
    assert cut[0] == rows[0][: rows[0].index(rows[0][2])]


def test_generation_restores_the_training_mode():
    model = tiny_model("llama").train()
    respond(model, tiny_batch(model.config), max_new_tokens=1)
    assert model.training
    assert model.qformer.training
    assert not model.language_model.training


def test_head_runs_at_labelled_positions_only():
    model = tiny_model("llama")
    batch = tiny_batch(model.config)
    seen = []
    model.language_model.lm_head.register_forward_hook(
        lambda module, arguments, output: seen.append(output.shape)
    )
    model.loss(batch)
    assert seen == [(batch.num_response_tokens, VOCAB)]


def test_unsupported_language_models_are_refused():
    bart = {"model_type": "bart", "d_model": 8, "vocab_size": 10}
    with pytest.raises(ValueError, match="'bart'"):
        build_language_model(bart)
    with pytest.raises(ValueError, match="no model_type"):
        build_language_model({"hidden_size": 8})
    model = build_language_model({**LANGUAGES["llama"], "vocab_size": 10})
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="softcapping"):
        language_of(model)
