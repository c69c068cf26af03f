# Two commands do everything on a fresh machine: make quickstart, make test.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: quickstart test check clean
quickstart: $(VENV)/.installed
	$(BIN)/tokengame quickstart

test: $(VENV)/.installed-dev
	BIN=$(BIN) scripts/check

$(VENV)/.installed: pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,oracle]'
	touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info
