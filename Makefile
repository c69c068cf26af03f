# Two commands do everything on a fresh machine: make quickstart, make test.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on

.PHONY: quickstart test check clean
quickstart: $(VENV)/.installed
	$(BIN)/tokengame quickstart

test: $(VENV)/.installed-dev
	BIN=$(BIN) scripts/check

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing tokengame into $(VENV). PyTorch is some gigabytes: this takes one to five minutes."
	$(PIP) --editable . | scripts/brief
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need."
	$(PIP) --editable '.[dev,oracle]' | scripts/brief
	@touch $@

clean:
	rm -rf $(VENV) quickstart build *.egg-info
