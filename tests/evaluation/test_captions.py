"""CIDEr, BLEU, ROUGE-L and the tokenizer against stored scores of pycocoevalcap."""

import inspect

import numpy as np
import pytest

from instructblip.evaluation import captions
from instructblip.evaluation.bootstrap import interval, resample
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.scoring import SCORERS
from tests.evaluation.caption_cases import CANDIDATES, REFERENCES

CIDER = [3.1587930634409784, 2.856927902374791, 2.3433023919727245, 3.5221002257271055]
CIDER += [1.1149207980885398, 0.0]
ROUGE = [0.8146911519198664, 0.8951781970649895, 0.4535315985130111, 0.8026315789473684]
ROUGE += [0.3609467455621302, 0.0]
METEOR = [0.506755908421319, 0.47471873204081366, 0.44897952488509796, 0.54292176591504]
METEOR += [0.2162162162162162, 0.0]
BLEU = [0.7555113186545112, 0.6020058284868085, 0.46632947623338644, 0.35769958084689857]
BLEU_4 = [0.47287080440811846, 0.4999999998762404, 4.8109772899216365e-05, 0.40261909701454335]
BLEU_4 += [6.541924350393833e-08, 0.0]


@pytest.fixture(params=["python", "ptb_java"])
def tokenizer(request: pytest.FixtureRequest) -> CaptionTokenizer:
    if request.param == "ptb_java":
        try:
            captions.java_package()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    return request.param


def test_scores_are_those_of_pycocoevalcap(tokenizer: CaptionTokenizer) -> None:
    cider = captions.cider(CANDIDATES, REFERENCES, tokenizer)
    assert cider.value == pytest.approx(sum(CIDER) / 6, abs=1e-12)
    assert cider.per_image == pytest.approx(CIDER, abs=1e-12)
    rouge = captions.rouge_l(CANDIDATES, REFERENCES, tokenizer)
    assert rouge.per_image == pytest.approx(ROUGE, abs=1e-15)
    for n, expected in enumerate(BLEU, start=1):
        assert captions.bleu(CANDIDATES, REFERENCES, tokenizer, n).value == pytest.approx(
            expected, abs=1e-12
        )
    assert captions.bleu(CANDIDATES, REFERENCES, tokenizer).per_image == pytest.approx(
        BLEU_4, abs=1e-12
    )


def test_meteor_is_that_of_the_original_program() -> None:
    try:
        captions.java_package()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    scores = captions.meteor(CANDIDATES, REFERENCES)
    assert scores.per_image == pytest.approx(METEOR, abs=1e-12)
    assert scores.value == pytest.approx(0.4220739138299799, abs=1e-12)
    equal = captions.meteor(["a cat", "two dogs run"], [["a cat"], ["two dogs ran in a park"]])
    assert equal.value == pytest.approx(0.38540163269843797, abs=1e-12)


def test_meteor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"METEOR needs .*instructblip\[caption-metrics\]"):
        captions.meteor(["a"], [["a"]])
    monkeypatch.undo()
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="java"):
        captions.cider(["a"], [["a"]], "ptb_java")


def test_a_score_is_a_value_and_a_list() -> None:
    value, per_image = captions.cider(CANDIDATES, REFERENCES)
    assert value == pytest.approx(sum(per_image) / 6)


def test_cider_of_one_image_is_zero() -> None:
    assert captions.cider(["a red dog"], [["a red dog"]]).value == 0.0
    assert captions.rouge_l(["a red dog"], [["a red dog"]]).value == 1.0


def test_captions_without_a_token_agree_in_rouge_alone() -> None:
    assert captions.rouge_l([".", "."], [["!"], ["a dog"]]).per_image == [1.0, 0.0]
    assert captions.cider([".", "."], [["!"], ["a dog"]]).value == 0.0


def test_cider_depends_on_the_whole_set() -> None:
    few = captions.cider(CANDIDATES[:2], REFERENCES[:2]).per_image[0]
    assert abs(few - CIDER[0]) > 0.02


# What Java's PTBTokenizer gives, punctuation removed.
TOKENS = {
    "The dog's ball isn't here, can't won't.": "the dog 's ball is n't here ca n't wo n't",
    "'hello' said the boys' dad": "hello said the boys dad",
    "St. Louis, U.S. at 5 p.m. or 12:30pm": "st. louis u.s. at 5 p.m. or 12:30 pm",
    "black/white w/ 50% of $5 & B&W b&w": "black/white w / 50 % of $ 5 & b&w b & w",
    "1,000 people; 3.5 meters -- 1/2": "1,000 people 3.5 meters 1/2",
    "(left) [right]": "-lrb- left -rrb- -lsb- right -rsb-",
    "wow!! really?! no...": "wow !! really ?! no",
    "the man's-hat cannot y'all 'tis": "the man 's hat can not y' all 't is",
    "a cat.A bird, a jet-ski.A boat": "a cat.a bird a jet-ski a boat",
    "5'10\" tall, 1980's, '80s, 7 o'clock": "5 10 tall 1980 's '80s 7 o'clock",
    "<unk> a_b stop!go colour": "<unk> a_b stop!go colour",
    "A&amp;M, I&lt;3NY. R&amp;B &quot;stop&quot; dog&apos;s": "a&m i < 3ny r&b stop dog 's",
    'in the kitchen.; a jet-ski., at 5.: the "B."': "in the kitchen. a jet-ski. at 5. the b.",
    "Plan b. works, vitamin C! room B. The end": "plan b. works vitamin c room b the end",
    "lincoln av e. in KY. or ky., in Pa. no pa.": "lincoln av e. in ky. or ky. in pa. no pa",
    "No. 5 of fig. 3, no. It is .5 of rock'n'roll": "no. 5 of fig. 3 no it is .5 of rock 'n' roll",
    "d'oeuvres, ma'am! rock 'n' roll": "d'oeuvres ma'am rock 'n' roll",
}


@pytest.mark.parametrize("caption", TOKENS)
def test_python_tokens_are_those_of_java(caption: str, tokenizer: CaptionTokenizer) -> None:
    assert " ".join(captions.tokenize([caption], tokenizer)[0]) == TOKENS[caption]


def test_line_breaks_do_not_shift_captions(tokenizer: CaptionTokenizer) -> None:
    odd = ["a\rb", "c\u2028d", "e\x0bf\x0c", "", "last\n", "\n"]
    expected = [["a", "b"], ["c", "d"], ["e", "f"], [], ["last"], []]
    assert captions.tokenize(odd, tokenizer) == expected
    assert captions.tokenize(["", ""], tokenizer) == [[], []]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 candidates and 0"):
        captions.cider(["a"], [])
    with pytest.raises(ValueError, match="image 0: expected a list of references"):
        captions.bleu(["a"], [[]])
    with pytest.raises(ValueError, match="list of references"):
        captions.rouge_l(["a"], ["a"])
    with pytest.raises(ValueError, match="from 1 to 4"):
        captions.bleu(["a"], [["a"]], n=5)
    with pytest.raises(ValueError, match="tokenizer must be"):
        inspect.unwrap(captions.tokenize)(["a"], "nltk")  # without the checker of annotations


def test_chinese_characters_are_words():
    assert captions.tokenize(["一只红猫，在 T恤上。"]) == [[*"一只红猫在", "t恤上"]]
    assert 0 < captions.rouge_l(["一只猫。"], [["一只红猫"]]).value < 1


def test_resampled_corpus_scores_are_those_of_the_drawn_captions() -> None:
    """BLEU-4 of a corpus is no mean of its images: short captions without a 4-gram score 0."""
    rng = np.random.default_rng(0)
    words = ["a", "red", "dog", "runs", "in", "the", "park", "near", "two", "big", "cats"]
    expected = [" ".join(rng.choice(words, rng.integers(3, 12))) for _ in range(80)]
    given = [" ".join(text.split()[: rng.integers(2, 9)]) for text in expected]
    rows = [
        {"prediction": text, "answers": [answer], "extra": {}}
        for text, answer in zip(given, expected, strict=True)
    ]
    score = SCORERS["bleu_4"].score(rows)
    assert score.value == 100 * captions.bleu(given, [[text] for text in expected]).value
    low, high = interval(resample(score.statistic, 80))
    assert score.value is not None
    assert low < score.value < high
    assert score.others.keys() == {"cider", "rouge_l"}
    mean = np.mean(captions.bleu(given, [[text] for text in expected]).per_image)
    assert not low < 100 * mean < high
    values = resample(score.statistic, 80, seed=1, resamples=3)
    draws = np.random.default_rng([1, 80]).integers(0, 80, (3, 80))
    for value, draw in zip(values, draws, strict=True):
        drawn = captions.bleu([given[i] for i in draw], [[expected[i]] for i in draw])
        assert value == pytest.approx(100 * drawn.value)


def test_meteor_of_counts() -> None:
    """What the program prints for two captions, of which the first is equal to its reference, so
    that its chunk counts nowhere; and the program's scores of these."""
    equal = "2 2 1 1 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 2 2"
    other = "3 6 1 3 1 1 1 1 0 0 0 0 1 1 0 0 0 0 0 0 1 3 3"
    counts = np.array([text.split() for text in (equal, other)], dtype=np.float64)
    assert captions.meteor_of(counts) == pytest.approx([1, 0.29488643580806345], abs=1e-15)
    whole = captions.meteor_of(counts.sum(axis=0))
    assert whole == pytest.approx(0.38540163269843797, abs=1e-15)
    assert captions.meteor_of(np.zeros(23)) == 0
