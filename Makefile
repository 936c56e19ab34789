PYTHON ?= python3
BIN    := .venv/bin
MODEL  := models/smollm2-135m/config.json
DEMO   := out/demo
# another venv that has vLLM is used as it is: make serve NANOBE_VLLM_VENV=~/vllm
VLLM   := $(or $(NANOBE_VLLM_VENV),.venv-vllm)
INTO   := $(if $(NANOBE_VLLM_VENV),,.venv-vllm/installed)

.PHONY: demo serve test test-slow test-serving clean

# a prompt file becomes one vector that answers like it; a step whose file is there is skipped
demo: $(DEMO)/be.kl.json
	@$(BIN)/python infer.py --be $(DEMO)/be.pt --compare --max-new-tokens 60 \
	    --query "What do you think of tax collectors?" "How do I cook rice so that it does not stick?" \
	    "I had a bad day at work. Any advice?"

$(DEMO)/recon.done: | .venv/installed $(MODEL)
	$(BIN)/python stage1_recon.py --prompt prompts/pirate.txt --steps 20 --out $(DEMO)/recon.pt --resume
	@touch $@

$(DEMO)/be.done: $(DEMO)/recon.done
	$(BIN)/python stage2_kd.py --prompt prompts/pirate.txt --init $(DEMO)/recon.pt --out $(DEMO)/be.pt --resume
	@touch $@

$(DEMO)/be.kl.json: $(DEMO)/be.done
	$(BIN)/python eval_kl.py --be $(DEMO)/be.pt

# the demo's [BE] on a real server, beside the base model, until ctrl-C; vLLM's own venv takes 3 GB and some minutes
serve: $(DEMO)/be.done | $(INTO)
	$(BIN)/python export.py $(DEMO)/be.pt --adapter $(DEMO)/served/pirate --overwrite
	HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \
	    $(VLLM)/bin/python -m vllm.entrypoints.openai.api_server --model models/smollm2-135m \
	    --enable-lora --lora-target-modules embed_tokens --max-lora-rank 1 --lora-modules pirate=$(DEMO)/served/pirate \
	    --host 127.0.0.1 --max-model-len 2048 --enforce-eager --block-size 32

test: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m "not slow and not serving" tests

test-slow: .venv/installed $(MODEL)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m slow tests

test-serving: $(INTO) .venv/installed $(MODEL)
	$(BIN)/python -m pip install --disable-pip-version-check -q "transformers[serving]" -c constraints.txt
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m serving tests/serving

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nanoBE needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	touch $@

.venv-vllm/installed: requirements-serving.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -q -r requirements-serving.txt
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(MODEL): | .venv/installed
	$(BIN)/python models/prepare.py

clean:
	rm -rf $(DEMO) .pytest_cache tests/__pycache__ __pycache__
