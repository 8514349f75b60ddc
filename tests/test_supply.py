"""The bill of materials of what is installed, and the audit with and without a database."""

import http.server
import importlib.util
import json
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
