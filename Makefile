VENV ?= .venv
# The first that runs (a launcher of pyenv may lie on PATH for a Python that is not there); 3.11 is the one that is tested.
PYTHON ?= $(or $(shell for name in python3.11 python3.12 python3.13; do \
	"$$name" -c "" 2>/dev/null && command -v "$$name" && break; done),python3)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SGLANG_VENV := $(VENV)-sglang
VERL_VENV := $(VENV)-verl
AGENTS_VENV := $(VENV)-agents
# Ecosystems that the pinned packages leave out.
BESIDE := $(foreach name,verifiers gem reasoning-core,$(VENV)-$(name)/.installed)
SMOLLM2 := .models/SmolLM2-135M-Instruct

# What `make quickstart` trains (hub id or directory), and further arguments of the training script.
MODEL ?= $(SMOLLM2)
ARGS ?=
# As an environment variable, so that quotes in it survive.
export ARGS

.DEFAULT_GOAL := help
.PHONY: help install quickstart replay test test-agents test-environments test-sglang test-verl check types unit docs bench lock clean

help: ## Show the targets.
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 26

install: $(INSTALLED) ## Make the virtual environment .venv with the pinned CPU stack.

$(INSTALLED): requirements/cpu.txt requirements.txt setup.py packaging/install.sh packaging/pip_settings.py \
		packaging/vllm_cpu_metadata/setup.py
	@packaging/install.sh "$(VENV)" "$(PYTHON)"
	@touch $@

quickstart: $(INSTALLED) ## Train a small model on a CPU, all services included. MODEL=... ARGS="--use_peft ..."
ifeq ($(MODEL),$(SMOLLM2))
	@$(BIN)/trl-atropos model fetch smollm2 --output_dir "$(SMOLLM2)"
endif
	@$(BIN)/trl-atropos launch -c examples/configs/quickstart_launch.yaml \
		--model_name_or_path "$(MODEL)" $${ARGS:+--trainer_args="$$ARGS"}

replay: $(INSTALLED) ## Train the rollouts that the quickstart recorded once more, without any server, and compare the losses.
	@test -d runs/quickstart/model/journal || { echo "No recorded rollouts: run \`make quickstart\` first." >&2; exit 1; }
	$(BIN)/python examples/scripts/atropos.py --config examples/configs/quickstart.yaml \
		--model_name_or_path "$(MODEL)" --data_path runs/quickstart/model/journal --output_dir runs/replay $$ARGS
	@$(BIN)/python examples/scripts/compare_losses.py runs/quickstart/model runs/replay

check: $(INSTALLED) ## Linter, formatter, type checker, unit tests; some of them build the documents. ARGS="-k journal"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j 2 types unit

# The type checker has one core to itself while the tests have the others.
types:
	$(BIN)/mypy

unit:
	@packaging/run_tests.sh "$(VENV)" unit

docs: $(INSTALLED) ## Build the documents into site/; warnings are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test-sglang: $(SGLANG_VENV)/.installed ## Make .venv-sglang and run the tests on a real SGLang server.
	TRL_ATROPOS_SGLANG_PYTHON="$(abspath $(SGLANG_VENV))/bin/python" $(BIN)/pytest -q tests/sglang $$ARGS

$(SGLANG_VENV)/.installed: requirements/sglang.txt packaging/install_beside.sh $(INSTALLED)
	@packaging/install_beside.sh "$(VENV)" "$(SGLANG_VENV)" requirements/sglang.txt
	@touch $@

test-agents: $(AGENTS_VENV)/.installed ## Make .venv-agents and train on agents of the package index, as they are.
	TRL_ATROPOS_AGENTS_PYTHON="$(abspath $(AGENTS_VENV))/bin/python" $(BIN)/pytest -q tests/agents $$ARGS

$(AGENTS_VENV)/.installed: requirements/agents.txt packaging/install_apart.sh $(INSTALLED)
	@packaging/install_apart.sh "$(VENV)" "$(AGENTS_VENV)" requirements/agents.txt agents
	@touch $@

test-verl: $(VERL_VENV)/.installed ## Make .venv-verl and run the tests of verl's trainer.
	TRL_ATROPOS_VERL_PYTHON="$(abspath $(VERL_VENV))/bin/python" $(BIN)/pytest -q tests/verl $$ARGS

$(VERL_VENV)/.installed: requirements/verl.txt packaging/install_apart.sh $(INSTALLED)
	@VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=trl_atropos.verl.cpu VERL_LOGGING_LEVEL=WARN \
		packaging/install_apart.sh "$(VENV)" "$(VERL_VENV)" requirements/verl.txt trl_atropos.verl.train
	@touch $@

test-environments: $(INSTALLED) $(BESIDE) ## Train one step on each of a dozen environments of all ecosystems.
	@$(BIN)/trl-atropos model fetch smollm2 --output_dir "$(SMOLLM2)"
	@packaging/with_server.sh "$(VENV)" "$(SMOLLM2)" packaging/test_environments.sh sample "$(VENV)" "$(SMOLLM2)"
	@packaging/test_environments.sh train "$(VENV)" "$(SMOLLM2)"

$(BESIDE): $(VENV)-%/.installed: requirements/%.txt packaging/install_beside.sh $(INSTALLED)
	@packaging/install_beside.sh "$(VENV)" "$(VENV)-$*" requirements/$*.txt
	@touch $@

test: check ## Everything: what `check` does, then the tests with processes, ranks and real servers. ARGS="-k journal"
	@packaging/run_tests.sh "$(VENV)" rest

bench: $(INSTALLED) ## Time publishing, the training step, logprobs, ingest, overlap, the trajectory API and the gateway; one JSON line per case.
	@$(BIN)/python benchmarks/publish.py
	@$(BIN)/python benchmarks/train_step.py
	@$(BIN)/python benchmarks/logprobs.py
	@$(BIN)/python benchmarks/ingest.py
	@$(BIN)/python benchmarks/overlap.py
	@$(BIN)/python benchmarks/api.py
	@$(BIN)/python benchmarks/gateway.py

lock: $(INSTALLED) ## Resolve requirements/cpu.in into requirements/cpu.txt. ARGS=--upgrade: the newest versions.
	$(BIN)/python packaging/lock.py $(ARGS)

clean: ## Remove what the other targets made, except the model.
	rm -rf "$(VENV)" runs build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf *.egg-info packaging/vllm_cpu_metadata/build packaging/vllm_cpu_metadata/*.egg-info
