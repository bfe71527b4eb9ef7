"""sft.py against transformers, tokenizers and scipy (tests/fixtures/sft_*), its edges, bad input, and its loops."""
import json
import math
import random
from pathlib import Path

import pytest
import torch

import bpe
import model as model_py
import sft

FIXTURES = Path(__file__).parent / "fixtures"
ANSWERS = json.loads((FIXTURES / "sft_answers.json").read_text())
TINY = FIXTURES / "sft_tiny"
# In float64 only the order of sums differs, over at most 300 tokens of a few nats: 1e-10. The models' own tables (RoPE's
# cosines) are float32, worth 1e-5 on a sum of 100 log-probs. A mean for a sum, or a missing end of text, is off by over 1.
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


# ---------------------------------------------------------------------------------------------------- the tensors

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
    log_probs = sft.get_response_log_probs(lambda ids: HuggingFaceOutput(logits), got["input_ids"], got["labels"])["log_probs"]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, got["labels"][..., None])[..., 0])


@pytest.mark.parametrize("prompts, outputs, mask", [
    ([[]], [[5, 6, 7]], [[1, 1]]),                 # no prompt: the first token is nobody's label
    ([[5, 6, 7]], [[]], [[0, 0]]),                 # no output
    ([[5], [5, 6]], [[7, 8, 9], [7]], [[1, 1, 1], [0, 1, 0]])])
def test_collate_edges(prompts, outputs, mask):
    got = sft.collate(prompts, outputs, pad_id=0)
    assert got["response_mask"].int().tolist() == mask
    for row, (p, o) in enumerate(zip(prompts, outputs)):
        assert got["input_ids"][row, :len(p + o)].tolist() == (p + o)[:got["input_ids"].shape[1]]


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
    torch.testing.assert_close(sft.compute_entropy(logits), torch.tensor(ANSWERS["entropy"]["entropy"], dtype=torch.float64), **EXACT)
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
        got = (sft.get_response_log_probs_chunked(policy, b["input_ids"], b["labels"], True, b["response_mask"], chunk_tokens)
               if chunked else sft.get_response_log_probs(policy, b["input_ids"], b["labels"], True))
        for key in got:
            got[key] = got[key].masked_fill(~b["response_mask"], 0)
        (got["log_probs"] * torch.arange(got["log_probs"].shape[1])).sum().backward()
        gradients.append([got["log_probs"].detach(), got["token_entropy"]] + [p.grad for p in policy.parameters()])
    for plain, fast in zip(*gradients):
        torch.testing.assert_close(fast, plain, **EXACT)


def test_chunked_log_probs_of_nothing(policy):
    b = batch()
    got = sft.get_response_log_probs_chunked(policy, b["input_ids"], b["labels"], True, torch.zeros_like(b["response_mask"]))
    assert got["log_probs"].abs().sum() == 0 and got["token_entropy"].abs().sum() == 0


def test_chunked_never_holds_all_logits(policy):
    sizes = []
    policy.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    b = batch()
    sft.get_response_log_probs_chunked(policy, b["input_ids"], b["labels"], response_mask=b["response_mask"], chunk_tokens=4)
    assert max(sizes) == 4 and sum(sizes) == b["response_mask"].sum()


def test_masked_normalize():
    x, m = torch.tensor([[1.0, 2.0, math.nan], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert sft.masked_normalize(x, m, normalize_constant=2).item() == 1.5
    assert sft.masked_normalize(x, m, dim=-1, normalize_constant=4.0).tolist() == [0.75, 0.0]
    assert sft.masked_normalize(x, m, dim=0).tolist() == [1.0, 2.0, 0.0]


def test_sft_step_known_answer():
    known = ANSWERS["sft"]
    log_probs = torch.tensor(ANSWERS["log_probs"], dtype=torch.float64, requires_grad=True)
    loss, metadata = sft.sft_microbatch_train_step(log_probs, batch()["response_mask"], known["gradient_accumulation_steps"],
                                                   known["normalize_constant"])
    torch.testing.assert_close(loss, torch.tensor(known["loss"], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(log_probs.grad, torch.tensor(known["gradient"], dtype=torch.float64), **EXACT)
    assert not loss.requires_grad and metadata["response_tokens"] == batch()["response_mask"].sum()


# ---------------------------------------------------------------------------------------------------- packing

def test_packed_dataset_known_answer(tokenizer):
    known = ANSWERS["packed"]
    dataset = sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", known["seq_length"], shuffle=False)
    assert len(dataset) == len(known["chunks"])
    for item, (inputs, labels) in zip((dataset[i] for i in range(len(dataset))), known["chunks"]):
        assert item["input_ids"].tolist() == inputs and item["labels"].tolist() == labels
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_packed_dataset_shuffles_documents_not_tokens(tokenizer):
    made = [sft.PackedDataset(tokenizer, TINY / "instructions.jsonl", 16, shuffle=True, seed=s).tokens.tolist() for s in (0, 0, 1)]
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


@pytest.mark.parametrize("content, message", [
    ("", "no examples"), ("{}\n", "prompt"), ('{"prompt": "a", "response": 3}\n', "prompt"), ("[1]\n", "JSON object"),
    ('{"prompt": "a", "response": "b"}\n{"prompt"\n', "line 2"), ('{"prompt": "a", "response": "b"}', "too few")])
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


# ---------------------------------------------------------------------------------------------------- parsing

@pytest.mark.parametrize("text, number", [
    ("Natalia sold 48/2 = 24 clips in May, and so 72 clips altogether.", "72"), ("She has $1,234.50.", "1234.50"),
    ("10-3=7", "7"), ("It is -5", "-5"), ("10-5", "5"), ("(x)-4", "4"), ("1,2,3", "3"), ("12,345,678 in all", "12345678"),
    ("0.5", "0.5"), ("costs .75", ".75"), ("5.", "5"), ("#### 42", "42"), ("none", None), ("", None), ("1 or 2 or many", "2")])
def test_parse_gsm8k_response(text, number):
    assert sft.parse_gsm8k_response(text) == number


@pytest.mark.parametrize("text, letter", [
    ("The correct answer is B. There is only one.", "B"), ("The correct answer is 10000 polymerases.", None), ("B", "B"),
    ("The answer is: (C)", "C"), ("the correct answer is \"D\"", "D"), ("B. Because", "B"), ("(A) Because", "A"), ("A", "A"),
    ("A virus has none.", None), ("The answer is A virus.", None), ("Answer: D", "D"), ("I choose option C.", "C"),
    ("It is (B) as stated", "B"), ("The answer is B. No, the answer is C.", "C"), ("The answer is E.", None), ("", None),
    ("Bob", None), ("the correct answer is b", None), ("The answer is D'Artagnan", None)])
def test_parse_mmlu_response(text, letter):
    example = {"subject": "virology", "question": "?", "options": ["1", "2", "3", "4"], "answer": "A"}
    assert sft.parse_mmlu_response(example, text) == letter


# ---------------------------------------------------------------------------------------------------- DPO

def test_dpo_loss_known_answer(policy, reference, tokenizer):
    known = ANSWERS["dpo"]
    for (prompt, chosen, rejected), expected in zip(known["pairs"], known["losses"]):
        loss = sft.dpo_loss(policy, reference, tokenizer, known["beta"], prompt, chosen, rejected)
        assert loss.shape == () and loss.item() == pytest.approx(expected, abs=1e-5)
    together = sft.dpo_loss(policy, reference, tokenizer, known["beta"], *map(list, zip(*known["pairs"])))
    assert together.item() == pytest.approx(sum(known["losses"]) / len(known["losses"]), abs=1e-5)
    margins = sft.preference_margin(policy, tokenizer, *map(list, zip(*known["pairs"])))
    torch.testing.assert_close(margins.detach(), torch.tensor(known["policy_margins"], dtype=torch.float64), rtol=0, atol=1e-5)


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
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (one, two, other, one | {"rejected": one["chosen"]}, plain)))
    assert sft.read_hh_pairs(tmp_path / "hh.jsonl") == [
        {"prompt": "Hi\nthere", "chosen": "Hello.", "rejected": "No."}, {"prompt": "p", "chosen": "c", "rejected": "r"}]
    (tmp_path / "none.jsonl").write_text(json.dumps(two) + "\n")
    with pytest.raises(ValueError, match="no single-turn pair"):
        sft.read_hh_pairs(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"chosen": "x"}\n')
    with pytest.raises(ValueError, match="rejected"):
        sft.read_hh_pairs(tmp_path / "bad.jsonl")


# ---------------------------------------------------------------------------------------------------- the embedded task

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
