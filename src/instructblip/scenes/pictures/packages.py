"""The packages that hold the images of the picture world, and how they are installed.

Each package is installed once, by name, with the tool of its registry (``npm pack``, ``apt-get
download``), into a separate folder below ``root``, its licence included. Nothing else reads the
network.
"""

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel

from instructblip.core.files import replacing_directory

TOOLS = {"npm": ("npm",), "debian": ("apt-get", "dpkg-deb")}
"""The programs that install from each registry."""


class Package(BaseModel, frozen=True, extra="forbid"):
    """A package of a registry, and what a user should know before it is installed."""

    registry: Literal["npm", "debian"]
    name: str
    version: str
    megabytes: int
    licence: str
    holds: str


PACKAGES: dict[str, Package] = {
    key: Package(**values)
    for key, values in yaml.safe_load(
        (Path(__file__).parent / "packages.yaml").read_text(encoding="utf-8")
    ).items()
}


def missing(root: Path) -> list[str]:
    """The packages that are not below ``root`` yet."""
    return [key for key in PACKAGES if not (root / key).is_dir()]


def fetch(root: Path, show: Callable[[str], None] = print) -> None:
    """Install every missing package below ``root``; each is there whole or not at all.

    Raises ValueError, before anything is installed, where a tool is missing, and for a package that
    the tool cannot install.
    """
    due = missing(root)
    for key in due:
        for tool in TOOLS[PACKAGES[key].registry]:
            if shutil.which(tool) is None:
                raise ValueError(
                    f"{PACKAGES[key].name} is installed with {tool}, which is not on this machine; "
                    f"install {tool}, or unpack the package into {root / key} yourself"
                )
    root.mkdir(parents=True, exist_ok=True)
    for key in due:
        package = PACKAGES[key]
        show(f"{package.name}: about {package.megabytes} MB")
        with (
            tempfile.TemporaryDirectory() as download,
            replacing_directory(root / key, synced=False) as folder,
        ):
            (_from_npm if package.registry == "npm" else _from_debian)(
                package, Path(download), folder
            )


def _from_npm(package: Package, download: Path, folder: Path) -> None:
    _run(package, ["npm", "pack", "--silent", f"{package.name}@{package.version}"], download)
    with tarfile.open(_only(package, download, "*.tgz")) as archive:
        for member in archive:  # extractall(filter="data") needs Python 3.11.4
            path = folder / member.name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{package.name}: {member.name!r} leads out of the package")
            if (file := archive.extractfile(member)) is not None and member.isfile():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())


def _from_debian(package: Package, download: Path, folder: Path) -> None:
    _run(package, ["apt-get", "download", package.name], download)
    archive = _only(package, download, "*.deb")
    _run(package, ["dpkg-deb", "-x", str(archive), str(folder)], download)


def _run(package: Package, command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(
            f"`{' '.join(command)}` ended with {done.returncode} ({reason[-1]}); run it by hand to "
            f"see why {package.name} cannot be installed"
        )


def _only(package: Package, folder: Path, pattern: str) -> Path:
    if found := sorted(folder.glob(pattern)):
        return found[0]
    raise ValueError(f"{package.name}: the download holds no {pattern}; run it again")
