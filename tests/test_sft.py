"""sft.py against transformers, tokenizers and scipy (tests/fixtures/sft_*), its edges, bad input, and its loops."""

import json
import math
import random
from functools import partial
from pathlib import Path

import pytest
import torch

import bpe
import model as model_py
import sft

FIXTURES = Path(__file__).parent / "fixtures"
ANSWERS = json.loads((FIXTURES / "sft_answers.json").read_text())
TINY = FIXTURES / "sft_tiny"
# In float64 only the order of sums differs, over at most 300 tokens of a few nats: 1e-10. The models' own tables
# (RoPE's cosines) are float32, worth 1e-5 on a sum of 100 log-probs. A mean for a sum, or a missing end of text, is off
# by over 1.
EXACT = dict(rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.from_file(TINY / "tokenizer.json")


@pytest.fixture
def policy():
    return model_py.load_hf(TINY / "policy").double()


@pytest.fixture
def reference():
    return model_py.load_hf(TINY / "reference").double()


def batch():
    known = ANSWERS["tokenize"]
    return {key: torch.tensor(known[key]) for key in ("input_ids", "labels", "response_mask")}


# -------------------------------------------------------------------------------- the tensors


def test_tokenize_prompt_and_output(tokenizer):
    known = ANSWERS["tokenize"]
    got = sft.tokenize_prompt_and_output(known["prompts"], known["outputs"], tokenizer)
    for key in ("input_ids", "labels", "response_mask"):
        assert got[key].tolist() == known[key], key
    # the second output ends in a real end-of-text token: the same id as the padding after it, and yet it counts
    eos = tokenizer.special_tokens["<|endoftext|>"]
    row = got["labels"][1]
    assert (row == eos).sum() > 1 and (got["response_mask"][1] & (row == eos)).sum() == 1


class HuggingFaceLike:
    """What our code asks of a transformers tokenizer: a BOS token unless add_special_tokens=False, and eos/pad ids."""

    eos_token_id, pad_token_id = 7, 9

    def convert_tokens_to_ids(self, tokens):
        raise AssertionError("only a mark")

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [10 + len(word) for word in text.split()]


class HuggingFaceOutput:
    def __init__(self, logits):
        self.logits = logits


def test_hugging_face_tokenizers_and_models():
    got = sft.tokenize_prompt_and_output(["a bb", "a"], ["ccc", "bb"], HuggingFaceLike())
    assert got["input_ids"].tolist() == [[11, 12], [11, 12]] and got["labels"].tolist() == [[12, 13], [12, 9]]
    assert got["response_mask"].tolist() == [[False, True], [True, False]]
    logits = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    log_probs = sft.get_response_log_probs(lambda ids: HuggingFaceOutput(logits), got["input_ids"], got["labels"])[
        "log_probs"
    ]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, got["labels"][..., None])[..., 0])


@pytest.mark.parametrize(
    "prompts, outputs, mask",
    [
        ([[]], [[5, 6, 7]], [[1, 1]]),  # no prompt: the first token is nobody's label
        ([[5, 6, 7]], [[]], [[0, 0]]),  # no output
        ([[5], [5, 6]], [[7, 8, 9], [7]], [[1, 1, 1], [0, 1, 0]]),
    ],
)
def test_collate_edges(prompts, outputs, mask):
    got = sft.collate(prompts, outputs, pad_id=0)
    assert got["response_mask"].int().tolist() == mask
    for row, (p, o) in enumerate(zip(prompts, outputs)):
        assert got["input_ids"][row, : len(p + o)].tolist() == (p + o)[: got["input_ids"].shape[1]]


@pytest.mark.parametrize("prompts, outputs", [([[1]], []), ([], []), ([[1]], [[]])])
def test_collate_refuses(prompts, outputs):
    with pytest.raises(ValueError):
        sft.collate(prompts, outputs, pad_id=0)


def test_one_string_is_not_a_list_of_strings(tokenizer):
    with pytest.raises(ValueError, match="lists of strings"):
        sft.tokenize_prompt_and_output("abc", ["abc"], tokenizer)


def test_tokenizer_without_end_of_text():
    with pytest.raises(ValueError, match="end-of-text"):
        sft.end_of_text_id(bpe.Tokenizer({i: bytes([i]) for i in range(256)}, []))


def test_entropy_against_scipy():
    logits = torch.tensor(ANSWERS["entropy"]["logits"], dtype=torch.float64)
    torch.testing.assert_close(
        sft.compute_entropy(logits), torch.tensor(ANSWERS["entropy"]["entropy"], dtype=torch.float64), **EXACT
    )
    assert sft.compute_entropy(torch.tensor([[0.0, -math.inf, 0.0]])).item() == pytest.approx(math.log(2))
    assert sft.compute_entropy(torch.zeros(3, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("function", [sft.get_response_log_probs, sft.get_response_log_probs_chunked])
def test_log_probs_and_entropy_of_a_model(policy, function):
    b = batch()
    got = function(policy, b["input_ids"], b["labels"], return_token_entropy=True)
    for key in ("log_probs", "token_entropy"):
        torch.testing.assert_close(got[key], torch.tensor(ANSWERS[key], dtype=torch.float64), rtol=0, atol=1e-5)
    assert not got["token_entropy"].requires_grad
    assert "token_entropy" not in function(policy, b["input_ids"], b["labels"])


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_chunked_log_probs_have_the_same_gradient(policy, chunk_tokens):
    b, gradients = batch(), []
    for chunked in (False, True):
        policy.zero_grad()
        got = (
            sft.get_response_log_probs_chunked(
                policy, b["input_ids"], b["labels"], True, b["response_mask"], chunk_tokens
            )
            if chunked
            else sft.get_response_log_probs(policy, b["input_ids"], b["labels"], True)
        )
        for key in got:
            got[key] = got[key].masked_fill(~b["response_mask"], 0)
        (got["log_probs"] * torch.arange(got["log_probs"].shape[1])).sum().backward()
        gradients.append([got["log_probs"].detach(), got["token_entropy"]] + [p.grad for p in policy.parameters()])
    for plain, fast in zip(*gradients):
        torch.testing.assert_close(fast, plain, **EXACT)


def test_chunked_log_probs_of_nothing(policy):
    b = batch()
    got = sft.get_response_log_probs_chunked(
        policy, b["input_ids"], b["labels"], True, torch.zeros_like(b["response_mask"])
    )
    assert got["log_probs"].abs().sum() == 0 and got["token_entropy"].abs().sum() == 0


def test_chunked_never_holds_all_logits(policy):
    sizes = []
    policy.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    b = batch()
    sft.get_response_log_probs_chunked(
        policy, b["input_ids"], b["labels"], response_mask=b["response_mask"], chunk_tokens=4
    )
    assert max(sizes) == 4 and sum(sizes) == b["response_mask"].sum()


def test_masked_normalize():
    x, m = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert sft.masked_normalize(x, m, normalize_constant=2).item() == 1.5
    assert sft.masked_normalize(x, m, dim=-1, normalize_constant=4.0).tolist() == [0.75, 0.0]
    assert sft.masked_normalize(x, m, dim=0).tolist() == [1.0, 2.0, 0.0]


def test_sft_step_known_answer():
    known = ANSWERS["sft"]
    log_probs = torch.tensor(ANSWERS["log_probs"], dtype=torch.float64, requires_grad=True)
    loss, metadata = sft.sft_microbatch_train_step(
        log_probs, batch()["response_mask"], known["gradient_accumulation_steps"], known["normalize_constant"]
    )
    torch.testing.assert_close(loss, torch.tensor(known["loss"], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(log_probs.grad, torch.tensor(known["gradient"], dtype=torch.float64), **EXACT)
    assert not loss.requires_grad and metadata["response_tokens"] == batch()["response_mask"].sum()


# -------------------------------------------------------------------------------- packing


def test_packed_dataset_known_answer(tokenizer):
    known = ANSWERS["packed"]
    dataset = sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", known["seq_length"], shuffle=False)
    assert len(dataset) == len(known["chunks"])
    for item, (inputs, labels) in zip((dataset[i] for i in range(len(dataset))), known["chunks"]):
        assert item["input_ids"].tolist() == inputs and item["labels"].tolist() == labels
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_packed_dataset_shuffles_documents_not_tokens(tokenizer):
    made = [
        sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", 16, shuffle=True, seed=s).tokens.tolist()
        for s in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]
    eos = tokenizer.special_tokens["<|endoftext|>"]

    def documents(ids):
        return sorted(tuple(map(int, d.split())) for d in " ".join(map(str, ids)).split(str(eos)) if d.strip())

    assert eos == 0 or documents(made[0]) == documents(made[2])
    assert sorted(made[0]) == sorted(made[2])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_iterate_batches(tokenizer, batch_size):
    dataset = sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", 32, shuffle=False)
    batches = list(sft.iterate_batches(dataset, batch_size, shuffle=False))
    assert len(batches) == len(sft.iterate_batches(dataset, batch_size, False)) == math.ceil(len(dataset) / batch_size)
    assert torch.cat([b["labels"] for b in batches]).tolist() == [labels for _, labels in ANSWERS["packed"]["chunks"]]
    shuffled = torch.cat([b["labels"] for b in sft.iterate_batches(dataset, batch_size, shuffle=True, seed=3)]).tolist()
    assert sorted(shuffled) == sorted(labels for _, labels in ANSWERS["packed"]["chunks"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no examples"),
        ("{}\n", "prompt"),
        ('{"prompt": "a", "response": 3}\n', "prompt"),
        ("[1]\n", "JSON object"),
        ('{"prompt": "a", "response": "b"}\n{"prompt"\n', "line 2"),
        ('{"prompt": "a", "response": "b"}', "too few"),
    ],
)
def test_packed_dataset_bad_files(tokenizer, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        sft.PackedDataset(tokenizer, tmp_path / "bad.jsonl", 1000, shuffle=False)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        sft.read_json_lines(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="line 1"):
        sft.read_json_lines(tmp_path / "binary")
    (tmp_path / "not.gz").write_bytes(b"abc")
    with pytest.raises(ValueError, match="cannot read"):
        sft.read_json_lines(tmp_path / "not.gz")


# -------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    "text, number",
    [
        ("Natalia sold 48/2 = 24 clips in May, and so 72 clips altogether.", "72"),
        ("She has $1,234.50.", "1234.50"),
        ("10-3=7", "7"),
        ("It is -5", "-5"),
        ("10-5", "5"),
        ("(x)-4", "4"),
        ("1,2,3", "3"),
        ("12,345,678 in all", "12345678"),
        ("0.5", "0.5"),
        ("costs .75", ".75"),
        ("5.", "5"),
        ("#### 42", "42"),
        ("none", None),
        ("", None),
        ("1 or 2 or many", "2"),
    ],
)
def test_parse_gsm8k_response(text, number):
    assert sft.parse_gsm8k_response(text) == number


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The correct answer is B. There is only one.", "B"),
        ("The correct answer is 10000 polymerases.", None),
        ("B", "B"),
        ("The answer is: (C)", "C"),
        ("the correct answer is \"D\"", "D"),
        ("B. Because", "B"),
        ("(A) Because", "A"),
        ("A", "A"),
        ("A virus has none.", None),
        ("The answer is A virus.", None),
        ("Answer: D", "D"),
        ("I choose option C.", "C"),
        ("It is (B) as stated", "B"),
        ("The answer is B. No, the answer is C.", "C"),
        ("The answer is E.", None),
        ("", None),
        ("Bob", None),
        ("the correct answer is b", None),
        ("The answer is D'Artagnan", None),
    ],
)
def test_parse_mmlu_response(text, letter):
    example = {"subject": "virology", "question": "?", "options": ["1", "2", "3", "4"], "answer": "A"}
    assert sft.parse_mmlu_response(example, text) == letter


# -------------------------------------------------------------------------------- DPO


def test_dpo_loss_known_answer(policy, reference, tokenizer):
    known = ANSWERS["dpo"]
    for (prompt, chosen, rejected), expected in zip(known["pairs"], known["losses"]):
        loss = sft.dpo_loss(policy, reference, tokenizer, known["beta"], prompt, chosen, rejected)
        assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-5)
    together = sft.dpo_loss(policy, reference, tokenizer, known["beta"], *map(list, zip(*known["pairs"])))
    assert together.item() == pytest.approx(sum(known["losses"]) / len(known["losses"]), abs=1e-5)
    margins = sft.preference_margin(policy, tokenizer, *map(list, zip(*known["pairs"])))
    torch.testing.assert_close(
        margins.detach(), torch.tensor(known["policy_margins"], dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_dpo_trains_the_policy_alone(policy, reference, tokenizer):
    assert sft.dpo_loss(policy, policy, tokenizer, 0.3, "a", "b", "c").item() == pytest.approx(math.log(2), abs=1e-12)
    sft.dpo_loss(policy, reference, tokenizer, 0.5, "What is up?", "The sky.", "Go away.").backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    assert all(p.grad is None for p in reference.parameters())


def test_dpo_counts_must_match(policy, reference, tokenizer):
    with pytest.raises(ValueError, match="as many prompts"):
        sft.dpo_loss(policy, reference, tokenizer, 0.1, ["a", "b"], ["c"], ["d"])


def test_read_hh_pairs(tmp_path):
    one = {"chosen": "\n\nHuman: Hi\nthere\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\nthere\n\nAssistant: No."}
    two = {side: text + "\n\nHuman: More\n\nAssistant: Fine." for side, text in one.items()}
    other = one | {"rejected": "\n\nHuman: Bye\n\nAssistant: No."}
    plain = {"prompt": "p", "chosen": "c", "rejected": "r", "extra": 1}
    (tmp_path / "hh.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in (one, two, other, one | {"rejected": one["chosen"]}, plain))
    )
    assert sft.read_hh_pairs(tmp_path / "hh.jsonl") == [
        {"prompt": "Hi\nthere", "chosen": "Hello.", "rejected": "No."},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
    ]
    (tmp_path / "none.jsonl").write_text(json.dumps(two) + "\n")
    with pytest.raises(ValueError, match="no single-turn pair"):
        sft.read_hh_pairs(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"chosen": "x"}\n')
    with pytest.raises(ValueError, match="rejected"):
        sft.read_hh_pairs(tmp_path / "bad.jsonl")


# -------------------------------------------------------------------------------- the embedded task


def test_arithmetic_problems_are_right_and_apart():
    train, held_out = sft.arithmetic_problems(3000, seed=1), sft.arithmetic_problems(500, seed=1, held_out=True)
    assert train[:100] == sft.arithmetic_problems(100, seed=1) and train[:100] != sft.arithmetic_problems(100, seed=2)
    assert not {p["work"] for p in train} & {p["work"] for p in held_out}
    for p in train + held_out:
        for step in p["work"].split(", "):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert p["answer"] == right and 2 <= p["work"].count("=") <= 4 and 0 <= int(right) <= 99
        if p["question"].startswith("What is "):
            assert eval(p["question"][8:-1]) == int(p["answer"]), p


# -------------------------------------------------------------------------------- problems and answers


def test_read_problems_of_every_form(tmp_path):
    import grpo

    rows = [
        {"prompt": "p", "answer": "1", "response": "r"},
        {"question": "Q?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,072"},
        {"problem": "P?", "solution": r"So \boxed{\frac{1}{2}}."},
        {"problem": "P?", "solution": "s", "answer": "7"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = sft.read_problems(tmp_path / "p.jsonl", "<{question}>", grpo.balanced_box)
    assert [p["prompt"] for p in got] == ["p", "<Q?>", "<P?>", "<P?>"]
    assert [p["answer"] for p in got] == ["1", "1,072", r"\frac{1}{2}", "7"]
    assert got[1]["response"] == " 48/2 = 24 clips.</think> <answer>1,072</answer>"
    for bad in ({"problem": "P?", "solution": "no box"}, {"question": "Q?"}, {"x": 1}):
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match="example 1"):
            sft.read_problems(tmp_path / "bad.jsonl", "{question}", grpo.balanced_box)


def test_read_mmlu(tmp_path):
    (tmp_path / "high_school_law_dev.csv").write_text('"Who, then?",me,you,"he, she",they,C\n')
    (problem,) = sft.read_mmlu(tmp_path)
    assert problem["answer"] == "C" and problem["options"] == ["me", "you", "he, she", "they"]
    assert "about high school law." in problem["prompt"] and "C. he, she\n" in problem["prompt"]
    (tmp_path / "bad.csv").write_text("a,b,c\n")
    with pytest.raises(ValueError, match="bad.csv"):
        sft.read_mmlu(tmp_path)


@pytest.mark.parametrize(
    "reward, response, truth, expected",
    [
        (sft.gsm8k_reward, "so 1,072 clips", "1072", (1, 1)),
        (sft.gsm8k_reward, "so 1072.0", "1,072", (1, 1)),
        (sft.gsm8k_reward, "so 5", "1072", (1, 0)),
        (sft.gsm8k_reward, "so many", "1072", (0, 0)),
        (sft.mmlu_reward, "The answer is B.", "B", (1, 1)),
        (sft.mmlu_reward, "The answer is B.", "C", (1, 0)),
        (sft.mmlu_reward, "Who knows", "C", (0, 0)),
    ],
)
def test_parsed_rewards(reward, response, truth, expected):
    got = reward(response, truth)
    assert (got["format_reward"], got["answer_reward"]) == expected and got["reward"] == expected[1]


class FakeEngine:
    """Answers the i-th prompt with the i-th text."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, texts

    def generate(self, prompts, **settings):
        from types import SimpleNamespace

        return [
            SimpleNamespace(text=t, ids=self.tokenizer.encode(t), prompt_ids=p) for p, t in zip(prompts, self.texts)
        ]


def test_log_generations(policy, tokenizer, tmp_path):
    import grpo

    texts = [
        "a</think> <answer>4</answer>",
        "</think> <answer>5</answer>",
        "no idea at all",
        "</think> <answer>4</answer>",
    ]
    problems, lines = [{"prompt": f"p{i}", "answer": "4"} for i in range(4)], []
    got = sft.log_generations(
        FakeEngine(tokenizer, texts),
        tokenizer,
        problems,
        grpo.r1_zero_reward,
        model=policy,
        path=str(tmp_path / "x" / "log.jsonl"),
        show=1,
        log=lines.append,
    )
    lengths = [len(tokenizer.encode(t)) for t in texts]
    assert (
        (got["count_11"], got["count_10"], got["count_00"]) == (2, 1, 1)
        and got["accuracy"] == 0.5
        and got["format"] == 0.75
    )
    assert got["length"] == sum(lengths) / 4 and got["length_right"] == (lengths[0] + lengths[3]) / 2
    assert got["length_wrong"] == (lengths[1] + lengths[2]) / 2 and len(lines) == 3
    rows = [json.loads(line) for line in (tmp_path / "x" / "log.jsonl").read_text().splitlines()]
    assert [r["reward"] for r in rows] == [1, 0, 0, 1] and rows[2]["response"] == texts[2] and rows[0]["truth"] == "4"
    batch = sft.tokenize_prompt_and_output(["p1"], [texts[1]], tokenizer)
    entropy = sft.get_response_log_probs(policy, batch["input_ids"], batch["labels"], True)["token_entropy"][
        batch["response_mask"]
    ]
    assert rows[1]["entropy"] == pytest.approx(entropy.mean().item(), abs=1e-9)


# -------------------------------------------------------------------------------- the loop

CONSTANT = dict(schedule=lambda step, total: 0.1, clip=torch.nn.utils.clip_grad_norm_, log=lambda line: None)
EXAMPLES = [{"prompt": f"{i} + {i} =", "response": f" {2 * i}<|endoftext|>"} for i in range(7)]


def tuned(model, micro_step, examples, optimizer=None, **options):
    result = sft.fine_tune(
        model,
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        examples,
        micro_step,
        **CONSTANT | dict(epochs=2, batch_size=3) | options,
    )
    return torch.cat([p.detach().flatten() for p in model.parameters()]), result


def load(name):
    return model_py.load_hf(TINY / name).double()


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo"])
def test_micro_batches_do_not_change_the_result(tokenizer, kind):
    results = []
    for size in (1, 2, 3, 100):
        lm = load("policy")
        if kind == "sft":
            step, examples = partial(sft.sft_micro_step, lm, tokenizer, 4.0), EXAMPLES
        elif kind == "packed":
            step = partial(sft.packed_micro_step, lm)
            dataset = sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", 32, shuffle=True)
            examples = [dataset[i] for i in range(len(dataset))]
        else:
            step = partial(sft.dpo_micro_step, lm, load("reference"), tokenizer, 0.1)
            examples = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in ANSWERS["dpo"]["pairs"]]
        results.append(tuned(lm, step, examples, micro_batch_size=size))
    for weights, result in results[1:]:
        torch.testing.assert_close(weights, results[0][0], **EXACT)
        assert result["loss"] == pytest.approx(results[0][1]["loss"], abs=1e-10)


def test_sft_learns_the_responses_alone(tokenizer):
    lm = load("policy")
    batch = sft.tokenize_prompt_and_output(
        [e["prompt"] for e in EXAMPLES], [e["response"] for e in EXAMPLES], tokenizer
    )

    def nats(mask):
        with torch.no_grad():
            return -sft.get_response_log_probs(lm, batch["input_ids"], batch["labels"])["log_probs"][mask].mean().item()

    before = nats(batch["response_mask"])
    step = partial(sft.sft_micro_step, lm, tokenizer, 4.0)
    tuned(lm, step, EXAMPLES, torch.optim.AdamW(lm.parameters(), lr=0.02), epochs=10)
    assert nats(batch["response_mask"]) < 0.5 * before


def test_dpo_loop_keeps_the_best(tokenizer):
    lm, reference = load("policy"), load("reference")
    pairs = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in ANSWERS["dpo"]["pairs"]]
    before = sft.preference_accuracy(lm, tokenizer, pairs)
    seen = []

    def evaluate():
        seen.append(
            (
                sft.preference_accuracy(lm, tokenizer, pairs),
                torch.cat([p.detach().flatten().clone() for p in lm.parameters()]),
            )
        )
        return {"accuracy": [0.1, 0.9, 0.5][len(seen) - 1]}  # the second is said to be the best

    result = sft.fine_tune(
        lm,
        torch.optim.RMSprop(lm.parameters(), lr=0.01),
        pairs,
        partial(sft.dpo_micro_step, lm, reference, tokenizer, 0.1),
        epochs=3,
        batch_size=3,
        eval_every=1,
        keep_best="accuracy",
        evaluate=evaluate,
        **CONSTANT | dict(schedule=lambda step, total: 0.02),
    )
    assert result["accuracy"] == 0.9 and len(seen) == 3
    assert torch.equal(torch.cat([p.detach().flatten() for p in lm.parameters()]), seen[1][1])
    assert before < seen[-1][0]  # the policy has come to prefer the chosen ones


def test_every_epoch_sees_every_example_in_an_order_of_its_own():
    seen, weight = [], torch.nn.Linear(1, 1)

    def step(examples, accumulation_steps):
        seen.extend(examples)
        return weight.weight.sum()

    tuned(weight, step, list(range(12)), epochs=2)
    first, second = seen[:12], seen[12:]
    assert sorted(first) == sorted(second) == list(range(12)) and first != second != sorted(second)


def test_speed_counts_the_examples_there_are(tokenizer, monkeypatch):
    ticks, lines, lm = iter((0.0, 2.0)), [], load("policy")
    monkeypatch.setattr(sft.time, "perf_counter", lambda: next(ticks))
    step = partial(sft.sft_micro_step, lm, tokenizer, 4.0)
    tuned(lm, step, EXAMPLES[:6], batch_size=100, epochs=1, log=lines.append)
    assert len(lines) == 1 and "| 3 examples/s" in lines[0]


def test_fine_tune_stops_at_a_loss_that_is_not_finite(tokenizer):
    lm = load("policy")
    with pytest.raises(ValueError, match="lower the learning rate"):
        tuned(lm, lambda examples, steps: math.nan, EXAMPLES)


# -------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """The tiny policy as a folder with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model_py.save_hf(model_py.load_hf(TINY / "policy"), path, tokenizer)
    return path


def run(capsys, *argv):
    code = sft.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("task", ["reasoning", "boxed", "gsm8k", "mmlu", "alpaca-eval", "safety"])
def test_eval_writes_every_benchmark_in_its_form(folder, tmp_path, capsys, task):
    data, out = tmp_path / ("d.csv" if task in ("mmlu", "safety") else "d.json"), tmp_path / "out" / "answers"
    data.write_text(
        {
            "mmlu": "Q,a,b,c,d,B\n",
            "safety": "id,prompts_final\n1,Be kind?\n",
            "alpaca-eval": json.dumps(
                [{"instruction": "Hi", "dataset": "x", "output": "reference", "generator": "another"}]
            ),
        }.get(task, json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    )
    code, text, _ = run(
        capsys, "eval", "--task", task, "--model", folder, "--data", data, "--out", out, "--max-tokens", 5
    )
    assert code == 0 and "engine: torch" in text
    result = json.loads(text.strip().splitlines()[-1].removeprefix("RESULT "))
    if task == "alpaca-eval":
        (row,) = json.loads(out.read_text())
        assert sorted(row) == ["dataset", "generator", "instruction", "output"]
        assert row["generator"] == str(folder) and row["dataset"] == "x" and row["output"] != "reference"
    elif task == "safety":
        assert json.loads(out.read_text())["prompts_final"] == "Be kind?" and "output" in json.loads(out.read_text())
    else:
        assert (
            result["count_11"] + result["count_10"] + result["count_00"] == 1 and len(out.read_text().splitlines()) == 1
        )


def test_end_of_text_is_no_part_of_an_answer_handed_in(folder, tokenizer, tmp_path, capsys, monkeypatch):
    import grpo

    engine = FakeEngine(tokenizer, ["Both.<|endoftext|>", "cut"])
    monkeypatch.setattr(grpo, "open_engine", lambda *given: engine)
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Hi"}, {"instruction": "Ho"}]))
    (tmp_path / "s.csv").write_text("id,prompts_final\n1,Hi\n2,Ho\n")
    for task, name in (("alpaca-eval", "a.json"), ("safety", "s.csv")):
        code, _, err = run(
            capsys, "eval", "--task", task, "--model", folder, "--data", tmp_path / name, "--out", tmp_path / "o"
        )
        assert code == 0, err
        text = (tmp_path / "o").read_text()
        rows = json.loads(text) if task == "alpaca-eval" else [json.loads(line) for line in text.splitlines()]
        assert [row["output"] for row in rows] == ["Both.", "cut"]


def test_eval_of_a_prompt_longer_than_the_context(folder, tmp_path, capsys):
    context = model_py.load_hf(folder).config.context_length
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "1+1? " * context, "answer": "#### 2"}) + "\n")
    code, text, err = run(
        capsys, "eval", "--model", folder, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "o", "--max-tokens", 5
    )
    assert code == 0, err
    (row,) = map(json.loads, (tmp_path / "o").read_text().splitlines())
    assert row["entropy"] > 0 and row["length"] <= 5 and len(row["prompt"]) > 5 * context  # logged whole, read cut


def test_defaults_of_a_real_model_and_of_the_embedded_one(folder, tokenizer, tmp_path, capsys, monkeypatch):
    """A model that is given is asked greedily, for long answers, and tuned a hundred times more gently."""
    import shutil

    import grpo
    import optim

    seen, rates = [], []

    class Engine(FakeEngine):
        def generate(self, prompts, **settings):
            seen.append((settings["temperature"], settings["max_tokens"]))
            return super().generate(prompts, **settings)

        def sync(self, model):
            pass

    monkeypatch.setattr(grpo, "open_engine", lambda *given: Engine(tokenizer, ["a", "b"]))
    monkeypatch.setattr(optim, "cosine_lr", lambda step, lr, *rest: rates.append(lr) or lr)
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sft"):
        shutil.copytree(folder, f"out/arithmetic-0/{name}")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"so #### {i}"}) + "\n" for i in range(2)))
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Hi"}, {"instruction": "Ho"}]))
    real = ["--model", folder]
    for argv in ([], real, [*real, "--temperature", 0.5, "--max-tokens", 7]):
        assert run(capsys, "eval", "--data", data, *argv)[0] == 0
    assert seen == [(1.0, 64), (0.0, 512), (0.5, 7)] and (tmp_path / "out" / "eval-reasoning.jsonl").exists()
    assert run(capsys, "eval", "--task", "alpaca-eval", "--data", tmp_path / "a.json", *real)[0] == 0
    assert len(json.loads((tmp_path / "out" / "eval-alpaca-eval.json").read_text())) == 2  # one JSON list, not lines
    seen.clear()
    for argv in ([], real, [*real, "--lr", 0.01]):
        argv = ["--data", data, "--valid", data, "--epochs", 1, "--out", tmp_path / "t", *argv]
        assert run(capsys, "sft", *argv)[0] == 0
    assert seen == [(1.0, 64), (0.0, 64)] + [(1.0, 512), (0.0, 512)] * 2  # sampled, then greedy
    assert rates == [1e-3, 1e-5, 0.01]


@pytest.mark.parametrize(
    "action, rows",
    [
        ("sft", EXAMPLES),
        ("instruct", [{"prompt": "Name a colour.", "response": "Blue."}] * 40),
        ("dpo", [{"prompt": "p", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]),
    ],
)
def test_tuning_from_files_writes_a_folder(folder, tmp_path, capsys, action, rows):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text, err = run(
        capsys,
        action,
        "--model",
        folder,
        "--data",
        tmp_path / "data.jsonl",
        "--out",
        tmp_path / "out",
        "--batch-size",
        4,
        "--epochs",
        1,
        "--lr",
        "1e-3",
        "--dtype",
        "bfloat16",
    )
    assert code == 0, err
    assert "RESULT" in text and model_py.load_hf(tmp_path / "out").config == model_py.load_hf(folder).config
    assert bpe.Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").encode("a b") == bpe.Tokenizer.from_file(
        folder / "tokenizer.json"
    ).encode("a b")


def long_rows(action, tokenizer, context):
    """Ten examples: one a token longer than the context takes, one that just fits, and short ones."""
    word = " a"
    assert len(tokenizer.encode(word * 9)) == 9

    def row(words):
        if action == "sft":  # of the last token nothing is predicted: it need not be read
            return {"prompt": "p", "response": word * (words + 1 - len(tokenizer.encode("p")))}
        pair = {"prompt": "p", "chosen": word, "rejected": word + " b"}
        frame = len(sft.alpaca_ids(tokenizer, "p", "")) - 1  # the end-of-text token is predicted alone
        return pair | {("chosen", "rejected")[words % 2]: word * (words - frame)}

    return [row(n) for n in (context, context + 1, *range(context - 8, context))]


@pytest.mark.parametrize("action", ["sft", "dpo"])
def test_examples_longer_than_the_context_are_named_before_anything_is_trained(folder, tmp_path, capsys, action):
    tokenizer = bpe.Tokenizer.from_file(folder / "tokenizer.json")
    context = model_py.load_hf(folder).config.context_length
    rows, data = long_rows(action, tokenizer, context), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [action, "--model", folder, "--data", data, "--out", tmp_path / "out", "--batch-size", 4]
    code, text, err = run(capsys, *argv)
    assert code == 2 and err.count("\n") == 1 and "step" not in text and not (tmp_path / "out").exists()
    assert f"1 of 10 examples, longer than the {context} tokens the context takes: the longest has {context + 1}" in err
    assert "--drop-long" in err
    code, text, err = run(capsys, *argv, "--drop-long")
    assert code == 0 and "left out 1 of 10 examples" in text and (tmp_path / "out" / "config.json").exists(), err
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[1:2] * 3))  # dropping all of them is no training
    code, text, err = run(capsys, *argv, "--drop-long")
    assert code == 2 and "3 of 3 examples" in err and "step" not in text


@pytest.mark.parametrize(
    "action, rows, message",
    [
        ("sft", [{"prompt": "p", "answer": "4"}], "without a response"),
        ("sft", [{"prompt": "p", "response": 4}], "without a response"),
        ("sft", [{"prompt": "p", "response": ""}], "without a response"),
        ("dpo", [{"prompt": "p", "chosen": "c", "rejected": "r"}], "no examples are left"),  # the one pair is held out
    ],
)
def test_data_with_nothing_to_learn(folder, tmp_path, capsys, action, rows, message):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text, err = run(
        capsys, action, "--model", folder, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out"
    )
    assert code == 2 and err.count("\n") == 1 and message in err and "step" not in text, (text, err)


@pytest.mark.parametrize("kind", ["file", "below a file", "shards", "read-only"])
def test_a_folder_that_cannot_take_the_model_is_said_before_the_training(folder, tmp_path, capsys, monkeypatch, kind):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "model-00001-of-00002.safetensors").write_bytes(b"kept")
    if kind == "read-only":  # root may write anywhere, so the system's answer is played
        monkeypatch.setattr(sft.os, "access", lambda path, mode: Path(path) != tmp_path)
    out = tmp_path / {"below a file": "file/out"}.get(kind, kind)
    code, text, err = run(capsys, "sft", "--model", folder, "--data", tmp_path / "d.jsonl", "--out", out)
    assert code == 2 and err.count("\n") == 1 and "cannot be written" in err and "step" not in text, (text, err)
    assert (tmp_path / "file").read_text() == "kept"
    if kind != "file":  # eval's answers go to a file, which may be there already
        code, text, err = run(capsys, "eval", "--model", folder, "--data", tmp_path / "d.jsonl", "--out", out)
        assert code == 2 and err.count("\n") == 1 and "cannot be written" in err and "engine" not in text, (text, err)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("sft", "--model", "/nowhere"), "/nowhere"),
        (("eval", "--model", "MODEL", "--data", "/none.jsonl"), "/none.jsonl"),
        (("eval", "--model", "MODEL", "--data", "/none.csv", "--task", "mmlu"), "/none.csv"),
        (
            ("eval", "--model", "MODEL", "--data", __file__, "--task", "alpaca-eval"),
            "expected a list of entries with 'instruction'",
        ),
        (
            ("eval", "--model", "MODEL", "--data", __file__, "--task", "safety"),
            "expected a list of entries with 'prompts_final'",
        ),
        (("sft", "--epochs", "-1"), "--epochs must be above 0"),
        (("eval", "--max-tokens", "0", "--lr", "nan"), "--max-tokens and --lr must be above 0"),
        (("dpo", "--model", "MODEL", "--data", __file__), "expected a JSON object"),
    ],
)
def test_command_line_says_one_line(folder, capsys, argv, message):
    code, _, err = run(capsys, *(folder if a == "MODEL" else a for a in argv))
    assert code == 2 and err.startswith("sft.py: ") and message in err and err.count("\n") == 1


def test_written_task_is_whole_and_apart(tmp_path, tokenizer):
    sft.write_arithmetic(str(tmp_path), 3, "x = 1\n" * 100, count=300, demonstrations=100)
    demonstrations = sft.read_problems(tmp_path / "sft.jsonl")
    import grpo

    assert all(
        grpo.r1_zero_reward(p["response"], p["answer"])["reward"] == 1 for p in demonstrations
    )  # all right, if quick
    assert 40 < sum("I know this" in p["response"] for p in demonstrations) < 80
    train, valid = ({p["prompt"] for p in sft.read_problems(tmp_path / f"{n}.jsonl")} for n in ("train", "valid"))
    assert not train & valid and len(sft.read_hh_pairs(tmp_path / "pairs.jsonl")) == 100
    sft.PackedDataset(tokenizer, tmp_path / "instructions.jsonl", 64, shuffle=False)


def test_self_check():
    assert sft.self_check() < 1e-6
