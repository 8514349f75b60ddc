"""How the official scorers normalise an answer before they compare it.

Each has its source. None is "the better one": a published score belongs to one of them, and they
disagree on a few answers in a hundred.

==================  =====================================================================
``vqa``             GT-Vision-Lab/VQA, ``vqaEval.py`` (punctuation, then digits and articles)
``vqa_punctuation``  its first half, all that the 2017 version applies to the references
``textvqa``         facebookresearch/mmf, ``m4c_evaluators.py`` (TextVQA, ST-VQA)
``lmms_eval``       EvolvingLMMs-Lab/lmms-eval, ``exact_match`` ignoring case and punctuation
``lemmatize``       salesforce/LAVIS, ``_lemmatize`` of its models, for predictions on OK-VQA
==================  =====================================================================
"""

import re
import string
from functools import cache
from typing import Any

ARTICLES = frozenset(("a", "an", "the"))

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# vqaEval.py, ``contractions``: maps a contraction that lost an apostrophe to the one that has it.
# Most rows follow from the contraction: the key omits its apostrophe, or either one of two.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""

_IRREGULAR = {"'ow'sat": "'ow's'at", "'ows'at": "'ow's'at", "ow's'at": "'ow's'at"}
_IRREGULAR |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def _contraction_table() -> dict[str, str]:
    table = dict(_IRREGULAR)
    for word in _CONTRACTIONS.split():
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table


CONTRACTIONS = _contraction_table()
"""The table of all three scorers. Keys with a capital ("Im") never match a word in lower case."""

# Two slips of vqaEval.py that its scores depend on. ``periodStrip`` looks ahead where a look-behind
# was meant: it removes every full stop unless an ASCII digit follows (Python 2's ``\d``). And
# ``processPunctuation`` passes re.UNICODE, which is 32, as the count of ``sub``: the 33rd full stop
# of an answer stays.
_FULL_STOP = re.compile(r"\.(?![0-9])")
_MAX_FULL_STOPS = 32
_GROUPED_DIGITS = re.compile(r"[0-9],[0-9]")

_FULL_STOP_ANY_DIGIT = re.compile(r"\.(?!\d)")


def clean_space(answer: str) -> str:
    """Replace line feeds and tabs by spaces, then strip: the first step of the VQA scorers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_punctuation(answer: str) -> str:
    """``processPunctuation``: remove a mark next to a space, replace any other by a space.

    If the answer contains a number such as 1,000, all marks are removed without a space.
    """
    return _punctuation(answer, _FULL_STOP)


def vqa_digits_and_articles(answer: str) -> str:
    """``processDigitArticle``: lower case, number words to digits, no articles, contractions."""
    words = (NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(answer: str) -> str:
    """The whole VQA normalisation, which the 2017 version applies to a prediction."""
    return vqa_digits_and_articles(vqa_punctuation(clean_space(answer)))


def textvqa(answer: str) -> str:
    """MMF's ``EvalAIAnswerProcessor``: removes commas and question marks first, splits ``'s`` off.

    Differs from ``vqa`` on about one answer in twenty: "men's" becomes "men 's". MMF runs under
    Python 3, where digits of other scripts count as digits.
    """
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_digits_and_articles(_punctuation(clean_space(answer), _FULL_STOP_ANY_DIGIT))


def lmms_eval(answer: str) -> str:
    """Lower case, no ASCII punctuation; white space and articles stay."""
    return answer.lower().translate(str.maketrans("", "", string.punctuation))


def lemmatize(answer: str) -> str:
    """Nouns and verbs as their lemmas, by spaCy's ``en_core_web_sm``: "2 men are running" becomes
    "2 man are run". Raises ValueError without spaCy or this model."""
    tokens = lemmatizer()(answer)
    return " ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in tokens)


@cache
def lemmatizer() -> Any:
    """spaCy's pipeline for ``lemmatize``."""
    try:
        import spacy  # type: ignore[import-not-found]

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the metric 'okvqa_accuracy lavis' lemmatizes predictions with spaCy ({error}); pip "
            "install 'instructblip[lemmas]' and python -m spacy download en_core_web_sm, or use "
            "'okvqa_accuracy official_2017'"
        ) from None


def _punctuation(answer: str, full_stop: re.Pattern[str]) -> str:
    grouped = _GROUPED_DIGITS.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        next_to_space = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if next_to_space or grouped else " ")
    return full_stop.sub("", text, count=_MAX_FULL_STOPS)
