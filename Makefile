VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo
DEMO_MODELS := --samples 16 --output_dir $(DEMO)/results --compare "untouched base=cream-peft-tiny" \
	"RoPE scaling alone=cream-peft-tiny+ntk" "plain fine-tune=$(DEMO)/contiguous" "CREAM=$(DEMO)/cream"

.DEFAULT_GOAL := help
.PHONY: help demo demo-seeds test test-slow lint base chat push bench-cpu smollm2 smollm2-compare reproduce tiny-base clean

help:  ## print this list
	@awk -F ':.*## ' '/^##@ /{print "\n" substr($$0, 5)} /^[a-z0-9-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The constraints pin torch; for a user with a GPU the same pin brings the CUDA build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cream-peft needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

##@ try and use

demo: $(READY)  ## teach the embedded tiny model a skill on this CPU, and see how far it holds (3 minutes)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "A model with a window of 256 tokens learns a new skill on documents of 256 tokens: to answer a question in another form."
	@echo "(If other work runs on this machine, OMP_NUM_THREADS=1 make demo is several times faster.)"
	@echo "1/2  Teach it twice, for 2,048 tokens: a plain fine-tune, then CREAM's positions"
	@$(BIN)/cream-peft train --position_strategy contiguous --output_dir $(DEMO)/contiguous > $(DEMO)/train.log
	@$(BIN)/cream-peft train --output_dir $(DEMO)/cream >> $(DEMO)/train.log
	@echo "2/2  Ask four models in that form, in documents of 256 to 2,048 tokens"
	@$(BIN)/cream-peft evaluate --tasks new_skill --json $(DEMO)/results.json $(DEMO_MODELS)
	@$(BIN)/cream-peft plot --output $(DEMO)/demo.png \
		--title "A new skill, taught on 256 tokens, asked at up to 2,048" \
		$(patsubst %,$(DEMO)/results/%.json,untouched-base RoPE-scaling-alone plain-fine-tune CREAM)
	@echo "The adapter is in $(DEMO)/cream"

push: $(READY)  ## publish an adapter: make push ADAPTER=DIR REPO=user/name RESULTS="FILE ..."
	@test -n "$(ADAPTER)" -a -n "$(REPO)" || { echo 'error: make push ADAPTER=DIR REPO=user/name [RESULTS="FILE ..."]'; exit 2; }
	$(BIN)/cream-peft push --adapter "$(ADAPTER)" --repo "$(REPO)" $(if $(RESULTS),--results $(RESULTS))

##@ recipes

base: $(READY)  ## train the Base recipe: Llama-2-7B, 4K to 32K (needs a CUDA GPU)
	$(BIN)/cream-peft train --config recipes/llama-2-7b/cream-4k-32k-qlora.yaml

chat: $(READY)  ## train the Chat recipe: Llama-2-7B-chat, 4K to 32K (needs a CUDA GPU)
	$(BIN)/cream-peft train --config recipes/llama-2-7b-chat/cream-4k-32k-qlora.yaml

smollm2: $(READY)  ## teach SmolLM2-135M-Instruct a skill on 1,000 tokens, and ask it in 16,384 (hours on two cores, resumes)
	$(BIN)/python recipes/smollm2-135m-instruct/prepare.py
	$(BIN)/python recipes/smollm2-135m-instruct/compare.py --first --again

smollm2-compare: $(READY)  ## the same with every strategy, RoPE scaling, seed and length (days; MINUTES=90 stops, and again resumes)
	$(BIN)/python recipes/smollm2-135m-instruct/prepare.py
	$(BIN)/python recipes/smollm2-135m-instruct/compare.py $(if $(MINUTES),--minutes $(MINUTES))

# Each run is a file of its own: killed and started again, make resumes; -j2 trains two at a time.
SEEDS := runs/demo-seeds
SEED_RUNS := $(foreach seed,0 1 2 3 4 5 6 7 8 9,$(SEEDS)/contiguous-$(seed) $(SEEDS)/cream-$(seed))

$(SEED_RUNS:%=%/cream.json): | $(READY)
	$(BIN)/cream-peft train --position_strategy $(firstword $(subst -, ,$(notdir $(@D)))) --seed $(lastword $(subst -, ,$(@D))) \
		--save_strategy no --disable_tqdm true --output_dir $(@D)

demo-seeds: $(SEED_RUNS:%=%/cream.json)  ## the demo's two trainings with ten seeds (half an hour)
	$(BIN)/cream-peft evaluate --tasks new_skill --lengths 256 2048 --samples 16 --compare $(SEED_RUNS) \
		--output_dir $(SEEDS)/results --json $(SEEDS)/results.json

reproduce: $(READY)  ## position strategies under each RoPE scaling, tiny model (hours, resumes; MINUTES=30 ONLY="new_skill ntk")
	$(BIN)/python recipes/cream-peft-tiny/reproduce.py --again $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

tiny-base: $(READY)  ## pretrain the embedded tiny model again (under 5 minutes)
	$(BIN)/python recipes/cream-peft-tiny/make_base.py --output runs/tiny-base

##@ developing

# Two at a time, a thread each: most of a test's time is one thread's.
test: lint  ## lint, and the fast tests (5 to 8 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(READY)  ## the tests that take longer
	$(BIN)/python -m pytest -q -m slow

lint: $(READY)  ## ruff (rules and format) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)

bench-cpu: $(READY)  ## time CREAMTrainer against SFTTrainer (AUTHORS=checkout of wutong4012/CREAM adds the sampler)
	$(BIN)/python tests/bench_cpu.py --output runs/bench-cpu.json $(if $(AUTHORS),--authors $(AUTHORS))

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info
