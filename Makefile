# make study   set up, run the study (params.yaml's profile, or PROFILE=smoke|cpu|full|gpu), print the verdicts;
#              ONLY="inference hub" runs those experiments and what they read
# make test    set up, check style and types, run the tests
# make bundle  set up, build a folder that runs the study on an offline GPU machine (PARTS=2 adds SmolLM2)
# make ui      set up, open the MLflow UI on 127.0.0.1
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# dvc runs `lab` by its name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup study test bundle ui lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed. Try: make PYTHON=python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV): torch and the rest, some minutes and about 3 GB once"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

study: setup
	@lab study $(ONLY) $(if $(PROFILE),--profile $(PROFILE))

test: setup
	ruff check .
	ruff format --check .
	mypy
	pytest --numprocesses logical --maxprocesses 4 --dist worksteal

bundle: setup
	@lab bundle $(if $(PARTS),--parts $(PARTS))

ui: setup
	@lab ui

# Write down the installed set, after trying it: the one place where versions are pinned.
lock: setup
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf build .lab mlflow.db* mlartifacts
