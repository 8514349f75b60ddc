"""CIDEr, BLEU, ROUGE-L and METEOR of captions, equal to pycocoevalcap on the same tokens.

All four take one candidate per image and one or more references. Values are raw: CIDEr 1.2 is
published as "120", the others lie between 0 and 1.

The COCO caption server defines these scores on the tokens of Stanford's PTBTokenizer 3.4.1, in
lower case and without punctuation. The tokenizer "python" implements its rules: the same tokens for
more than 99 of 100 ordinary captions, not for every odd string (emoji, rare abbreviations,
fractions such as ½). "ptb_java" runs the original from the package pycocoevalcap.
"""

import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

CaptionTokenizer = Literal["ptb_java", "python"]
Ngrams = Counter[tuple[str, ...]]


class CaptionScore(NamedTuple):
    """The score of the corpus, and one per image."""

    value: float
    per_image: list[float]


def cider(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
    frequency: "DocumentFrequency | None" = None,
) -> CaptionScore:
    """CIDEr-D, which coco-caption calls CIDEr: clipped counts and a length penalty.

    Cosine of tf-idf vectors of 1- to 4-grams, averaged over references and n, times 10. The
    document frequencies come from ``references``, so a subset has another score and a single image
    always scores 0, unless ``frequency`` gives those of other references.
    """
    predicted, expected = _tokens(candidates, references, tokenizer)
    ngrams = [[_ngrams(reference) for reference in group] for group in expected]
    known = _frequency(ngrams) if frequency is None else frequency
    per_image = []
    for tokens, group in zip(predicted, ngrams, strict=True):
        candidate = _tfidf(_ngrams(tokens), *known)
        sums = [_cider_d(candidate, _tfidf(ref, *known)) for ref in group]
        per_image.append(10 * math.fsum(sums) / len(group))
    return CaptionScore(float(np.mean(per_image)), per_image)


class DocumentFrequency(NamedTuple):
    """In how many images an n-gram is in a reference, and the logarithm of their number."""

    counts: Counter[tuple[str, ...]]
    log_images: float


def document_frequency(
    references: Sequence[Sequence[str]], tokenizer: CaptionTokenizer = "python"
) -> DocumentFrequency:
    """Return the document frequencies of ``references``, for `cider` of other captions."""
    _, expected = _tokens([""] * len(references), references, tokenizer)
    return _frequency([[_ngrams(reference) for reference in group] for group in expected])


def _frequency(ngrams: Sequence[Sequence[Ngrams]]) -> DocumentFrequency:
    counts = Counter(gram for group in ngrams for gram in set().union(*group))
    return DocumentFrequency(counts, math.log(len(ngrams)))


def bleu(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
    n: int = 4,
) -> CaptionScore:
    """Corpus BLEU-n (n from 1 to 4) against the reference that is closest in length.

    Brevity penalty and precisions are those of the whole corpus; ``per_image`` applies the same
    formula to one image.
    """
    counts = bleu_counts(candidates, references, tokenizer, n)
    return CaptionScore(float(bleu_of(counts.sum(axis=0))), bleu_of(counts).tolist())


def bleu_counts(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
    n: int = 4,
) -> Float64[np.ndarray, "images m"]:
    """Return what BLEU-n sums over images, for `bleu_of`: length of the candidate and of the
    reference, matches of 1- to n-grams, number of 1- to n-grams."""
    if not 1 <= n <= 4:
        raise ValueError(f"n of BLEU must be from 1 to 4; got {n}")
    predicted, expected = _tokens(candidates, references, tokenizer)
    rows = [_bleu_counts(t, group, n) for t, group in zip(predicted, expected, strict=True)]
    return np.array(rows, dtype=np.float64)


def bleu_of(counts: Float64[np.ndarray, "*rows m"]) -> Float64[np.ndarray, "*rows"]:
    """Return BLEU-n of each row of summed `bleu_counts`."""
    n = counts.shape[-1] // 2 - 1
    small, tiny = 1e-9, 1e-15  # bleu_scorer.py smooths with these
    precisions = (counts[..., 2 : 2 + n] + tiny) / (counts[..., 2 + n :] + small)
    ratio = (counts[..., 0] + tiny) / (counts[..., 1] + small)
    penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.asarray(np.prod(precisions, axis=-1) ** (1 / n) * penalty)


def rouge_l(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
) -> CaptionScore:
    """ROUGE-L: F score (beta 1.2) of the longest common subsequence.

    Best precision and best recall may come from different references. As in coco-caption a caption
    without tokens counts as one empty token: two empty captions agree.
    """
    predicted, expected = _tokens(candidates, references, tokenizer)
    per_image = [_rouge_l(t, group) for t, group in zip(predicted, expected, strict=True)]
    return CaptionScore(float(np.mean(per_image)), per_image)


def meteor(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
) -> CaptionScore:
    """METEOR 1.5 with the matches that its authors' Java program finds, which the extra
    ``caption-metrics`` brings.

    Compares stems, synonyms and paraphrases; needs 2 GB of memory and seconds to start. Raises
    FileNotFoundError if the package or Java is missing.
    """
    counts = meteor_counts(candidates, references, tokenizer)
    return CaptionScore(float(meteor_of(counts.sum(axis=0))), meteor_of(counts).tolist())


def meteor_counts(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: CaptionTokenizer = "python",
) -> Float64[np.ndarray, "images 23"]:
    """Return what METEOR sums over images, for `meteor_of`, of the reference that fits best.

    A row is what the program prints: the lengths of candidate and reference; the function words
    among them; for exact, stem, synonym and paraphrase matches the content words matched in both,
    then the function words; the chunks; and all words matched in both. Captions that are equal have
    no chunk, as in the program's own sum.
    """
    folder = java_package("METEOR") / "meteor"
    predicted, expected = _tokens(candidates, references, tokenizer)
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
            for tokens, group in zip(predicted, expected, strict=True)
        ]
    counts = np.array([line.split() for line in matches], dtype=np.float64)
    equal = (counts[:, 20] == 1) & (counts[:, 21:23] == counts[:, 0:2]).all(axis=1)
    counts[equal, 20] = 0
    return counts


def meteor_of(counts: Float64[np.ndarray, "*rows 23"]) -> Float64[np.ndarray, "*rows"]:
    """Return METEOR of each row of summed `meteor_counts`, with the program's weights for English
    (Denkowski and Lavie, "Meteor Universal", 2014, section 3)."""
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    lengths, functions = counts[..., 0:2], counts[..., 2:4]
    by_kind = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)  # kind, word class, side
    content, function = np.einsum("...kcs,k->c...s", by_kind, [1.0, 0.6, 0.8, 0.6])
    total = delta * (lengths - functions) + (1 - delta) * functions
    matched = delta * content + (1 - delta) * function
    precision, recall = np.moveaxis(_share(matched, total), -1, 0)
    mean = _share(precision * recall, alpha * precision + (1 - alpha) * recall)
    fragments = _share(counts[..., 20], counts[..., 21:23].mean(axis=-1))
    return np.asarray(mean * (1 - gamma * fragments**beta))


def _share(part: np.ndarray | np.float64, whole: np.ndarray | np.float64) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _meteor_text(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token != "|||")


def _converse(program: "subprocess.Popen[str]", *fields: str) -> str:
    """Write one line to the program and return the line it answers; " ||| " separates fields."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(" ||| ".join(fields) + "\n")
    program.stdin.flush()
    answer = program.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"the program of METEOR ended before it answered {fields[0]}")
    return answer


def _tokens(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: CaptionTokenizer
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of candidates and references, in one call so that Java starts once."""
    if not candidates or len(candidates) != len(references):
        raise ValueError(
            f"expected one candidate per image and at least one image; got {len(candidates)} "
            f"candidates and {len(references)} lists of references"
        )
    for index, group in enumerate(references):
        if isinstance(group, str) or not group:
            raise ValueError(f"image {index}: expected a list of references; got {group!r}")
    flat = [*candidates, *(reference for group in references for reference in group)]
    rows = iter(tokenize(flat, tokenizer))
    predicted = [next(rows) for _ in candidates]
    return predicted, [[next(rows) for _ in group] for group in references]


def _ngrams(tokens: Sequence[str], longest: int = 4) -> Ngrams:
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)
    )


class _Vectors(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]
    length: int


def _tfidf(grams: Ngrams, frequency: Counter[tuple[str, ...]], log_images: float) -> _Vectors:
    weights, squares, length = {}, [0.0] * 4, 0
    for gram, count in grams.items():
        weight = count * (log_images - math.log(max(1, frequency[gram])))
        weights[gram] = weight
        squares[len(gram) - 1] += weight**2
        length += count if len(gram) == 2 else 0  # cider_scorer.py: bigrams are the length
    return _Vectors(weights, [math.sqrt(square) for square in squares], length)


def _cider_d(candidate: _Vectors, reference: _Vectors, sigma: float = 6.0) -> float:
    """Cosine of two captions over 1- to 4-grams, with counts clipped at the reference's."""
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


def _bleu_counts(tokens: Sequence[str], references: Sequence[Sequence[str]], n: int) -> list[int]:
    best: Ngrams = Counter()
    for reference in references:
        best |= _ngrams(reference, n)
    _, closest = min((abs(len(ref) - len(tokens)), len(ref)) for ref in references)
    matches, guesses = [0] * n, [max(0, len(tokens) - k) for k in range(n)]
    for gram, count in _ngrams(tokens, n).items():
        matches[len(gram) - 1] += min(count, best[gram])
    return [len(tokens), closest, *matches, *guesses]


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
    row = [0] * (len(b) + 1)  # lengths for the tokens of a so far and every start of b
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, start=1):
            longest = diagonal + 1 if left == right else max(row[j], row[j - 1])
            diagonal, row[j] = row[j], longest
    return row[-1]


# pycocoevalcap, ptbtokenizer.py: PUNCTUATIONS. Tokens are in lower case by then, so its "-LRB-"
# removes nothing and a bracket remains in the caption as the word "-lrb-".
PUNCTUATION = frozenset(
    {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
    | {".", "?", "!", ",", ":", "-", "--", "...", ";"}
    | {*"。，！？、；："}
)

_REWRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_REWRITTEN |= {"’": "'", "‘": "`", "“": "``", "”": "''", "…": "...", "–": "--", "—": "--"}
_REWRITTEN |= {"£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4"}
_REWRITTEN |= {"&lt;": "<", "&gt;": ">", "&mdash;": "--"}
_ENTITIES = {"&quot;": '"', "&apos;": "'", "&nbsp;": " ", "&amp;": "&", "’": "'"}

_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
_SPLIT_WORDS |= {"gimme": "gim me", "lemme": "lem me", "'tis": "'t is", "'twas": "'t was"}

# Words that keep their full stop: in any case; these in upper or title case; before a number.
_ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "ala ariz calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn "
    "tenn va vt wis wisc wyo "
    "mr mrs ms mme mlle messrs dr drs prof profs sr jr rev rt hon rep reps sen sens gov govs pres "
    "atty attys gen adm maj col lt lieut sgt capt cmdr comdr cpl pvt pfc spc brig det insp supt "
    "st ste ave blvd rd sq ft mt est tel ext bldg dept univ assoc asst "
    "co cos corp inc ltd plc bros bhd cie ens intl natl elec "
    "vs cf etc al seq esq ph ph.d alex wm jos"
)
_STATES = "az ark del ill la mass miss ore pa tex wash"
_BEFORE_NUMBERS = "no nos fig figs art prop pp op ca"
_STARTS = (  # a sentence starts with these after a letter and a full stop
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Mr. Ms. Now Once One Other Our She Since So Some Such That The Their Then There "
    "These They This We What When While Yet You"
).replace(".", r"\.")


def _any_of(words: str) -> str:
    return "|".join(words.split())


_TOKEN = re.compile(
    rf"""
      [\u3400-\u9fff]                   # Chinese has no spaces: each character is a word
    | https?://[^\s<>"]+ | www\.[\w.-]+\w(?:/[^\s<>"]*)?      # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | @[a-z]\w* | \#[a-z]\w*
    | </?[a-z][^<>]*>                                          # a tag such as <unk> is one word
    | &(?:[a-z]+|\#\d+);                                       # &lt; &eacute; &#39;
    | \.(?:[ ]?\.)+                                            # ... and . . .
    | \.\d+(?![^\W_])                                          # .5
    | (?:[^\W_]+(?:[-_][^\W_]+)*|(?-i:[A-Z]+(?:&[A-Z]+)+)|o'clock)\.(?=[,;:])  # kitchen.; there
    | (?:{_any_of(_ABBREVIATIONS)})\.(?![^\W\d_])
    | (?-i:{_any_of(_STATES.title())}|{_any_of(_STATES.upper())})\.(?![^\W_])
    | (?:{_any_of(_BEFORE_NUMBERS)})\.(?=[ ]\d)
    | [a-z]\.(?![^\W\d_])(?![ ](?-i:{_any_of(_STARTS)})(?:[ ]|$))  # Plan B. works
    | [a-z](?:\.[a-z])+\.?(?![^\W_])                           # u.s. p.m.
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                 # B&W, but b & w
    | (?<!\w)[-+]?\d+(?:[:/.,-]\d+)+(?:st|nd|rd|th|s)?(?:-[^\W_]+)*(?![^\W_])
    | \d+(?::\d\d) | (?<!\w)[-+]\d+(?![^\W_])
    | '\d\ds(?![^\W_]) | '(?:em|tis|twas|cause)(?![^\W_]) | 'n' | o'clock | ma'am
    | (?:[cdjlo]|qu)'(?!(?:s|re|ve|ll|d|m)(?![^\W_]))[^\W\d_]\w* | y'(?=all)
    | n't(?![^\W_]) | [^\W_]+?(?=n't(?![^\W_]))               # is n't
    | [^\W\d_][^\W_]*(?:[.!?][^\W\d_][^\W_]*)+                # a missing space.Here
    | [^\W_]+(?:[-_/][^\W_]+)*
    | '(?:s|re|ve|ll|d|m)(?![^\W_])
    | [!?]{{2,}} | --+ | ''|``
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(captions: Sequence[str], tokenizer: CaptionTokenizer = "python") -> list[list[str]]:
    """Return the tokens of each caption, in lower case and without punctuation."""
    # White space becomes single spaces: Java gets one caption per line, and a line break inside a
    # caption (also CR, VT, FF, U+2028) would silently shift all captions after it.
    captions = [" ".join(caption.split()) for caption in captions]
    if tokenizer == "python":
        tokens = [_python_tokens(caption) for caption in captions]
    elif tokenizer == "ptb_java":
        tokens = _java_tokens(captions)
    else:
        raise ValueError(f"tokenizer must be 'ptb_java' or 'python'; got {tokenizer!r}")
    return [[token for token in row if token not in PUNCTUATION] for row in tokens]


@lru_cache(maxsize=1 << 16)  # references are cut again for every model that is scored
def _python_tokens(caption: str) -> list[str]:
    tokens: list[str] = []
    opened = False
    for entity, character in _ENTITIES.items():
        caption = caption.replace(entity, character)
    for token in _TOKEN.findall(caption):
        token = token.lower()
        if token == '"':
            token = "''" if opened else "``"
            opened = not opened
        if token.startswith(("..", ". .")):
            token = "..."
        elif token.startswith("--"):
            token = "--"
        if token in _SPLIT_WORDS:
            tokens += _SPLIT_WORDS[token].split()
        else:
            tokens.append(_REWRITTEN.get(token, token))
    return tokens


def java_package(what: str = "tokenizer 'ptb_java'") -> Path:
    """Return the folder of pycocoevalcap. Raises FileNotFoundError if it or Java is missing."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{what} needs the package pycocoevalcap: pip install 'instructblip[caption-metrics]'; "
            "tokenizer='python' and the other metrics work without it"
        )
    if shutil.which("java") is None:
        raise FileNotFoundError(
            f"{what} needs the program java, version 8 or later; tokenizer='python' and the other "
            "metrics work without it"
        )
    return Path(spec.submodule_search_locations[0])


def _java_tokens(captions: Sequence[str]) -> list[list[str]]:
    jar = java_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    # pycocoevalcap's wrapper is not used since it writes into the folder of its package.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("\n".join(captions), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        done = subprocess.run([*command, str(file)], capture_output=True, check=False)
    lines = done.stdout.decode("utf-8").rstrip("\n").split("\n")
    if captions and not any(captions):
        return [[] for _ in captions]
    lines += [""] * (len(captions) - len(lines))  # empty captions at the end leave no line
    if done.returncode or len(lines) != len(captions):
        raise RuntimeError(
            f"the Java tokenizer gave {len(lines)} lines for {len(captions)} captions: "
            f"{done.stderr.decode('utf-8', 'replace')[-500:]}"
        )
    return [line.split() for line in lines]
