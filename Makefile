# make search   a search on real images: prepares .venv, runs experiments/cream.yml through NNI, prints what it found
# make search-darts   the same with experiments/darts.yml, and then trains what it found
# make test     every test, the slow ones too
# make test-fast   all but the slow ones
# make test-nni the tests of what is said in docs/nni.md
# make check    formatting, lint, types
# make clean    removes .venv; runs/ is yours and stays

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.10 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A process a core and one more, because tests through NNI wait most of the time.
PROCESSES := $(shell $(PYTHON) -c "import os; print(min(os.cpu_count(), 4) + 1)")
# Where a process crashes, the others would wait for each other for ever; so that ends the tests, and is told.
BESIDE_EACH_OTHER := --numprocesses $(PROCESSES) --dist loadscope --max-worker-restart 0

NNI_TESTS := tests/experiments tests/test_experiment.py $(wildcard tests/strategies/test_in_nni.py \
	tests/strategies/*/test_in_nni.py) $(addprefix tests/test_docs.py::,test_a_search_in_python test_a_search_with_a_recipe)

.PHONY: search search-darts test test-fast test-nni check clean

search: $(VENV)/installed
	@$(BIN)/python -m nni_cream.experiment experiments/cream.yml

search-darts: $(VENV)/installed
	@$(BIN)/python -m nni_cream.experiment experiments/darts.yml
	@$(BIN)/python trials/retrain_child.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(BESIDE_EACH_OTHER) -m "not alone"
	$(BIN)/python -m pytest -m alone

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(BESIDE_EACH_OTHER) -m "not slow"

test-nni: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(BESIDE_EACH_OTHER) --durations 25 $(NNI_TESTS)

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "installing what the tests need ..."
	@$(PIP_INSTALL) --editable ".[dev,elpv,export]"
	@# For the kernels' tests alone; torch's compiler would import it in every process.
	@$(PIP_INSTALL) --no-deps --target $(VENV)/triton --upgrade triton==3.7.1
	@touch $@
