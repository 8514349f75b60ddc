"""The bill of materials, the audit with and without a database, the hashes of the pins."""

import http.server
import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "supply.py"


@pytest.fixture(scope="module")
def supply() -> Any:
    spec = importlib.util.spec_from_file_location("supply", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_bill_names_each_package_once(supply: Any, tmp_path: Path, capsys) -> None:
    assert supply.main("sbom", str(tmp_path / "new" / "sbom.json")) == 0
    bill = json.loads((tmp_path / "new" / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    names = [part["name"] for part in bill["components"]]
    assert {"torch", "pillow", "transformers"} <= {*names}
    assert len(names) == len({*names})
    refs = {part["bom-ref"] for part in bill["components"]}
    edges = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    assert edges.keys() == refs
    assert all(refs.issuperset(needed) for needed in edges.values())
    pydantic = next(ref for ref in refs if ref.startswith("pkg:pypi/pydantic@"))
    assert any(ref.startswith("pkg:pypi/pydantic-core@") for ref in edges[pydantic])


@pytest.fixture
def database() -> Iterator[tuple[str, list[Any]]]:
    """A database with one advisory, on Pillow; and what it was asked."""
    asked: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
            asked.extend(queries)
            known = {"vulns": [{"id": "PYSEC-1"}]}
            results = [known if q["package"]["name"] == "pillow" else {} for q in queries]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"results": results}).encode())

        def log_message(self, *_args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()


def test_an_audit_lists_advisories(supply: Any, database: Any, monkeypatch, capsys) -> None:
    address, asked = database
    monkeypatch.setenv("OSV_URL", address)
    assert supply.main("audit") == 1
    out = capsys.readouterr().out
    assert "pillow " in out
    assert "https://osv.dev/vulnerability/PYSEC-1" in out
    assert f"1 advisories on {len(asked)} packages" in out
    assert all("+" not in query["version"] for query in asked)


def test_an_audit_without_a_database_says_so(supply: Any, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OSV_URL", "http://127.0.0.1:9/")
    assert supply.main("audit") == 2
    assert capsys.readouterr().out.startswith("NOT AUDITED: http://127.0.0.1:9/ gave no answer")


def test_every_pin_has_the_hashes_of_its_files(supply: Any) -> None:
    root = FILE.parents[1]
    pinned = dict(supply.pins((root / "constraints.txt").read_text("utf-8")))
    text = (root / "hashes.txt").read_text("utf-8")
    entries = re.findall(r"^(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert {name: version for name, version, _ in entries} == {
        name: version for name, version in pinned.items() if name not in supply.PER_INDEX
    }, "run `make hashes`"
    assert len(re.findall("--hash", text)) == sum(hashes.count("--hash") for *_, hashes in entries)


def test_hashes_are_those_of_files_that_can_be_installed(supply: Any) -> None:
    names = [
        "Two_Words-1.0-py3-none-any.whl",
        "two_words-1.0-cp312-cp312-macosx_11_0_arm64.whl",
        "two_words-1.0-cp38-abi3-win_amd64.whl",
        "two_words-1.0.tar.gz",
        "two_words-1.0-cp310-cp310-win_amd64.whl",
        "two_words-1.0-py2-none-any.whl",
        "two_words-1.0.1-py3-none-any.whl",
        "two_words-1.0.exe",
    ]
    page = {"files": [{"filename": name, "hashes": {"sha256": name}} for name in names]}
    assert supply.files_of("two-words", "1.0", page) == sorted(names[:4])
    page["files"][0]["yanked"] = "broken"
    assert supply.files_of("two-words", "1.0", page) == sorted(names[1:4])
