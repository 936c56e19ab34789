PYTHON ?= python3
BIN    := .venv/bin
MODEL  := models/smollm2-135m/config.json
DEMO   := out/demo
VLLM   := $(or $(NANOBE_VLLM_VENV),.venv-vllm)
PORT   ?= 8000
ASK    := "What do you think of tax collectors?" "How do I cook rice so that it does not stick?" "I had a bad day at work. Any advice?"

.PHONY: demo serve test test-slow test-serving clean

# a prompt file becomes one vector that answers like it; every part of it that is done is skipped the next time
demo: .venv/installed $(MODEL)
	@echo
	@echo "The demo: prompts/pirate.txt, 357 tokens, becomes one input embedding of a frozen 135M model. On two cores about 10 minutes:"
	@echo "  1. stage 1, giving the prompt back   2. the teacher answers 200 questions   3. stage 2, distillation, and its table of controls   4. three questions"
	@echo
	@[ -e $(DEMO)/recon.recon.png ] || $(BIN)/python stage1_recon.py --prompt prompts/pirate.txt --out $(DEMO)/recon.pt $(if $(wildcard $(DEMO)/recon.pt),--resume)       # its plot comes last
	@echo
	@$(BIN)/python stage2_kd.py --prompt prompts/pirate.txt --be $(DEMO)/recon.pt --out $(DEMO)/be.pt --answer-tokens 32 --steps 300 $(if $(wildcard $(DEMO)/be.pt),--resume)
	@echo
	@$(BIN)/python infer.py --be $(DEMO)/be.pt --compare --max-new-tokens 60 --query $(ASK)

# the demo's own [BE] on a real server, until ctrl-C: vLLM where it is installed (requirements-serving.txt), else transformers serve
serve: $(DEMO)/served/nanobe.json
	@echo
	@echo "When the server is up, ask it, in another terminal:"
	@echo
	@echo "  curl -s http://127.0.0.1:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"$(DEMO)/served\", \"messages\": [{\"role\": \"system\", \"content\": \"<|be:pirate|>\"}, {\"role\": \"user\", \"content\": \"How do I cook rice?\"}], \"temperature\": 0, \"max_tokens\": 60}'"
	@echo
	@if [ -x $(VLLM)/bin/python ]; then \
	    HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 exec $(VLLM)/bin/python -m vllm.entrypoints.openai.api_server --model $(DEMO)/served \
	        --host 127.0.0.1 --port $(PORT) --max-model-len 2048 --enforce-eager --block-size 32; \
	else \
	    $(BIN)/python -m pip install --disable-pip-version-check -q "transformers[serving]" -c constraints.txt && \
	    HF_HUB_OFFLINE=1 exec $(BIN)/transformers serve $(DEMO)/served --host 127.0.0.1 --port $(PORT); \
	fi

$(DEMO)/served/nanobe.json: $(DEMO)/be.pt export.py
	$(BIN)/python export.py $(DEMO)/be.pt --out $(DEMO)/served --names pirate --overwrite

$(DEMO)/be.pt: | .venv/installed $(MODEL)
	@$(MAKE) demo

test: .venv/installed
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m "not slow and not serving" tests

test-slow: .venv/installed $(MODEL)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m slow tests

# real servers on loopback: vLLM (in .venv-vllm or NANOBE_VLLM_VENV, 3 GB, installed by the first run) and transformers serve
test-serving: .venv/installed $(MODEL)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -m serving tests/serving

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nanoBE needs Python 3.10 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt -c constraints.txt
	touch $@

$(MODEL): | .venv/installed
	$(BIN)/python models/prepare.py

clean:
	rm -rf out .pytest_cache tests/__pycache__ __pycache__
