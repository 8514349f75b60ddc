"""CIDEr, BLEU, ROUGE-L and METEOR of captions, equal to pycocoevalcap on the same tokens.

All four take one candidate per picture and one or more references. Values are raw: CIDEr 1.2 is
published as "120", the others lie between 0 and 1.
"""

import math
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instructblip.evaluation.ptb import (
    Tokenizer,
    java_package,
    tokenize,
)

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """A value for the corpus, one per picture, and the tokenizer they were computed with.

    ``value, per_image = cider(...)`` takes the first two.
    """

    value: float
    per_image: list[float]
    tokenizer: str

    def __iter__(self) -> Iterator[Any]:
        return iter((self.value, self.per_image))


def cider(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Tokenizer = "python",
) -> CaptionScore:
    """CIDEr as coco-caption computes it, which is CIDEr-D: clipped counts and a length penalty.

    Cosine of tf-idf vectors of 1- to 4-grams, averaged over references and n, times 10. The
    document frequencies come from the references given here: the value belongs to the whole set,
    a subset has another one, and a single picture always scores 0. Quirks kept: "length" counts
    bigrams; sigma is 6.
    """
    said, expected = _tokens(candidates, references, tokenizer)
    cooked = [[_ngrams(reference) for reference in group] for group in expected]
    frequency = Counter(gram for group in cooked for gram in set().union(*group))
    log_images = math.log(len(said))
    per_image = []
    for tokens, group in zip(said, cooked, strict=True):
        candidate = _tfidf(_ngrams(tokens), frequency, log_images)
        sums = [_cider_d(candidate, _tfidf(ref, frequency, log_images)) for ref in group]
        per_image.append(10 * math.fsum(sums) / len(group))
    return CaptionScore(float(np.mean(per_image)), per_image, tokenizer)


def bleu(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Tokenizer = "python",
    n: int = 4,
) -> CaptionScore:
    """Corpus BLEU-n (n from 1 to 4) against the reference that is closest in length.

    The brevity penalty and the precisions are of the whole corpus; ``per_image`` is the same
    formula on one picture. Smoothing constants 1e-15 and 1e-9 as in coco-caption.
    """
    if not 1 <= n <= 4:
        raise ValueError(f"n of BLEU must be from 1 to 4; got {n}")
    said, expected = _tokens(candidates, references, tokenizer)
    counts = [_bleu_counts(t, group, n) for t, group in zip(said, expected, strict=True)]
    total = np.sum(counts, axis=0)
    return CaptionScore(_bleu(total, n), [_bleu(row, n) for row in counts], tokenizer)


def rouge_l(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Tokenizer = "python",
) -> CaptionScore:
    """ROUGE-L with beta 1.2: F of the longest common subsequence, best precision and best recall.

    The two maxima may come from different references. Without any token left a caption counts as
    one empty token, as in coco-caption: two empty captions agree.
    """
    said, expected = _tokens(candidates, references, tokenizer)
    per_image = [_rouge_l(t, group) for t, group in zip(said, expected, strict=True)]
    return CaptionScore(float(np.mean(per_image)), per_image, tokenizer)


def meteor(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: Tokenizer = "python",
) -> CaptionScore:
    """METEOR 1.5 by its authors' Java program, out of the extra ``caption-metrics``.

    Stems, synonyms and a table of paraphrases; the program takes seconds to start and 2 GB of
    memory. FileNotFoundError says what is missing.
    """
    folder = java_package("METEOR") / "meteor"
    said, expected = _tokens(candidates, references, tokenizer)
    command = ["java", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Xmx2G", "-jar"]
    command += ["meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    program = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    with program:  # closes the pipes and waits
        matches = [
            _converse(program, "SCORE", *map(_meteor_text, group), _meteor_text(tokens))
            for tokens, group in zip(said, expected, strict=True)
        ]
        assert program.stdout is not None
        per_image = [float(_converse(program, "EVAL", *matches))]
        per_image += [float(program.stdout.readline()) for _ in said]
    return CaptionScore(per_image.pop(), per_image, tokenizer)


def _meteor_text(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token != "|||")


def _converse(program: "subprocess.Popen[str]", *fields: str) -> str:
    """One line to the program and one back; its fields are divided by three bars."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(" ||| ".join(fields) + "\n")
    program.stdin.flush()
    answer = program.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"METEOR's program ended before it answered {fields[0]}")
    return answer


def _tokens(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of candidates and references, tokenised in one go: Java starts once."""
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"expected one candidate per picture and at least one picture; got {len(candidates)} "
            f"candidates and {len(references)} lists of references"
        )
    for place, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise ValueError(f"picture {place}: expected a list of references; got {group!r}")
    flat = [*candidates, *(reference for group in references for reference in group)]
    rows = iter(tokenize(flat, tokenizer))
    said = [next(rows) for _ in candidates]
    return said, [[next(rows) for _ in group] for group in references]


def _ngrams(tokens: Sequence[str], longest: int = 4) -> Ngrams:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True, slots=True)
class _Vectors:
    weights: dict[tuple[str, ...], float]
    norms: list[float]
    length: int


def _tfidf(grams: Ngrams, frequency: Counter[tuple[str, ...]], log_images: float) -> _Vectors:
    weights, squares, length = {}, [0.0] * 4, 0
    for gram, count in grams.items():
        weight = count * (log_images - math.log(max(1, frequency[gram])))
        weights[gram] = weight
        squares[len(gram) - 1] += weight**2
        length += count if len(gram) == 2 else 0
    return _Vectors(weights, [math.sqrt(square) for square in squares], length)


def _cider_d(candidate: _Vectors, reference: _Vectors, sigma: float = 6.0) -> float:
    products = [0.0] * 4
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram, 0.0)
        products[len(gram) - 1] += min(weight, other) * other
    penalty = math.exp(-((candidate.length - reference.length) ** 2) / (2 * sigma**2))
    cosines = (
        product / (a * b) if a and b else product
        for product, a, b in zip(products, candidate.norms, reference.norms, strict=True)
    )
    return math.fsum(cosines) * penalty / 4


def _bleu_counts(tokens: Sequence[str], references: Sequence[Sequence[str]], n: int) -> np.ndarray:
    """[candidate length, reference length, matches of 1..n-grams, number of 1..n-grams]."""
    best: Ngrams = Counter()
    for reference in references:
        best |= _ngrams(reference, n)
    _, closest = min((abs(len(ref) - len(tokens)), len(ref)) for ref in references)
    matches, guesses = [0] * n, [max(0, len(tokens) - k) for k in range(n)]
    for gram, count in _ngrams(tokens, n).items():
        matches[len(gram) - 1] += min(count, best[gram])
    return np.array([len(tokens), closest, *matches, *guesses], dtype=np.float64)


def _bleu(counts: np.ndarray, n: int) -> float:
    small, tiny = 1e-9, 1e-15
    length, reference_length = counts[0], counts[1]
    precisions = (counts[2 : 2 + n] + tiny) / (counts[2 + n :] + small)
    score = float(np.prod(precisions)) ** (1 / n)
    ratio = (length + tiny) / (reference_length + small)
    return score * math.exp(1 - 1 / ratio) if ratio < 1 else score


def _rouge_l(
    tokens: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2
) -> float:
    tokens = tokens or [""]
    precision = recall = 0.0
    for reference in references:
        reference = reference or [""]
        common = _longest_common_subsequence(tokens, reference)
        precision = max(precision, common / len(tokens))
        recall = max(recall, common / len(reference))
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = (
                row[j],
                diagonal + 1 if left == right else max(row[j], row[j - 1]),
            )
    return row[-1]
