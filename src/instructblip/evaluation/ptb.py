"""Captions to the tokens that CIDEr, BLEU and ROUGE-L compare, with Java or without.

The scores of the COCO caption server are defined on the tokens of Stanford's PTBTokenizer 3.4.1,
lower-cased, without punctuation. ``python`` is our own reading of its rules: the same tokens for
more than 99 of 100 ordinary captions, not for every odd string (emoji, rare abbreviations,
fractions such as ½). ``ptb_java`` runs the original out of the package pycocoevalcap. A score
always names the tokenizer it was computed with.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Tokenizer = Literal["ptb_java", "python"]

# The list of pycocoevalcap. Tokens are lower-cased by then, so that its "-LRB-" removes nothing:
# a bracket stays in the caption as the word "-lrb-".
PUNCTUATION = frozenset(
    {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"}
    | {".", "?", "!", ",", ":", "-", "--", "...", ";"}
)

_REWRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "’": "'",
    "‘": "`",
    "“": "``",
    "”": "''",
    "…": "...",
    "–": "--",
    "—": "--",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
}

_ABBREVIATIONS = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "mr mrs ms dr prof sr jr rev gen col lt sgt capt gov sen rep pres st ste ave blvd rd ft mt "
    "co corp inc ltd bros bldg univ vs etc al ph.d"
)

_SPLIT_WORDS = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "wanna": ["wan", "na"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
    "'tis": ["'t", "is"],
    "'twas": ["'t", "was"],
}

_TOKEN = re.compile(
    r"""
      https?://[^\s<>"]+ | www\.[\w.-]+\w(?:/[^\s<>"]*)?      # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | @[a-z]\w* | \#[a-z]\w*
    | </?[a-z][^<>]*>                                          # a tag such as <unk> is one word
    | \.(?:[ ]?\.)+                                            # ... and . . .
    | (?:ABBREVIATIONS)\.(?![^\W_]|\.) | no\.(?=[ ]\d) | (?-i:[A-Z])\.(?=[ ]|$)
    | [a-z](?:\.[a-z])+\.?(?![^\W_])                           # u.s. p.m.
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                 # B&W, but b & w
    | (?<!\w)[-+]?\d+(?:[:/.,-]\d+)+(?:st|nd|rd|th|s)?(?:-[^\W_]+)*(?![^\W_])
    | \d+(?::\d\d) | (?<!\w)[-+]\d+(?![^\W_])
    | '\d\ds(?![^\W_]) | '(?:em|n'|tis|twas|cause)(?![^\W_]) | o'clock | ma'am
    | (?:[cdjlo]|qu)'(?!(?:s|re|ve|ll|d|m)(?![^\W_]))[^\W\d_]\w* | y'(?=all)
    | n't(?![^\W_]) | [^\W_]+?(?=n't(?![^\W_]))               # is n't
    | [^\W\d_][^\W_]*(?:[.!?][^\W\d_][^\W_]*)+                # the blank was forgotten.Here
    | [^\W_]+(?:[-_/][^\W_]+)*
    | '(?:s|re|ve|ll|d|m)(?![^\W_])
    | [!?]{2,} | --+ | ''|``
    | \S
    """.replace("ABBREVIATIONS", "|".join(_ABBREVIATIONS.split())),
    re.VERBOSE | re.IGNORECASE,
)


def clean(caption: str) -> str:
    """White space of every kind to single blanks.

    A line break (also CR, VT, FF, U+2028) inside a caption would shift all later captions by a
    line on their way through the Java process, without an error.
    """
    return " ".join(caption.split())


def tokenize(captions: Sequence[str], tokenizer: Tokenizer = "python") -> list[list[str]]:
    """Tokens of each caption: lower case, no punctuation."""
    if tokenizer == "python":
        tokens = [_python_tokens(clean(caption)) for caption in captions]
    elif tokenizer == "ptb_java":
        tokens = _java_tokens([clean(caption) for caption in captions])
    else:
        raise ValueError(f"tokenizer must be 'ptb_java' or 'python'; got {tokenizer!r}")
    return [[token for token in row if token not in PUNCTUATION] for row in tokens]


def _python_tokens(caption: str) -> list[str]:
    tokens: list[str] = []
    opened = False
    for token in _TOKEN.findall(caption.replace("’", "'")):
        token = token.lower()
        if token == '"':
            token = "''" if opened else "``"
            opened = not opened
        if token[0] == "." and len(token) > 1:
            token = "..."
        elif token.startswith("--"):
            token = "--"
        if token in _SPLIT_WORDS:
            tokens += _SPLIT_WORDS[token]
        else:
            tokens.append(_REWRITTEN.get(token, token))
    return tokens


def java_package(what: str = "tokenizer 'ptb_java'") -> Path:
    """The folder of pycocoevalcap; FileNotFoundError says what ``what`` lacks."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{what} needs the package pycocoevalcap: pip install 'instructblip[caption-metrics]'; "
            "tokenizer='python' and the other metrics do without"
        )
    if shutil.which("java") is None:
        raise FileNotFoundError(
            f"{what} needs the program java, version 8 or later; tokenizer='python' and the other "
            "metrics do without"
        )
    return Path(spec.submodule_search_locations[0])


def _java_tokens(captions: Sequence[str]) -> list[list[str]]:
    jar = java_package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    # Not through pycocoevalcap's own wrapper: that writes into its package's folder.
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
