# Two commands do all the set-up themselves: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build of torch comes from wherever pip finds it; point TORCH_INDEX at torch's CPU index to save a large download.
TORCH_INDEX ?=
# Processes that share the tests; together they run at most four ranks (tests/rank_slots.py).
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist worksteal
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: env quickstart test test-fast test-sglang test-slurm invariance chaos study study-small sglang lint clean

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# A small MoE is made, warmed up, converted to Megatron, trained with VESPO on 2 ranks and reported on.
# `make quickstart ARGS="parallel.tensor=2 train.steps=3"` changes any setting.
quickstart: env
	$(BIN)/python -m megatron_vespo.quickstart runs/quickstart_model
	$(BIN)/python -m megatron_vespo train model_configs/quickstart.yaml $(ARGS)

test: env lint
	$(BIN)/python -m pytest $(SHARED) -m 'not slurm' --durations=40

test-fast: env
	$(BIN)/python -m pytest $(SHARED) -m 'not slow'

# Kills driver, ranks, engines and graders of a tiny run, forty times; what is left must equal the undisturbed run.
chaos: env
	PYTHONPATH=.:tests $(BIN)/python -m chaos $(ARGS)

# Every objective x aggregation x split x packing against float64, and docs/invariance.md from it (about 20 minutes).
invariance: env
	PYTHONPATH=tests $(BIN)/python -m invariance docs/invariance.md

# Which objective still learns from old data: docs/study.md, in hours; killed and started again it goes on.
# `make study-small` is a corner of it, docs/study_small.md, in under 20 minutes.
study: env
	$(BIN)/python -m benchmarks.staleness --suite full $(ARGS)

study-small: env
	$(BIN)/python -m benchmarks.staleness --suite small $(ARGS)

# The engine suite against real SGLang on this machine's CPU (1.7 GB of packages in the same environment).
sglang: $(VENV)/.sglang

$(VENV)/.sglang: $(VENV)/.installed tools/install_sglang_cpu.sh
	PYTHON=$(BIN)/python bash tools/install_sglang_cpu.sh
	touch $@

test-sglang: sglang
	$(BIN)/python -m pytest -m sglang

# The launchers on a real Slurm of several emulated nodes on this machine; root, and Debian's packages.
test-slurm: env
	@command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v ip >/dev/null && command -v shellcheck \
	  >/dev/null || { apt-get update -q && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	  apt-get install -q -y --no-install-recommends slurm-wlm munge iproute2 shellcheck; }
	PYTHONPATH=.:tests $(BIN)/python -m pytest tests/test_slurm.py tests/test_slurm_commands.py tests/test_launch.py \
	  --durations=20

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
