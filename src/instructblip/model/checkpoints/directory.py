"""The directory that a model's name stands for (a path, a run, the starter, small, the Hub), and
whether a directory may be written."""

import functools
import importlib.resources
import re
import sys
from pathlib import Path

from instructblip.core import distributed
from instructblip.core.files import current, read_json
from instructblip.model.checkpoints.small import small_directory
from instructblip.model.checkpoints.weights import SMALL, small_start
from instructblip.model.config import InstructBlipConfig

HUB = "hf://"
_COMMIT = re.compile("[0-9a-f]{40}")
SHIPPED = {"starter": "runs/starter.sh", "dense": "runs/dense.sh"}
"""Models in the package, and the scripts that make them."""
NAMES = (*SHIPPED, SMALL)
"""Models that need no path."""


def local_path(path: str | Path) -> Path:
    """``path``, and for ``hf://OWNER/NAME[@REVISION]`` the directory of what is fetched from the
    Hub; no other name uses the network."""
    if str(path).startswith(HUB):
        return _from_hub(str(path).removeprefix(HUB))
    return Path(path)


def model_directory(path: str | Path) -> Path:
    """The directory with config.json that ``path`` stands for.

    "starter" and "dense" are models in the package; "small" is assembled from installed packages
    when it is first used, by whichever name (a run from it needs it too); a run directory stands
    for its ``best``, else ``last``; ``hf://OWNER/NAME[@REVISION]`` is fetched from the Hub; no
    other name uses the network.
    """
    path = local_path(path)
    if str(path) == SMALL:
        return small_directory()
    if str(path) in SHIPPED:
        shipped = Path(str(importlib.resources.files("instructblip"))) / str(path)
        if not (shipped / "config.json").is_file():
            raise FileNotFoundError(
                f"the model {path} is not in this installation ({shipped}); rebuild it with "
                f"{SHIPPED[str(path)]}, or give the path of a BLIP-2 directory"
            )
        return shipped
    directory = current(path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{path} is not a directory; give a model directory, a run directory, 'starter', "
            f"'dense', 'small', or {HUB}OWNER/NAME for a model of the Hub"
        )
    for candidate in (directory, current(directory / "best"), current(directory / "last")):
        if (candidate / "config.json").is_file():
            if (version := small_start(candidate)) is not None:
                small_directory(version)
            return candidate
    raise FileNotFoundError(
        f"{path} holds no model: neither config.json nor best/config.json nor last/config.json"
    )


def name_of(directory: Path) -> str:
    """What a directory of ``model_directory`` is called on the command line."""
    shipped = Path(str(importlib.resources.files("instructblip")))
    return directory.name if directory in map(shipped.joinpath, SHIPPED) else str(directory)


def read_config(path: str | Path) -> InstructBlipConfig:
    """The configuration of a model, read without its weights."""
    return InstructBlipConfig.from_transformers(read_json(model_directory(path) / "config.json"))


def with_revision(name: str) -> str:
    """``hf://OWNER/NAME@COMMIT`` for a model of the Hub, whatever branch or tag ``name`` has; any
    other name as it is."""
    if not name.startswith(HUB):
        return name
    commit = _from_hub(name.removeprefix(HUB)).name  # the cache has a folder for each commit
    return f"{name.partition('@')[0]}@{commit}" if _COMMIT.fullmatch(commit) else name


def check_output(out: Path, file: bool = False) -> None:
    """Raise ValueError unless a model can be written to ``out`` without replacing anything.

    A directory must be new or empty, a LAVIS ``file`` new.
    """
    if not file and out.suffix in (".pth", ".pt"):
        raise ValueError(
            f"{out}: this writes a directory; --format lavis of `instructblip export` writes a "
            f"{out.suffix} file"
        )
    if out.exists() and (file or not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and would be replaced: choose another name, or remove it first"
        )


def _from_hub(name: str) -> Path:
    """A snapshot of a repository in the Hub's cache: configs, tokenizers, safetensors, no code. The
    first of a process prints its commit."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise ValueError(f"{HUB}{name}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "qformer_tokenizer/*"]
    try:
        snapshot = snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{HUB}{name} could not be fetched: {reason}") from error
    _print_commit(name, Path(snapshot).name)
    return Path(snapshot)


@functools.cache
def _print_commit(name: str, commit: str) -> None:
    if _COMMIT.fullmatch(commit) and not name.endswith(f"@{commit}") and distributed.is_main():
        print(f"{HUB}{name} is commit {commit}", file=sys.stderr, flush=True)
