# make demo    a fresh machine → environment, data, a small GPT trained on a CPU, a sample of its text
#              (STEPS=300 for a shorter training)
# make test    the whole test suite
# make soak    fifty training runs, killed at random, that must end like an untouched one (half an hour)
# make lint    style checks
# make bench   speed; beside others with NANOGPT=, BUILD_NANOGPT= (their checkouts), TEXTS= (Parquet)
#              (MICRO_BATCH=16 windows in a training step, if those of the config don't fit)
# make recipe  ways of training compared, on the Parquet files in TEXTS (JOBS=2 trainings at a time; hours)
# make figures README's figures, from the trained model in visuals/model
# make clean   remove the environment and what the demo made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# Python compiles a file when it is first imported: pip needn't do all 13,000 beforehand. Only the
# tests' many processes would each compile the same ones at the same time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test soak lint bench recipe figures clean
.DELETE_ON_ERROR:

demo: $(VENV)/requirements.installed
	$(RUN) prepare_fineweb.py --source python-docs --out data/demo \
		--tokenizer bpe:2048 --val-tokens 32768 --workers 1
	$(RUN) train.py configs/demo.toml $(if $(STEPS),--train.max_steps $(STEPS))
	$(RUN) evaluate.py --checkpoint out/demo
	$(RUN) sample.py --checkpoint out/demo --prompt "Return a list" \
		--max-new-tokens 120 --temperature 0.6 --top-k 20 --seed 2 --dtype float32

test: $(VENV)/compiled
	$(RUN) -m pytest -n auto --dist worksteal

soak: $(VENV)/requirements-dev.installed
	$(RUN) tests/soak.py --seeds 50

lint: $(VENV)/requirements-dev.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

figures: $(VENV)/requirements-dev.installed
	$(RUN) -m visuals.draw

# What README quotes is in results/, from other machines.
RESULTS ?= out/bench
DTYPES ?= float32 bfloat16
BATCHES ?= 1 16
STEP = $(if $(MICRO_BATCH),--micro-batch-size $(MICRO_BATCH))
bench: $(VENV)/requirements-dev.installed
	mkdir -p $(RESULTS)
	$(RUN) bench.py train $(STEP) --output $(RESULTS)/bench_train.json \
		$(if $(NANOGPT),--peer nanogpt=$(NANOGPT)) \
		$(if $(BUILD_NANOGPT),--peer build-nanogpt=$(BUILD_NANOGPT))
	$(RUN) bench.py train $(STEP) --output $(RESULTS)/bench_document_mask.json --document-mask
	for dtype in $(DTYPES); do for batch in $(BATCHES); do for prompt in 16 992; do \
		$(RUN) bench.py generate --dtype $$dtype --batch-size $$batch --prompt-tokens $$prompt \
			--output $(RESULTS)/bench_generate_$${dtype}_$${batch}_$$prompt.json \
			--peer transformers $(if $(NANOGPT),`test $$batch = 1 && \
				echo --peer nanogpt=$(NANOGPT)`) || exit 1; \
	done; done; done
	$(RUN) bench.py generate --dtype bfloat16 --peer transformers --peer-dtype float32 \
		--output $(RESULTS)/bench_generate_bfloat16_float32.json
	$(RUN) bench.py data --output $(RESULTS)/bench_data.json
	$(RUN) bench.py start --output $(RESULTS)/bench_start.json
	$(if $(TEXTS),$(RUN) bench.py tokenize --source $(TEXTS) --output $(RESULTS)/bench_tokenize.json \
		$(if $(BUILD_NANOGPT),--peer build-nanogpt=$(BUILD_NANOGPT)),\
		@echo "tokenize is left out: it needs a folder of Parquet files, TEXTS=")
	$(RUN) bench.py table $(RESULTS)

JOBS ?= 1
recipe: $(VENV)/requirements-dev.installed
	@$(if $(TEXTS),,echo "error: recipe needs a folder of Parquet files, TEXTS="; exit 2)
	$(RUN) prepare_fineweb.py --source $(TEXTS) --out data/recipe --tokenizer bpe:4096 \
		--val-tokens 131072
	$(RUN) recipe.py --jobs $(JOBS)

clean:
	rm -rf $(VENV) data/demo out/demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python " + \
		sys.version.split()[0] + " is too old, 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.installed: %.txt | $(VENV)/bin/python
	@echo "installing $<: PyTorch and others are large, this can take minutes"
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -r $<
	touch $@

$(VENV)/requirements-dev.installed: $(VENV)/requirements.installed

# Some packages hold a file that is for newer Pythons.
$(VENV)/compiled: $(VENV)/requirements-dev.installed
	$(RUN) -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@
