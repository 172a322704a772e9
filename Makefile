# make help   this list
# make setup   the environment in .venv, which the others make where it is missing
# make demo   set up, then train a tiny model to add, every part real
# make test   set up, then all tests (about 35 minutes on 2 cores); FAST=1 leaves out the slow ones
# make test-full   the same, with every combination of layout, model, packing and loss, and with megatron-core 0.19
# make test-slurm   set up and install SLURM (Debian's slurm-wlm and munge; as root), then the tests on a real cluster
# make lint   set up, then ruff and mypy
# make clean   remove what setting up has made, the demo's model and runs/
# make prove REV=HEAD~1   that this tree computes what another revision does, bit for bit: every layout and a short run
# make bench-trl   set up, TRL too in an environment of its own, then compare speed with it; ARGS=--quick for a few steps
# make bench-chaos   the demo run killed at random moments and resumed, again and again; ARGS="--minutes 60" for an hour
# make bench-engine-deaths   the demo at lag 2 while an engine is killed every 20 seconds
# make bench-checkpoint   saves and their verification beside the machine's own limits
# make bench-control-plane   a batch of the size of the paper through controller and link: time, bytes, memory
# make bench-conversion   a model of 1.5 B parameters to a distributed checkpoint and back: memory and speed
# make bench-rollout-schedule   the producer in virtual time at several lags: idle engines, steps, lengths, staleness
# make bench-push   bytes per second of a weight push to real engines, beside a plain broadcast of the same bytes
# ARGS adds overrides to the demo: make demo ARGS="actor.pipeline_model_parallel_size=2 actor.tensor_model_parallel_size=1"

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
# Python sources of TransformerEngine for one test, in folders of their own: where it can be imported, actor.layer_spec
# auto would take it, and without CUDA nothing of it runs. The newest that megatron-core 0.16.1 names (< 2.12), and ours.
TE := 2.11.0 2.20.2
TE_READY := $(TE:%=.venv-te/%/.ready)
NEWER := .venv-megatron-0.19
TRL_READY := .venv-trl/.ready
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-full test-slurm slurm-programs lint prove setup clean \
  bench-trl bench-chaos bench-engine-deaths bench-checkpoint bench-conversion bench-control-plane bench-rollout-schedule bench-push

help:
	@sed -n "s/^# \(make .*\)/\1/p" Makefile

demo: $(READY)
	$(BIN)/dapo-megatron demo $(ARGS)

test: $(READY) $(TE_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(if $(FAST),-m "not slow") $(ARGS)

test-full: $(READY) $(TE_READY) $(NEWER)
	OMP_NUM_THREADS=1 LAYOUTS=all $(BIN)/python -m pytest -q $(ARGS)

test-slurm: $(READY) slurm-programs
	OMP_NUM_THREADS=1 SLURM=all $(BIN)/python -m pytest -q -rs tests/slurm $(ARGS)

slurm-programs:
	@test "$$(id -u)" = 0 || { echo "tests/slurm make network namespaces: run make as root"; exit 1; }
	@which slurmctld slurmd munged ip >/dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2; } || \
	  { echo "tests/slurm need SLURM, and apt-get could not install it: install slurm-wlm, munge and iproute2"; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prove: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.prove $(REV)

bench-trl: $(READY) $(TRL_READY)
	$(BIN)/python -m benchmarks.vs_trl $(ARGS)

bench-chaos bench-engine-deaths bench-checkpoint bench-conversion bench-control-plane bench-rollout-schedule: bench-%: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.$(subst -,_,$*) $(ARGS)

bench-push: $(READY)
	$(BIN)/python -W ignore -m benchmarks.weight_push $(ARGS)

setup: $(READY) $(TE_READY)

# torch first: anything that pulls it in by itself would bring the CUDA build.
$(READY): pyproject.toml requirements/cpu.txt requirements/sglang-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/sglang-cpu.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $(READY)

.venv-te/%/.ready: | $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-te/$* transformer-engine==$*
	touch $@

# Its metadata ask for Python 3.12; the code that is used here runs on 3.11 too.
$(NEWER): | $(READY)
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --target $@ megatron-core==0.19.2

$(TRL_READY): requirements/trl-cpu.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet torch==2.13.0
	.venv-trl/bin/pip install --quiet --no-deps -r requirements/trl-cpu.txt
	touch $(TRL_READY)

clean:
	rm -rf .venv .venv-te .venv-trl $(NEWER) demo runs
