"""What is installed, and what is known to be wrong with it.

    python .ci/supply.py sbom build/sbom.json    CycloneDX 1.5: the packages of this environment
    python .ci/supply.py audit                   asks the advisory database OSV about them

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

DATABASE = "https://api.osv.dev/v1/querybatch"


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


def main(command: str = "", out: str = "build/sbom.json") -> int:
    if command == "audit":
        return audit(packages(), os.environ.get("OSV_URL", DATABASE))
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
