# `make quickstart` and `make test` create their virtual environment first if needed; `make` lists all targets.

PYTHON  ?= python3
VENV    ?= .venv
# Extra options, for example QUICKSTART="--fast --seed 1" or PYTEST="-k losses".
QUICKSTART ?=
PYTEST     ?=
# Test processes; each uses one thread, which is faster than several on busy cores.
WORKERS    ?= 2
# Seconds of random input, and its seed.
FUZZ_SECONDS ?= 120
FUZZ_SEED    ?= 0

# Options of benchmarks/gpu.py, for example GPU="--minutes 8"; what it needs next to PyTorch, in the pinned versions; and
# what of that `make gpu-wheels` takes to a machine without a network, which has the rest (with the repository 62 MiB).
GPU        ?=
GPU_NAMES  := accelerate anyio bitsandbytes certifi charset-normalizer diffusers h11 httpcore2 httpx2 huggingface_hub idna \
	iniconfig liger_kernel markdown-it-py mdurl numpy packaging peft pillow pluggy psutil pygments pytest pytest-timeout \
	pyyaml regex requests rich safetensors tokenizers tqdm transformers truststore urllib3
GPU_WHEELS ?= accelerate bitsandbytes diffusers liger_kernel peft transformers
GPU_CUDA   ?= 130
pinned      = $(foreach name,$(1),$(shell grep -i '^$(name)==' constraints.txt || echo $(name)))

BIN         := $(VENV)/bin
USER_STAMP  := $(VENV)/.installed-quickstart
DEV_STAMP   := $(VENV)/.installed-dev
# Many of the pinned releases need Python 3.11.
CONSTRAINTS  = $(shell $(BIN)/python -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')
TEST_ENV    := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
SHELL_FILES := .ci/run $(wildcard scripts/*.sh visualization/*.sh tests/parts/*.sh)

.PHONY: help quickstart test test-fast test-slurm test-lmms-eval fuzz gpu gpu-wheels lint format types imports docs check clean

help:
	@echo "make quickstart   install, then train the miniature end to end (report in out/)"
	@echo "make test         install, then run all tests (test-fast: without the slow ones)"
	@echo "make test-slurm   run the cluster tests on two virtual nodes of its own Slurm (as root)"
	@echo "make test-lmms-eval   run the tests of the plug-in for lmms-eval, in an environment of its own"
	@echo "make fuzz         test random and damaged input for FUZZ_SECONDS=120, with FUZZ_SEED=0"
	@echo "make gpu          GPU tests and benchmarks into benchmarks/RESULTS.md, with the PyTorch of PYTHON=python3"
	@echo "make gpu-wheels   download what make gpu installs, for x86-64 and Python 3.12 without a network"
	@echo "make check        check lint, types, import contracts and the documentation"
	@echo "make format       format the code with ruff"
	@echo "make clean        remove the virtual environment and everything built"

quickstart: $(USER_STAMP)
	$(BIN)/metamorph quickstart $(QUICKSTART)

test: $(DEV_STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

test-fast: $(DEV_STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(PYTEST)

# Starts its own Slurm during the tests; needs root and Slurm's daemons, see tests/parts/with_slurm.sh.
test-slurm: $(DEV_STAMP)
	$(TEST_ENV) bash tests/parts/with_slurm.sh $(BIN)/python -m pytest -m slurm $(PYTEST)

# lmms-eval wants other releases of our packages.
test-lmms-eval: $(DEV_STAMP)
	PYTHON=$(BIN)/python scripts/lmms_eval_env.sh $(VENV)-lmms-eval
	$(TEST_ENV) $(VENV)-lmms-eval/bin/python -m pytest tests/evaluation/test_lmms_eval.py $(PYTEST)

fuzz: $(DEV_STAMP)
	$(TEST_ENV) METAMORPH_FUZZ_SECONDS=$(FUZZ_SECONDS) METAMORPH_FUZZ_SEED=$(FUZZ_SEED) \
		$(BIN)/python -m pytest -n $(WORKERS) -m fuzz tests/test_fuzz.py $(PYTEST)

# Installs next to the GPU build of PyTorch that PYTHON has, without changing it; with .wheels/, without a network.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target out/gpu-site \
		$(if $(wildcard .wheels/*.whl),--no-index .wheels/*.whl,$(call pinned,$(GPU_NAMES)))
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/out/gpu-site $(PYTHON) benchmarks/gpu.py $(GPU)

# The wheel of bitsandbytes has a library for each version of CUDA, ROCm and XPU (43 MB together): that of GPU_CUDA is kept.
gpu-wheels:
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_24_x86_64 _2_17_x86_64 2014_x86_64 1_x86_64) \
		--dest .wheels $(call pinned,$(GPU_WHEELS))
	zip --quiet --delete .wheels/bitsandbytes-*.whl '*_cuda*.so' '*_rocm*.so' '*_xpu*.so' -x '*_cuda$(GPU_CUDA).so'

check: lint types imports docs

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck $(SHELL_FILES)

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP)
	$(BIN)/mypy

imports: $(DEV_STAMP)
	$(BIN)/lint-imports --no-logo

docs: $(DEV_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "MetaMorph needs Python 3.10 or newer; choose one with PYTHON=, for example make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The install is repeated when the files that say what to install are newer than the stamps.
$(USER_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[quickstart]"
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[quickstart,dev,docs]"
	@touch $@ $(USER_STAMP)
