# Every target works first on a fresh machine: it installs what it needs into .venv before it runs.
PYTHON ?= python3
VENV ?= .venv
IMAGE ?= samples/airplane.png

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two files of tests at a time, each on one core: more threads than cores would wait for each other.
PYTEST := pytest --numprocesses 2 --dist loadfile
# Stamps: installed again only when the lists of packages change.
RUNTIME := $(VENV)/.installed-runtime
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
OLDEST := $(VENV)-oldest/.installed

.PHONY: help install test test-oldest browser lint caption demo tiny tiny-hour ablations bench

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(DEV)  ## Create .venv with everything for use, training, tests

test test-oldest: export OMP_NUM_THREADS = 1
test test-oldest: export HF_HUB_OFFLINE = 1

test: lint browser  ## Lint, type check and run all tests
	$(BIN)/python -m $(PYTEST)

# The ablations run the stages once more, which other tests have on this version as well.
test-oldest: browser $(OLDEST)  ## Run all tests but those of Space and ablations on the oldest transformers that pyproject.toml allows
	$(VENV)-oldest/bin/python -m $(PYTEST) --ignore tests/space --ignore tests/training/test_ablations.py

browser:  # the Space is tested in Debian's Chromium; elsewhere, or without root, install one yourself
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing Chromium ..." && \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; } || \
	  echo "No Chromium: the tests that visit the Space are skipped, or fail where CI is set."

lint: $(DEV)  ## Lint and type check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

caption: $(RUNTIME)  ## Caption an image: make caption IMAGE=photo.png
	@$(BIN)/libra caption "$(IMAGE)"

tiny: $(DEV)  ## Train libra-tiny from nothing; stages that are done are kept
	$(BIN)/python -m training.tiny

tiny-hour: $(DEV)  ## Train what an hour is enough for, from nothing
	$(BIN)/python -m training.tiny --hour

ablations: $(DEV)  ## Train the ablations of the paper's Table 3 at tiny size; runs that are done are kept
	$(BIN)/python -m training.ablations --report training/ABLATIONS.md

demo: $(DEMO)  ## Open libra-tiny in the browser: make demo MODEL=DIR for another
	@$(BIN)/libra demo $(if $(MODEL),--model "$(MODEL)")

bench: $(RUNTIME)  ## Measure time and memory beside the bare language model
	@$(BIN)/libra bench

$(RUNTIME): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; a few minutes) ..."
	@$(INSTALL) -e .
	@touch $@

$(DEMO): $(RUNTIME)
	@echo "Installing the demo into $(VENV) ..."
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the tools for training and tests into $(VENV) ..."
	@$(INSTALL) -e '.[dev]'
	@$(INSTALL) --no-deps lmms-eval==0.7.3  # its other dependencies are heavy, and not needed for what the tests use
	@touch $@

# Nothing but transformers differs: the rest is read from $(VENV), after what this environment has itself.
$(OLDEST): $(DEV)
	@$(PYTHON) -m venv --clear $(VENV)-oldest
	@echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> "$$($(VENV)-oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/rest.pth"
	@$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		"transformers==$$(sed -nE 's/.*"transformers>=([0-9.]+).*/\1/p' pyproject.toml)"
	@touch $@
