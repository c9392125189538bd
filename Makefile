# make demo    sets up and runs the whole workflow on small synthetic slides (make demo-pilot, whether to adapt at all)
# make test    sets up and runs all checks and tests but the long ones (make long-test)
# make help    the rest
#
# PYTHON=/path/to/python3.12 takes another Python for the environment (3.11 or newer).
# WHEELHOUSE=dir installs from a folder of wheels, without a network (filled by `pip wheel -w dir -r requirements-test.txt`).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: setup demo demo-pilot test long-test kill-test cluster-test unlock clean help

PYTHON ?= python3
WHEELHOUSE ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(WHEELHOUSE),--no-index --find-links "$(WHEELHOUSE)")

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

setup: $(VENV)/.setup-done  ## make .venv with everything the workflow needs

# pip comes last into an environment, so that one half made is made again.
$(VENV)/bin/pip:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) is not there; install it: sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is $$("$(PYTHON)" --version), but 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) cannot make environments; install the module: sudo apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# The stamps are newer than the files they stand for, so that nothing is installed twice.
$(VENV)/.setup-done: requirements.txt | $(VENV)/bin/pip
	@echo "installing the workflow's packages into $(VENV) (several minutes the first time)"
	$(PIP) -r requirements.txt
	@touch "$@"

$(VENV)/.test-tools-done: requirements-test.txt requirements.txt | $(VENV)/bin/pip
	@echo "installing the workflow's packages and the test tools into $(VENV) (several minutes the first time)"
	$(PIP) -r requirements-test.txt
	@touch "$(VENV)/.setup-done" "$@"

demo: setup  ## run the whole workflow on small synthetic slides
	snakemake --cores all
	@echo
	@echo "Done. Open results/report.html in a browser: slides, training curves, and PCA maps before and after training."

demo-pilot: setup  ## is adaptation worth it? tried on small drawn biopsies, from the demo's own model
	snakemake --cores all results/models/pretrain/teacher.pth
	snakemake --cores all --configfile config/demo_pilot/config.yaml --replace-workflow-config pilot
	@echo
	@cat results/demo_pilot/pilot/advice.txt
	@echo "Curves and scores: results/demo_pilot/pilot/figure.png, summary.tsv."

test: $(VENV)/.test-tools-done  ## all checks and tests but the long ones
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint
	pytest -m "not long and not cluster"

long-test: $(VENV)/.test-tools-done  ## trainings that are killed, hang or distil, collections with bad slides
	pytest -m long

kill-test: $(VENV)/.test-tools-done  ## kill trainings 50 times, also while they save (long)
	DINOSCOPE_KILLS=50 pytest tests/distributed/test_checkpoints.py -k killed

# Root alone may start SLURM's daemons; where the packages cannot be had the tests are skipped and say so.
cluster-test: $(VENV)/.test-tools-done  ## the workflow on a real SLURM of two nodes on this machine (Debian, root)
	@{ command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null; } || true
	DINOSCOPE_CLUSTER_TESTS=1 pytest -m cluster tests/cluster

unlock:  ## after Snakemake was killed (SIGKILL, power cut): then run the same command again
	snakemake --unlock --cores 1

clean:  ## remove the environment and Python's caches; results stay
	rm -rf "$(VENV)" .pytest_cache .ruff_cache
	find workflow_scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/' | expand -t 16
