"""What is installed, what is known to be wrong with it, and the files it may come from.

    python .ci/supply.py sbom build/sbom.json    CycloneDX 1.5: the packages of this environment
    python .ci/supply.py audit                   asks the advisory database OSV about them
    python .ci/supply.py hashes hashes.txt       asks PyPI for the files of the pinned versions

`audit` exits with 0 if no advisory is known, 1 if there are some, and 2 if nobody was asked.
"""

import json
import os
import re
import sys
import urllib.request
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.utils import parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

DATABASE = "https://api.osv.dev/v1/querybatch"
INDEX = "https://pypi.org/simple"
PINS = Path(__file__).parents[1] / "constraints.txt"
PER_INDEX = ("torch", "torchvision")
"""The files of one version differ between PyPI and PyTorch's indexes for CPUs and CUDA."""
OURS = re.compile(r"py3\d*-none|cp3\d+-abi3|cp31[1-9]-cp31[1-9]t?")
"""The interpreter and the ABI of wheels for Python 3.11 and later."""
HEAD = """\
# The files of the pinned set: `make setup-hashed` installs nothing else. `make hashes` writes it.
# torch and torchvision are not in it: docs/decisions/0040-hashes-beside-the-pinned-set.md.
"""


def packages() -> dict[str, Distribution]:
    """The installed packages by their normalised name."""
    found: dict[str, Distribution] = {}
    for each in distributions():
        found.setdefault(normal(each.metadata["Name"]), each)
    return dict(sorted(found.items()))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def sbom(installed: dict[str, Distribution]) -> dict[str, Any]:
    """The bill of materials, with the packages that each one requires."""
    refs = {name: f"pkg:pypi/{name}@{each.version}" for name, each in installed.items()}
    components, edges = [], []
    for name, each in installed.items():
        licence = each.metadata.get("License-Expression") or each.metadata.get("License")
        known = {"licenses": [{"license": {"name": licence.splitlines()[0]}}]} if licence else {}
        part = {"type": "library", "name": name, "version": each.version, "purl": refs[name]}
        components.append({"bom-ref": refs[name], **part, **known})
        needed = {normal(re.split(r"[^\w.-]", text)[0]) for text in each.requires or ()}
        edges.append({"ref": refs[name], "dependsOn": sorted(refs[n] for n in needed & {*refs})})
    head = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1}
    return {**head, "components": components, "dependencies": edges}


def audit(installed: dict[str, Distribution], database: str = DATABASE) -> int:
    """Print the advisories; the exit code."""
    queries = [
        {"package": {"ecosystem": "PyPI", "name": name}, "version": each.version.partition("+")[0]}
        for name, each in installed.items()
    ]
    body = json.dumps({"queries": queries}).encode()
    request = urllib.request.Request(database, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            results = json.load(answer)["results"]
        pairs = list(zip(installed.items(), results, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"NOT AUDITED: {database} gave no answer ({error}); {len(queries)} packages unasked")
        return 2
    known = 0
    for (name, each), result in pairs:
        for advisory in (result or {}).get("vulns", ()):
            known += 1
            print(f"{name} {each.version}: https://osv.dev/vulnerability/{advisory['id']}")
    print(f"{known} advisories on {len(queries)} packages")
    return int(known > 0)


def pins(text: str) -> list[tuple[str, str]]:
    """The name and the version on each line of a constraints file."""
    return re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.M)


def files_of(name: str, version: str, page: dict[str, Any]) -> list[str]:
    """The SHA-256 of each file of this version on a page of the simple API (PEP 691).

    Wheels for a Python that the package does not support are left out.
    """
    wanted = normal(name), Version(version)
    chosen = []
    for each in page["files"]:
        try:
            if each["filename"].endswith(".whl"):
                *what, _, tags = parse_wheel_filename(each["filename"])
                usable = any(OURS.fullmatch(f"{tag.interpreter}-{tag.abi}") for tag in tags)
            else:
                what, usable = parse_sdist_filename(each["filename"]), True
        except ValueError:  # An egg or an installer.
            continue
        if tuple(what) == wanted and usable and not each.get("yanked"):
            chosen.append(each["hashes"]["sha256"])
    return sorted(chosen)


def hashes(pinned: list[tuple[str, str]], index: str = INDEX) -> str:
    """A requirements file with the hashes of every pin.

    Raises:
        OSError: The index gives no answer.
        ValueError: The index has no file of a version.
    """
    lines = [HEAD]
    for name, version in pinned:
        if normal(name) in PER_INDEX:
            continue
        accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
        request = urllib.request.Request(f"{index}/{normal(name)}/", headers=accept)
        with urllib.request.urlopen(request, timeout=30) as answer:
            files = files_of(name, version, json.load(answer))
        if not files:
            raise ValueError(f"{index} has no file of {name} {version}")
        lines.append(
            " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{h}" for h in files)])
        )
    return "\n".join(lines) + "\n"


def main(command: str = "", out: str = "build/sbom.json") -> int:
    if command == "audit":
        return audit(packages(), os.environ.get("OSV_URL", DATABASE))
    if command == "hashes":
        Path(out).write_text(hashes(pins(PINS.read_text("utf-8"))), encoding="utf-8")
        return 0
    if command != "sbom":
        print(__doc__)
        return 2
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    made = sbom(packages())
    Path(out).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{len(made['components'])} packages in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
