"""Run the steps of the Dockerfile without Docker, in the root of a fresh Debian, and its server.

    debootstrap --variant=minbase bookworm /tmp/root
    python runs/container.py /tmp/root

needs root rights and Linux, and changes the folder. It prints the seconds of each step and what it
adds to the folder (but to apt's cache, which Debian's image for containers keeps empty), starts the
default command as the Dockerfile's user, waits until the health check passes, asks a question, and
ends the server with SIGTERM. What Docker adds is not run: the base image, layers, isolation of
processes and of the network, volumes, and `--gpus`.

`--arg NAME=VALUE` is a build argument. In the steps that build, `--bind DIR` shows a folder of this
machine, read-only and at the same place, and `--env NAME=VALUE` sets a variable: for packages from
a local folder.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from PIL import Image

REPOSITORY = Path(__file__).parents[1]
ADDRESS = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction: ``RUN``, its options such as ``--mount=...``, and the rest."""

    name: str
    options: list[str]
    text: str

    @property
    def words(self) -> list[str]:
        """The rest as a list in JSON, or else as words."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def read_steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    steps = []
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        name, *words = line.split(" ")
        count = next(i for i, word in enumerate(words) if not word.startswith("--"))
        steps.append(Step(name, words[:count], " ".join(words[count:]).strip()))
    return steps


def write_context(folder: Path) -> None:
    """Copy what .dockerignore lets through, which names it one by one."""
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, target = REPOSITORY / line[1:], folder / line[1:]
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)


@dataclass
class Container:
    """A root folder, and what the instructions before have set."""

    root: Path
    context: Path
    arguments: dict[str, str]
    binds: list[Path]
    build: dict[str, str]
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin"})
    user: str = "0:0"
    folder: str = "/"
    kept: dict[str, Step] = field(default_factory=dict)

    def take(self, step: Step) -> None:
        """Follow one instruction."""
        match step.name:
            case "ARG":
                name, _, default = step.text.partition("=")
                self.arguments.setdefault(name, default)
            case "ENV":
                for word in step.words:
                    name, _, value = word.partition("=")
                    self.variables[name] = Template(value).safe_substitute(self.variables)
            case "WORKDIR":
                self.folder = step.text
                self.place(step.text).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = step.text
            case "COPY":
                *sources, target = step.words
                for source in sources:
                    shutil.copy2(self.context / source, self.place(self.folder) / target)
            case "RUN":
                self.run(step)
            case "FROM" | "VOLUME" | "EXPOSE" | "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
                self.kept[step.name] = step
            case _:
                raise ValueError(f"{step.name}: this script does not know the instruction")

    def place(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def run(self, step: Step) -> None:
        targets = [re.fullmatch(r"--mount=type=bind,target=(.*)", text) for text in step.options]
        with contextlib.ExitStack() as mounts:
            for target in targets:
                assert target, f"{step.options}: only a bind of the whole context is known"
                mounts.enter_context(mounted(self.context, self.place(target[1])))
            for each in self.binds:
                mounts.enter_context(mounted(each, self.place(str(each))))
            more = self.arguments | self.build
            subprocess.run(self.command(["/bin/sh", "-c", step.text], more), check=True)

    def command(self, words: list[str], more: dict[str, str] | None = None) -> list[str]:
        """Words that run in the root, as the user, with nothing of this machine's environment."""
        home = "/root" if self.user == "0:0" else "/home/instructblip"
        variables = {"HOME": home, **self.variables, **(more or {})}
        inside = ["/bin/sh", "-c", f'cd {self.folder} && exec "$@"', "sh", *words]
        pairs = [f"{name}={value}" for name, value in variables.items()]
        return ["chroot", f"--userspec={self.user}", str(self.root), "env", "-i", *pairs, *inside]

    def megabytes(self) -> float:
        command = ["du", "-sxB1", "--exclude=var/cache/apt", self.root]
        return int(subprocess.run(command, capture_output=True, check=True).stdout.split()[0]) / 1e6


@contextlib.contextmanager
def mounted(source: Path, target: Path, read_only: bool = True) -> Iterator[None]:
    """A folder at a second place. Read-only, so that a step changes nothing of this machine."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def try_server(container: Container) -> None:
    """Start the default command, wait for the health check, ask, and end it."""
    words = container.kept["ENTRYPOINT"].words + container.kept["CMD"].words
    health = json.loads(container.kept["HEALTHCHECK"].text.partition("CMD ")[2])
    began = time.monotonic()
    with subprocess.Popen(container.command(words)) as server:
        try:
            while subprocess.run(container.command(health), stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() - began < 120, "the server does not start"
                time.sleep(0.5)
            print(f"healthy after {time.monotonic() - began:.1f} s", flush=True)
            print(f"answer: {ask()}", flush=True)
            status = Path(f"/proc/{server.pid}/status").read_text()
            print(f"user {re.findall(r'Uid:.(.*)', status)[0].split()[0]}", flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
    print(f"the server ended with code {server.returncode}; SIGTERM is {-signal.SIGTERM} or 0")


def ask() -> str:
    """The answer of the server about a red image."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "text", "text": "A short image description."},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    body = {"model": "instructblip", "messages": [{"role": "user", "content": content}]}
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(
        f"{ADDRESS}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(sent, timeout=60) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def pairs(texts: list[str]) -> dict[str, str]:
    return dict(text.split("=", 1) for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    for name in ("arg", "bind", "env"):
        parser.add_argument(f"--{name}", action="append", default=[])
    given = parser.parse_args()
    steps = read_steps((REPOSITORY / "Dockerfile").read_text())
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as mounts:
        write_context(Path(folder))
        root = given.root.resolve()
        shutil.copy2("/etc/resolv.conf", root / "etc/resolv.conf")
        mounts.enter_context(mounted(Path("/proc"), root / "proc", read_only=False))
        binds = [Path(each) for each in given.bind]
        container = Container(root, Path(folder), pairs(given.arg), binds, pairs(given.env))
        before = first = container.megabytes()
        for step in steps:
            began = time.monotonic()
            container.take(step)
            if step.name in ("RUN", "COPY"):
                now, seconds = container.megabytes(), time.monotonic() - began
                print(f"{now - before:8.1f} MB {seconds:6.1f} s  {step.text[:60]}", flush=True)
                before = now
        print(f"{before:8.1f} MB in all, of which {first:.1f} MB were there before", flush=True)
        try_server(container)


if __name__ == "__main__":
    os.umask(0o022)
    main()
