# Every target sets itself up: only git, python3 with venv and make are needed. With a C
# compiler updates on the CPU take one pass; DeepSpeed needs one.
PYTHON ?= python3
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
RUN    ?= runs/main
# Processes that share the files of tests: ranks wait for each other half of the time.
JOBS   ?= 2
SHARED := -n $(JOBS) --dist loadfile
# What an installation compiles, if there is a C compiler.
KERNELS := $(wildcard sharded_ema/averaging/kernels/*.[ch])

.PHONY: train train-deepspeed test test-quick test-long test-stacks test-stores test-oldest test-gpu lint format bench bench-gpu bench-consolidate docs links dist clean

# The main job: train on real text with a sharded EMA, consolidate it, load it in a fresh process.
define TRAIN_AND_CHECK
rm -rf $(RUN)
OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 launch/train.py --ema --generate-tokens 100 \
	--out $(RUN) $(FLAGS)
$(BIN)/sharded-ema inspect $(RUN)/ema
$(BIN)/sharded-ema consolidate $(RUN)/ema $(RUN)/export --like $(RUN)/hf
$(BIN)/python launch/check_export.py $(RUN)/export $(RUN)
$(BIN)/sharded-ema consolidate $(RUN)/ema $(RUN)/export-bf16 --like $(RUN)/hf --dtype bfloat16
$(BIN)/python launch/check_export.py $(RUN)/export-bf16 $(RUN)
endef

# What an average has to be compared with: the learning rate annealed to 0.
define COMPARE_WITH_ANNEALED
rm -rf $(RUN)-annealed
OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 launch/train.py --ema --min-lr-ratio 0 \
	--out $(RUN)-annealed $(FLAGS)
$(BIN)/python launch/compare_runs.py $(RUN) $(RUN)-annealed
endef

train: $(VENV)/.train
	$(TRAIN_AND_CHECK)
	$(COMPARE_WITH_ANNEALED)

# The same under DeepSpeed ZeRO-3.
train-deepspeed: RUN = runs/deepspeed
train-deepspeed: FLAGS = --parallel zero3
train-deepspeed: $(VENV)/.deepspeed
	$(TRAIN_AND_CHECK)

test: $(VENV)/.test $(VENV)/.alone
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(SHARED)

# While you work: everything that one process can tell, in less than two minutes.
test-quick: $(VENV)/.test
	$(BIN)/python -m pytest $(SHARED) -m "not long and not stacks and not slow and not dist and not gpu"

# What takes minutes: hundreds of kills, of damaged bytes, ten minutes of fuzzing.
test-long: $(VENV)/.test
	$(BIN)/python -m pytest -m long --timeout 3600

# Training stacks on each of their backends; make test runs a slice of it.
test-stacks: $(VENV)/.test $(VENV)/.alone
	MATRIX=docs/integrations/matrix.md $(BIN)/python -m pytest $(SHARED) -m 'stacks or not stacks' \
		tests/integrations

# Checkpoints on real servers that run here: S3 (moto), and Azure's (Azurite, where there is npm).
AZURITE_VERSION := 3.35.0
test-stores: $(VENV)/.test $(VENV)/.azurite
	PATH="$(abspath $(VENV))/azurite/node_modules/.bin:$$PATH" \
		$(BIN)/python -m pytest -m stores tests/stores --timeout 1200 -rs

# On the lower bounds of pyproject.toml, without DeepSpeed, in an environment of its own. That is a
# download of several GB: old PyTorch comes with CUDA.
test-oldest:
	$(MAKE) --no-print-directory VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt \
		EXTRAS_test=test .venv-oldest/.test
	.venv-oldest/bin/python -m pytest

test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest tests/gpu -rs

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Other libraries are timed beside this one where they are installed in the same environment
# (docs/comparison.md).
bench: $(VENV)/.train
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/update.py
	OMP_NUM_THREADS=2 $(BIN)/python launch/bench/update.py --threads 2
	$(BIN)/python launch/bench/picture.py
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/save.py
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/construct.py
	OMP_NUM_THREADS=1 $(BIN)/python launch/bench/posthoc.py

# On one GPU: at most 8 minutes, the tests of make test-gpu included.
bench-gpu: $(VENV)/.test
	$(BIN)/python launch/bench/gpu.py

# A quarter of an hour and 13 GB of disk.
bench-consolidate: $(VENV)/.deepspeed
	$(BIN)/python launch/bench/consolidate.py

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W -b html docs build/docs

# Asks every address outside whether it is there; make test follows those inside.
links: $(VENV)/.docs
	$(BIN)/sphinx-build -b linkcheck docs build/links

# What is uploaded for a release: sdist and wheel of the code, and of the distribution that brings
# PyTorch with it, looked at as the index will.
dist: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --outdir dist distributions/sharded-ema
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-oldest runs build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: its pinned version is then there when the others ask for a range.
$(VENV)/.torch: $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		$$(grep '^torch==' $(CONSTRAINTS))
	touch $@

$(VENV)/.%: pyproject.toml setup.py $(KERNELS) $(CONSTRAINTS) $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS_$*)]'
	touch $@

# torchtitan wants an older datasets than TRL does, and timm a torchvision that there is for GPUs
# only; what is tested of them needs neither.
$(VENV)/.alone: $(CONSTRAINTS) $(VENV)/.torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --no-deps timm \
		torchtitan torch_checkpointing spmd_types torchdata tyro docstring_parser typeguard
	touch $@

$(VENV)/.azurite: | $(BIN)/python
	if command -v npm > /dev/null; then \
		npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@$(AZURITE_VERSION); \
	fi
	touch $@

EXTRAS_train     := launch
EXTRAS_deepspeed := launch,deepspeed
EXTRAS_test      := launch,deepspeed,test,docs,stores,stacks
EXTRAS_docs      := docs
EXTRAS_release   := release
.PRECIOUS: $(VENV)/.torch
