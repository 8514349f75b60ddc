"""Send a model directory to the Hugging Face Hub: one commit, or none."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from instructblip.core.version import __version__

HTTPError: Any = HfHubHTTPError.__bases__[0]
"""Also of what is no answer of the Hub: a connection that is refused, ends, or takes too long."""
TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Hub:
    """A repository ``name`` to which the token of ``api`` may write; it need not exist yet."""

    api: HfApi
    name: str

    @classmethod
    def connect(cls, name: str, token_file: Path | None = None) -> "Hub":
        """Raises ValueError unless there is a network, a valid ``name`` and a token that may write
        to it. The token stays in memory."""
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise ValueError(f"{name}: expected OWNER/NAME, such as alice/parrots")
        if is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set, and push needs the Hub: unset it")
        token = token_file.read_text(encoding="utf-8-sig").strip() if token_file else get_token()
        if not token or not token.isascii() or len(token.split()) != 1:
            where = f"{token_file} holds no token" if token_file else "no token of the Hub is here"
            raise ValueError(
                f"{where}: create one with the role write at {TOKENS}, then "
                "`hf auth login`, HF_TOKEN or --token-file"
            )
        api = HfApi(token=token, library_name="instructblip", library_version=__version__)
        hub = cls(api, name)
        hub._check_token()
        hub._check_type()
        return hub

    def where(self, revision: str | None = None) -> str:
        branch = f", branch {revision}" if revision else ""
        return f"{self.api.endpoint}/{self.name}{branch}"

    def check(self, folder: Path) -> list[Path]:
        """The files to send. Raises ValueError if one of them names the user's home directory."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        home = str(Path.home())
        for file in files:
            if file.suffix == ".safetensors":
                continue
            if home != "/" and home in file.read_text(encoding="utf-8", errors="replace"):
                name = file.relative_to(folder)
                raise ValueError(f"{name} names {home}, which is private: remove it there")
        return files

    def send(self, folder: Path, private: bool, revision: str | None = None) -> str:
        """Commit all files of ``folder`` at once and return the address of the commit. An error
        leaves no commit; the repository may then exist without the files."""
        operations = [
            CommitOperationAdd(file.relative_to(folder).as_posix(), file)
            for file in self.check(folder)
        ]
        with self._errors("nothing was committed; run the same command again"):
            self.api.create_repo(self.name, private=private or None, exist_ok=True)
            if revision is not None:
                self.api.create_branch(self.name, branch=revision, exist_ok=True)
            commit = self.api.create_commit(
                self.name,
                operations,
                commit_message=f"Upload a model of instructblip {__version__}",
                revision=revision,
            )
        return commit.commit_url

    def _check_token(self) -> None:
        with self._errors():
            try:
                user = self.api.whoami()
            except HfHubHTTPError as error:
                if error.response.status_code not in (401, 403):
                    raise
                raise ValueError(
                    f"the Hub refused the token: create one with the role write at {TOKENS}"
                ) from None
        owners = [user["name"], *(each["name"] for each in user.get("orgs", ()))]
        owner = self.name.partition("/")[0]
        if owner.lower() not in map(str.lower, owners):
            raise ValueError(
                f"{self.name}: the token is that of {user['name']}, who may write to "
                f"{', '.join(owners)}; give one of these as OWNER"
            )
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise ValueError(f"the token may only read: create one with the role write at {TOKENS}")

    def _check_type(self) -> None:
        with self._errors():
            for kind in ("model", "dataset", "space"):
                try:
                    self.api.repo_info(self.name, repo_type=kind)
                except RepositoryNotFoundError:
                    continue
                if kind == "model":
                    return
                raise ValueError(
                    f"{self.name} exists as a {kind}, which takes no model: choose another NAME"
                )

    @contextmanager
    def _errors(self, outcome: str = "nothing was sent") -> Iterator[None]:
        """Errors of the Hub and the network as one line."""
        try:
            yield
        except (HTTPError, OSError, RuntimeError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{self.api.endpoint}: {first}; {outcome}") from error
