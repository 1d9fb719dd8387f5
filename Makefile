# Each target sets itself up in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OLDEST := .venv-oldest/bin

.PHONY: demo test test-oldest features lint docs wheel clean

demo: .venv/demo
	$(BIN)/lora-one finetune

test: .venv/dev
	LORA_ONE_BACKENDS=numpy,torch,jax,mlx OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# The lowest versions that pyproject.toml admits: the main job, conformance, and what touches a framework.
OLDEST_TESTS ?= tests/conformance tests/backends tests/integrations/test_transformers.py
test-oldest: .venv-oldest/dev
	$(OLDEST)/lora-one finetune --steps 20 --out .venv-oldest/adapter
	LORA_ONE_BACKENDS=numpy,torch,jax,mlx OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -q -n 2 $(OLDEST_TESTS)

# docs/features.md, the table of what works where, from the tests that show it.
features: .venv/dev
	LORA_ONE_BACKENDS=numpy,torch,jax,mlx OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m feature --write-features

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. A broken link or reference fails. The variable silences a notice about a later mkdocs.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

# dist/, from a source archive, and a smoke test of the wheel in an empty environment and an empty folder.
wheel: .venv/dev
	rm -rf dist build/empty && mkdir -p build/empty/folder
	$(BIN)/python -m build --no-isolation . >build/build.log || (cat build/build.log; exit 1)
	$(PYTHON) -m venv build/empty/venv
	build/empty/venv/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[cli]"
	cd build/empty/folder && ../venv/bin/python -I ../../../.ci/smoke.py

# torch first and by its version, so that nothing else can ask for another build of it.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[torch,cli]'
	touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e '.[dev]'
	touch $@

.venv/docs: .venv/demo
	$(INSTALL) mkdocs-material 'mkdocstrings[python]'
	touch $@

.venv-oldest/dev: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-oldest dist build .pytest_cache .mypy_cache .ruff_cache
