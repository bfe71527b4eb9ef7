"""sft.py - supervised and preference tuning: from a base model to one that answers in a format, and well.

What:       The tensors of fine-tuning (ids, labels, masks, log-probabilities, entropies), supervised fine-tuning on
            prompt/response pairs, packed instruction tuning, DPO, zero-shot evaluation, and an arithmetic task with
            a checkable answer, made by a seeded generator, on which all of it runs on a laptop.
Source:     Ouyang et al. 2022, arXiv:2203.02155 (SFT); Taori et al. 2023, Alpaca (the prompt template);
            Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (DPO).
Deviations: 1. Packed chunks attend across the documents in them. 2. DPO scores the templated text whole; the prompt's
            share cancels. 3. The embedded demonstrations are right but mostly do not think: what a reward can mend.
            4. Tuning takes minutes and does not resume; a killed run leaves no folder behind.
Copy:       this file alone; needs torch. What runs the tasks and writes files imports siblings. MIT.
Run:        python sft.py --explain
            log p of the outputs: -3.992 and -6.185 nats, summed (uniform: -4.796)
            SFT loss: minus their mean over 2 examples, 5.089; by 4 accumulation steps, 1.272
            chunked = plain to 0.0e+00  OK
            python sft.py     the embedded task (--model, --data: a real one); sft.py instruct, sft.py dpo, sft.py eval
"""
import argparse
import copy
import csv
import functools
import gzip
import json
import math
import os
import random
import re
import sys
import time
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

# Dims: B sequences, T label positions (one fewer than tokens), D model width, V vocabulary
# ---------------------------------------------------------------- our tokenizer and model, and Hugging Face's
def encode(tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of `text`. Hugging Face's tokenizers add a BOS token unless told otherwise; ours never do."""
    theirs = hasattr(tokenizer, "convert_tokens_to_ids")                  # the mark of a transformers tokenizer
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens) if theirs else tokenizer.encode(text))

def end_of_text_id(tokenizer) -> int:
    """The id that ends a document, which pads as well: the mask, never the pad id, says what counts."""
    special_tokens, theirs = getattr(tokenizer, "special_tokens", None) or {}, getattr(tokenizer, "eos_token_id", None)
    for found in (theirs, *map(special_tokens.get, ("<|endoftext|>", "<|end_of_text|>", "</s>"))):
        if found is not None:
            return int(found)
    raise ValueError(f"the tokenizer has no end-of-text token (its special tokens: {sorted(special_tokens)}); "
                     "train or load it with '<|endoftext|>'")

def beside(model, batch: dict[str, Tensor]) -> list[Tensor]:
    """The tensors of a batch, where the model's parameters lie."""
    return [x.to(next(model.parameters()).device) for x in batch.values()]

# ---------------------------------------------------------------- the tensors of fine-tuning
def collate(prompt_ids: list[list[int]], output_ids: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """Join prompt and output, pad on the right, shift by one: input_ids and labels (B, T), int64, T = longest row - 1;
    response_mask (B, T), bool, true where the *label* is a token of the output. It comes from the lengths: a padding
    id that is a real token as well (end of text, mostly) counts where it is real and not where it pads.
    Example: prompt [1, 2], output [3, 4] -> input_ids [1, 2, 3], labels [2, 3, 4], mask [0, 1, 1]."""
    if len(prompt_ids) != len(output_ids) or not prompt_ids:
        raise ValueError(f"need as many outputs as prompts, at least one: got {len(prompt_ids)} and {len(output_ids)}")
    lengths = [len(p) + len(o) for p, o in zip(prompt_ids, output_ids)]
    if max(lengths) < 2:
        raise ValueError("every prompt + output is shorter than two tokens: there is nothing to predict")
    tokens = torch.full((len(lengths), max(lengths)), pad_id, dtype=torch.long)          # (B, T + 1)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (p, o) in enumerate(zip(prompt_ids, output_ids)):
        tokens[row, :len(p) + len(o)] = torch.tensor(list(p) + list(o), dtype=torch.long)
        mask[row, len(p):len(p) + len(o)] = True
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": mask[:, 1:]}   # each (B, T)

def tokenize_prompt_and_output(prompt_strs: list[str], output_strs: list[str], tokenizer) -> dict[str, Tensor]:
    """`collate` for strings, and raises as it does, or for a single string. Prompt and output are tokenized apart, as
    when the output is generated: joined first, a merge could swallow the border and cut the mask through a token."""
    if isinstance(prompt_strs, str) or isinstance(output_strs, str):
        raise ValueError("prompt_strs and output_strs are lists of strings; wrap a single one in a list")
    pad_id = getattr(tokenizer, "pad_token_id", None)
    return collate([encode(tokenizer, p) for p in prompt_strs], [encode(tokenizer, o) for o in output_strs],
                   end_of_text_id(tokenizer) if pad_id is None else pad_id)

def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as fp32; the rest as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution: (..., V) -> (...). H = -sum_v p_v log p_v. Stable: log p comes
    from log_softmax, and a token of probability 0 (logit -inf) adds 0, not NaN. Example: [[0, 0]] -> [0.6931]"""
    log_probs = at_least_float32(logits).log_softmax(-1)
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)

def get_response_log_probs(model, input_ids: Tensor, labels: Tensor,
                           return_token_entropy: bool = False) -> dict[str, Tensor]:
    """log p(label | what came before) at every position; input_ids and labels are (B, T), as `collate` makes them.
    Returns: log_probs (B, T) in nats, prompt and padding included; if asked for, token_entropy (B, T), no gradient."""
    output = model(input_ids)                                 # a tensor, or transformers' object that holds it
    logits = at_least_float32(getattr(output, "logits", output))                         # (B, T, V)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)                         # (B, T)
    entropy = {"token_entropy": compute_entropy(logits.detach())} if return_token_entropy else {}
    return {"log_probs": picked - logits.logsumexp(-1)} | entropy

def head_log_probs(head, rows: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """log p of the labels (N,) and entropies (N,; zeros unless asked for) from hidden rows (N, D) and the LM head."""
    logits = at_least_float32(head(rows))                                                # (N, V)
    entropy = compute_entropy(logits.detach()) if with_entropy else logits.new_zeros(len(rows))
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1), entropy

def get_response_log_probs_chunked(model, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False,
                                   response_mask: Tensor | None = None, chunk_tokens: int = 2048,
                                   head_log_probs: Callable = head_log_probs) -> dict[str, Tensor]:
    """The same for our TransformerLM without ever holding the (B, T, V) logits: the head runs over `chunk_tokens`
    positions at a time, and again in the backward pass; with a response_mask where that is true, the rest is 0. At
    V = 151,936, 2048 take 1.2 GB in fp32, 256 x 1024 at once 159 GB. head_log_probs: it, or torch.compile of it."""
    hidden = model.hidden(input_ids)                                                     # (B, T, D)
    where = torch.ones_like(labels, dtype=torch.bool) if response_mask is None else response_mask.bool()
    parts = [checkpoint(head_log_probs, model.lm_head, rows, targets, return_token_entropy, use_reentrant=False)
             for rows, targets in zip(hidden[where].split(chunk_tokens), labels[where].split(chunk_tokens))]
    flat = (torch.cat(x) for x in zip(*parts))             # a value a place in `where`; of no place, one empty chunk
    log_probs, entropy = (torch.zeros_like(labels, dtype=x.dtype).masked_scatter(where, x) for x in flat)
    return {"log_probs": log_probs} | ({"token_entropy": entropy} if return_token_entropy else {})

def masked_normalize(tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float = 1.0) -> Tensor:
    """Sum under the mask (along `dim`, or of all), divided by a constant; an empty mask gives 0. What is masked out is
    left out, not multiplied by 0: NaN does no harm there. Example: [1, 2, 3], [1, 1, 0], constant 2 -> 1.5"""
    kept = tensor.masked_fill(~mask.bool(), 0)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant

def sft_microbatch_train_step(policy_log_probs: Tensor, response_mask: Tensor, gradient_accumulation_steps: float,
                              normalize_constant: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the responses, and its backward pass. policy_log_probs, response_mask: (B, T).
    loss = mean over the B examples of [-sum over the response / normalize_constant] / gradient_accumulation_steps
    Returns: the loss as above, detached; metadata. An example with an empty response adds 0 and still counts in B."""
    per_example = -masked_normalize(policy_log_probs, response_mask, dim=-1, normalize_constant=normalize_constant)
    loss = per_example.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum().detach(), "per_example": per_example.detach()}

# ---------------------------------------------------------------- instruction tuning: documents packed end to end
ALPACA_TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                   "request.\n\n### Instruction:\n{prompt}\n\n### Response:\n{response}")   # Taori et al. 2023

def alpaca_ids(tokenizer, prompt: str, response: str) -> list[int]:
    """Token ids of a prompt and its response in the Alpaca template, tokenized whole, and the end-of-text id."""
    text = ALPACA_TEMPLATE.format(prompt=prompt, response=response)
    return encode(tokenizer, text, add_special_tokens=True) + [end_of_text_id(tokenizer)]

def read_json_lines(path: str, *keys: str) -> list[dict]:
    """The objects of a .jsonl or .jsonl.gz file. Raises: ValueError that names the line which is not a JSON object
    with strings under `keys`."""
    rows, number = [], 1
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict) or not all(isinstance(rows[-1].get(key), str) for key in keys):
                        raise ValueError(f"not an object{' with the strings ' * bool(keys) + ', '.join(keys)}")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, EOFError, zlib.error) as error:                    # json's and utf-8's errors are ValueErrors
        raise ValueError(f"{path}, line {number}: {error}; expected a JSON object a line") from None
    if not rows:
        raise ValueError(f"{path} holds no examples; expected a JSON object a line")
    return rows

class PackedDataset(torch.utils.data.Dataset):
    """Instruction data as one long row of tokens, cut into chunks of `seq_length` without overlap.
    Each {"prompt", "response"} becomes the Alpaca template and the end-of-text id; the documents are joined, in
    shuffled order with shuffle=True. Item i is {"input_ids", "labels"}, (seq_length,) int64 each: the labels are
    shifted by one, so the last label of a chunk is the first input of the next; a rest is dropped (100 tokens by 32 are
    3 items). Instructions are learned too, packing's price. Raises: ValueError for a foreign or too short file."""
    def __init__(self, tokenizer, dataset_path: str, seq_length: int, shuffle: bool, seed: int = 0):
        examples = read_json_lines(dataset_path, "prompt", "response")
        if shuffle:
            random.Random(seed).shuffle(examples)
        ids = [i for example in examples for i in alpaca_ids(tokenizer, example["prompt"], example["response"])]
        if not 0 < seq_length < len(ids):
            raise ValueError(f"{dataset_path} packs to {len(ids)} tokens: too few for one chunk of {seq_length} + 1")
        self.tokens, self.seq_length = torch.tensor(ids, dtype=torch.long), seq_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        start = range(len(self))[i] * self.seq_length                  # IndexError behind the last one
        chunk = self.tokens[start:start + self.seq_length + 1]
        return {"input_ids": chunk[:-1], "labels": chunk[1:]}

def iterate_batches(dataset, batch_size: int, shuffle: bool, seed: int = 0) -> torch.utils.data.DataLoader:
    """Batches {"input_ids", "labels"} (batch_size, seq_length) over one epoch. Example: 5 items by 2 -> 2, 2 and 1"""
    return torch.utils.data.DataLoader(dataset, batch_size, shuffle, generator=torch.Generator().manual_seed(seed))

# ---------------------------------------------------------------- reading an answer out of free text
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+")

def parse_gsm8k_response(model_output: str) -> str | None:
    """The last number of the text, without thousands commas, or None. 'She has 1,234 eggs.' -> '1234'"""
    numbers = NUMBER.findall(model_output)
    return numbers[-1].replace(",", "") if numbers else None

def parse_mmlu_response(mmlu_example: dict, model_output: str) -> str | None:
    """The letter A..D the text chooses, or None when it chooses none or none of the options. In this order: 'answer is
    B' (the last one said), a text that starts with the letter, a letter in brackets.
    Example: 'The correct answer is B. There is ...' -> 'B'; 'The correct answer is 10000.' -> None"""
    letters = "ABCD"[:len(mmlu_example.get("options") or "ABCD")]
    if said := re.findall(rf"\b(?i:answer|option|choice)\s*(?:is|:)?\s*[:\"'(*]*([{letters}])(?![\w'])(?! [a-z])",
                          model_output):
        return said[-1]
    for pattern in (rf"\s*[\"'(*]*([{letters}])(?=[.):,*\"']|\s*$|\n)", rf".*\(([{letters}])\)"):
        if match := re.match(pattern, model_output, re.DOTALL):
            return match[1]
    return None

# ---------------------------------------------------------------- preference tuning: DPO
def preference_margin(model, tokenizer, prompts: list[str], chosen: list[str], rejected: list[str]) -> Tensor:
    """log p(chosen | prompt) - log p(rejected | prompt) in nats, (B,): positive where the model prefers the chosen one.
    Each log p is that of the whole templated text, summed over its tokens: the prompt's share cancels."""
    rows = [alpaca_ids(tokenizer, p, r) for p, r in zip(prompts + prompts, chosen + rejected)]
    ids, labels, mask = beside(model, collate([r[:1] for r in rows], [r[1:] for r in rows], end_of_text_id(tokenizer)))
    scores = masked_normalize(get_response_log_probs(model, ids, labels)["log_probs"], mask, dim=-1)     # (2 B,)
    return scores[:len(prompts)] - scores[len(prompts):]

def dpo_loss(lm, lm_ref, tokenizer, beta: float, prompt, response_chosen, response_rejected) -> Tensor:
    """-log sigmoid(beta * [policy's margin - reference's margin]), mean over the pairs (arXiv:2305.18290, eq. 7). Sums
    of log-probs, not means: a mean would reward length for its own sake. prompt and responses: a string each, or a
    list each, as many (or ValueError). lm_ref has no gradient, may be on another device. Example: lm twice -> log 2"""
    as_list = [[x] if isinstance(x, str) else list(x) for x in (prompt, response_chosen, response_rejected)]
    if len({len(x) for x in as_list}) != 1 or not as_list[0]:
        raise ValueError(f"need as many prompts as chosen and rejected responses, got {[len(x) for x in as_list]}")
    margin = preference_margin(lm, tokenizer, *as_list)                                  # (B,)
    with torch.no_grad():
        margin_ref = preference_margin(lm_ref, tokenizer, *as_list).to(margin.device)
    return -F.logsigmoid(beta * (margin - margin_ref)).mean()

PAIR = ("prompt", "chosen", "rejected")

def read_hh_pairs(path: str) -> list[dict]:
    """{"prompt", "chosen", "rejected"} from lines of that form, or of Anthropic's HH: {"chosen", "rejected"}, each a
    whole dialogue '\\n\\nHuman: ...\\n\\nAssistant: ...'. Of those, the single-turn ones with one prompt are kept."""
    pairs = []
    for row in read_json_lines(path, "chosen", "rejected"):
        if "prompt" not in row:
            sides = [re.split(r"\n\n(?:Human|Assistant):", row[side]) for side in ("chosen", "rejected")]
            if any(len(side) != 3 or side[0].strip() for side in sides) or sides[0][1] != sides[1][1]:
                continue
            row = dict(zip(PAIR, (text.strip() for text in (sides[0][1], sides[0][2], sides[1][2]))))
        if row["chosen"] != row["rejected"]:
            pairs.append({key: row[key] for key in PAIR})
    if not pairs:
        raise ValueError(f"{path} holds no single-turn pair")
    return pairs

# ---------------------------------------------------------------- the embedded task: arithmetic with a checkable answer
NAMES = "Ann Ben Eva Ivo Kim Leo Mia Tom".split()
THINGS = "apples books coins eggs keys nuts pens shells".split()
WORDS = {"+": "finds {b}", "-": "loses {b}", "*2": "doubles them", "*3": "triples them"}

def arithmetic_problems(count: int, seed: int, held_out: bool = False) -> list[dict]:
    """`count` problems of two to four steps, in words or as an expression; the same for the same seed. Held-out ones
    are those whose numbers and operations hash to 0 modulo 10: no training problem has the same.
    Example: {"question": "What is (7 + 5) * 2 - 3?", "work": "7+5=12, 12*2=24, 24-3=21", "answer": "21"}"""
    rng, problems = random.Random(f"{seed} {held_out}"), []
    while len(problems) < count:
        total = start = rng.randint(2, 20)
        expression, key, work, story = str(start), str(start), [], []
        for _ in range(rng.randint(2, 4)):
            operation = rng.choice("+-+-*")
            b = rng.randint(2, 3) if operation == "*" else rng.randint(2, 9)
            after = {"+": total + b, "-": total - b, "*": total * b}[operation]
            if not 0 <= after <= 99:
                break
            expression = f"({expression}) * {b}" if operation == "*" and work else f"{expression} {operation} {b}"
            work.append(f"{total}{operation}{b}={after}")
            story.append(WORDS[operation if operation != "*" else f"*{b}"].format(b=b))
            total, key = after, key + operation + str(b)
        if len(work) < 2 or (zlib.crc32(key.encode()) % 10 == 0) != held_out:
            continue
        question = f"What is {expression}?" if rng.random() < 0.5 else (
            "{n} has {a} {t}, {middle} and {last}. How many {t} now?".format(
                n=rng.choice(NAMES), a=start, t=rng.choice(THINGS), middle=", ".join(story[:-1]), last=story[-1]))
        problems.append({"question": question, "work": ", ".join(work), "answer": str(total)})
    return problems

def write_arithmetic(folder: str, seed: int, other_text: str, count: int = 20_000, demonstrations: int = 2048,
                     quick: float = 0.6) -> None:
    """The task as files that the commands here read like any other data:
    base.txt        documents to pre-train on: questions with their work (4 of 5) or the answer alone, and other_text
    sft.jsonl       {"prompt", "response", "answer"}: the think/answer format. The share `quick` of the demonstrations
                    does not think but names the answer at once, which a small model seldom gets right. SFT imitates
                    both kinds alike; only a reward can tell them apart.
    train.jsonl, valid.jsonl    {"prompt", "answer"}, to learn from by reward, and held out
    instructions.jsonl, pairs.jsonl, pairs_valid.jsonl    for PackedDataset and DPO; answers with work are preferred"""
    rng = random.Random(seed)
    problems, held_out = arithmetic_problems(count, seed), arithmetic_problems(1000, seed, held_out=True)
    documents = [f"Question: {p['question']}\n" + (f"Work: {p['work']}\n" if rng.random() < 0.8 else "") +
                 f"Answer: {p['answer']}" for p in problems]
    documents += [other_text[i:i + 500] for i in range(0, len(other_text), 500)]
    rng.shuffle(documents)
    def task(p: dict) -> dict:
        return {"prompt": f"User: {p['question']}\nAssistant: <think>", "answer": p["answer"]}
    def pair(p: dict) -> dict:
        return dict(zip(PAIR, (p["question"], f"{p['work']}. So {p['answer']}.", f"{p['answer']}.")))
    shown = [(p, "I know this." if rng.random() < quick else p["work"])
             for p in arithmetic_problems(demonstrations, seed + 1)]
    sft = [task(p) | {"response": f" {thought}</think> <answer>{p['answer']}</answer>"} for p, thought in shown]
    instructions = [{"prompt": p["question"], "response": pair(p)[rng.choice(PAIR[1:])]} for p in problems[:4000]]
    for name, rows in (("sft", sft), ("train", map(task, problems)), ("valid", map(task, held_out)),
                       ("instructions", instructions), ("pairs", [pair(p) for p, _ in shown[:512]]),
                       ("pairs_valid", map(pair, held_out[:200]))):
        write_text(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(f"{folder}/base.txt", "<|endoftext|>".join(documents))

def write_text(path: str, text: str) -> None:
    """The text as a file, whole or not at all."""
    from train import write_whole
    with write_whole(path) as file:
        file.write(text.encode())

def make_base(folder: str, seed: int, steps: int, log: Callable[[str], None] = print) -> None:
    """The embedded base model as a Hugging Face folder: a tokenizer and 0.7 million parameters, both from nothing. It
    reads the arithmetic documents and some of the earlier corpus (Python's standard library). Numbers are single
    digits to the tokenizer (it is trained on text without them), as in Qwen2.5; the format's tags are special."""
    import bpe
    import model as model_py
    import optim
    import train
    data, corpus = f"{folder}/data", Path("out/corpus/train.txt")
    if not corpus.exists():
        train.gather_corpus(corpus.parent)
    write_arithmetic(data, seed, corpus.read_text("utf-8")[:150_000].replace("<|endoftext|>", "\n"))
    text = Path(data, "base.txt").read_text("utf-8")
    frames = "User: Assistant: I know this. So " + ALPACA_TEMPLATE.format(prompt="", response="")
    write_text(f"{data}/words.txt", re.sub(r" ?\d+", "\n", text + frames * 500))
    special_tokens = ["<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>"]
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(f"{data}/words.txt", 512, special_tokens), special_tokens)
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int32).numpy()
    config = train.TrainConfig(steps=steps, batch_size=32, context_length=128, max_lr=3e-3, eval_every=steps,
                               log_every=100, checkpoint_every=0, seed=seed)
    torch.manual_seed(seed)
    model = model_py.TransformerLM(model_py.ModelConfig(vocab_size=512, context_length=256, d_model=128, num_layers=3,
                                                        num_heads=4), attention=model_py.sdpa_attention)
    optimizer = optim.AdamW(model.parameters(), lr=config.max_lr, betas=(0.9, 0.95), weight_decay=0.1)
    train.train(model, optimizer, tokens[:-20_000], tokens[-20_000:], config, clip=optim.clip_grad_norm_, log=log,
                schedule=lambda step: optim.cosine_lr(step, config.max_lr, config.max_lr / 10, steps // 16, steps))
    model_py.save_hf(model, folder, tokenizer)

# ---------------------------------------------------------------- evaluation: prompts in, graded answers out
REASONING_TEMPLATE = ("Solve the problem step by step, then state the result. The steps go between <think> and "
                      "</think>, the result between <answer> and </answer>.\nUser: {question}\nAssistant: <think>")
MMLU_TEMPLATE = ("Answer this multiple-choice question about {subject}. Reply with the sentence 'The correct answer "
                 "is _', with A, B, C or D in place of the blank.\n\n"
                 "Question: {question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")

def read_problems(path: str, template: str = REASONING_TEMPLATE,
                  boxed: Callable[[str], str | None] = lambda text: None) -> list[dict]:
    """{"prompt", "answer", "response"} from JSON lines of any of these forms: our own {"prompt", "answer"}; GSM8K's
    {"question", "answer": "... #### 42"}; MATH's {"problem", "solution"}, whose answer is {"answer"} or the last
    \\boxed{} (found by `boxed`). `response` is the worked solution in the think/answer format."""
    problems = []
    for number, row in enumerate(read_json_lines(path), 1):
        if isinstance(row.get("prompt"), str) and ("answer" in row or "response" in row):
            problems.append({"answer": ""} | row)
            continue
        question, steps, answer = row.get("question", row.get("problem")), row.get("solution", ""), row.get("answer")
        if isinstance(answer, str) and "####" in answer:
            steps, _, answer = (part.strip() for part in re.sub(r"<<[^>]*>>", "", answer).rpartition("####"))
        answer = boxed(steps) if answer is None else answer
        if not isinstance(question, str) or answer is None:
            raise ValueError(f"{path}, example {number}: has {sorted(row)}; expected prompt and answer, question and "
                             "answer (GSM8K), or problem and solution with a \\boxed{} answer (MATH)")
        problems.append({"prompt": template.format(question=question), "answer": str(answer),
                         "response": f" {steps}</think> <answer>{answer}</answer>"})
    return problems

def read_mmlu(path: str) -> list[dict]:
    """The questions of MMLU's CSV files (question, four options, letter): one file, or a folder of them."""
    problems = []
    for file in sorted(Path(path).rglob("*.csv")) if os.path.isdir(path) else [Path(path)]:
        subject = re.sub(r"_(dev|val|test)$", "", file.stem).replace("_", " ")
        with open(file, encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                if len(row) != 6 or row[5].strip() not in tuple("ABCD"):
                    raise ValueError(f"{file}: expected question, four options and a letter A to D, got {row}")
                prompt = MMLU_TEMPLATE.format(subject=subject, question=row[0], **dict(zip("abcd", row[1:5])))
                problems.append({"prompt": prompt, "answer": row[5].strip(), "options": row[1:5]})
    if not problems:
        raise ValueError(f"{path} holds no MMLU questions")
    return problems

def parsed_reward(parse: Callable[[str], str | None], same: Callable[[str, str], bool]) -> Callable:
    """Reward function: the format is right if `parse` finds an answer, the answer if it is the `same` as the truth."""
    def reward(response: str, truth: str) -> dict[str, float]:
        answer = parse(response)
        right = float(answer is not None and same(answer, truth))
        return {"reward": right, "format_reward": float(answer is not None), "answer_reward": right}
    return reward

gsm8k_reward = parsed_reward(parse_gsm8k_response, lambda a, b: Fraction(a) == Fraction(str(b).replace(",", "")))
mmlu_reward = parsed_reward(lambda response: parse_mmlu_response({}, response), lambda a, b: a == b)

def log_generations(engine, tokenizer, problems: list[dict], reward_fn: Callable, *, model=None, show: int = 0,
                    path: str | None = None, log: Callable[[str], None] = print, **settings) -> dict[str, float]:
    """Answer the problems, grade the answers, and keep a record of each.
    Args: engine.generate as in grpo.py gets `settings` (max_tokens, temperature, stop, seed). model: scores entropy.
    path: takes a JSON line an answer: prompt, response, truth, the three rewards, length, mean entropy.
    show: prints so many examples of each outcome.
    Returns: accuracy; format; counts of (format, answer) rewards 11, 10, 00; mean entropy in nats per token; mean
    length in tokens of all, right and wrong answers, where there are any; examples_per_second of generation."""
    started = time.perf_counter()
    answers = engine.generate([encode(tokenizer, p["prompt"]) for p in problems], **settings)
    summary: dict[str, float] = {"examples_per_second": len(problems) / (time.perf_counter() - started)}
    rows = [{"prompt": p["prompt"], "response": a.text, "truth": p["answer"], **reward_fn(a.text, p["answer"]),
             "length": len(a.ids)} for p, a in zip(problems, answers)]
    for start in range(0, len(rows) if model is not None else 0, 64):
        part = answers[start:start + 64]
        ids, labels, masks = beside(model, collate([a.prompt_ids for a in part], [a.ids for a in part], pad_id=0))
        with torch.no_grad():
            entropies = get_response_log_probs_chunked(model, ids, labels, True, masks)["token_entropy"]
        for row, entropy in zip(rows[start:], entropies.sum(-1) / masks.sum(-1)):
            row["entropy"] = entropy.item()
    if path:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    kinds = {(f, r): [row for row in rows if (row["format_reward"], row["answer_reward"]) == (f, r)]
             for f, r in ((1, 1), (1, 0), (0, 0))}
    for (form, right), members in kinds.items():
        summary[f"count_{form}{right}"] = len(members)
        for row in members[:show]:
            log(f"  format {form}, answer {right}, truth {row['truth']}: {row['prompt'][-160:]!r} -> "
                f"{row['response'][:240]!r}")
    averages = [("accuracy", "answer_reward", rows), ("format", "format_reward", rows), ("entropy", "entropy", rows),
                ("length", "length", rows), ("length_right", "length", kinds[1, 1]),
                ("length_wrong", "length", kinds[1, 0] + kinds[0, 0])]
    return summary | {name: sum(row[key] for row in members) / len(members) for name, key, members in averages
                      if members and key in members[0]}

# ---------------------------------------------------------------- one loop for the three ways of tuning
def fine_tune(model, optimizer, examples: list, micro_step: Callable, *, schedule: Callable, clip: Callable,
              epochs: float = 1.0, batch_size: int = 32, micro_batch_size: int = 32, clip_norm: float = 1.0,
              evaluate: Callable[[], dict] = dict, eval_every: int = 0, keep_best: str = "", seed: int = 0,
              log: Callable[[str], None] = print) -> dict[str, float]:
    """Shuffled epochs, gradient accumulation, clipping, a schedule, evaluation. micro_step knows what an example is.
    Args: micro_step(examples, accumulation_steps) -> its share of the loss; where that still has a graph, the backward
    pass is done here. It is told batch size / its own size, so that unequal micro-batches too add up to the mean.
    schedule(step, total) -> learning rate. evaluate: called every eval_every steps (0: never) and at the end; with
    keep_best, the name of one of its numbers, the model ends with the weights that had the highest.
    Returns: the last (or best) evaluation and that step's "loss". Raises: ValueError for no examples, a broken loss."""
    if not examples:
        raise ValueError("no examples are left to train on; give more, or others to hold out with --valid")
    per_epoch, best, result = max(1, len(examples) // batch_size), None, {}      # of full batches; the rest waits
    total, started = max(1, round(epochs * per_epoch)), time.perf_counter()
    for step in range(total):
        if (at := step % per_epoch) == 0:
            order = random.Random(f"{seed} {step // per_epoch}").sample(examples, len(examples))
        batch, rate, loss = order[at * batch_size:(at + 1) * batch_size], schedule(step, total), 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        for start in range(0, len(batch), micro_batch_size):
            part = batch[start:start + micro_batch_size]
            share = torch.as_tensor(micro_step(part, len(batch) / len(part)))
            if share.requires_grad:
                share.backward()
            loss += share.detach().item()
        if not math.isfinite(loss):
            raise ValueError(f"step {step + 1} has loss {loss}; lower the learning rate")
        norm = float(clip([p for p in model.parameters() if p.grad is not None], clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        due, shown = step + 1 == total or (eval_every and (step + 1) % eval_every == 0), {}
        if due:
            shown = evaluate()
            result = {"loss": loss, **shown}
            if keep_best and (best is None or result[keep_best] > best[0][keep_best]):
                best = (result, copy.deepcopy(model.state_dict()))
        if due or (step + 1) % 10 == 0:
            speed = (step + 1) * len(batch) / (time.perf_counter() - started)
            log(f"step {step + 1}/{total} | loss {loss:.4f} | lr {rate:.1e} | gnorm {norm:.2f} | {speed:.0f} examples/s"
                + "".join(f" | {key.replace('_', ' ')} {value:.4g}" for key, value in shown.items()))
    if best:
        result = best[0]
        model.load_state_dict(best[1])
    return result

def keep_fitting(examples: list[dict], length: Callable, room: int, drop: bool) -> list[dict]:
    """The examples whose `length` is at most `room`, in tokens. Raises: ValueError if others are there and not to be
    dropped, or none would be left: no run shall learn that in the middle of its training."""
    lengths = [length(example) for example in examples]
    kept, longest = [e for e, n in zip(examples, lengths) if n <= room], max(lengths, default=0)
    said = f"{len(examples) - len(kept)} of {len(examples)} examples, longer than the {room} tokens the context takes"
    if longest > room and not (kept and drop):
        raise ValueError(f"{said}: the longest has {longest}, {examples[lengths.index(longest)]['prompt'][:60]!r}...; "
                         "shorten them, or leave them out with --drop-long")
    if longest > room:
        print(f"left out {said}")
    return kept

def sft_micro_step(model, tokenizer, normalize_constant: float, examples: list[dict], steps: float) -> Tensor:
    """micro_step for {"prompt", "response"}: the prompt is read, the response learned."""
    batch = tokenize_prompt_and_output([e["prompt"] for e in examples], [e["response"] for e in examples], tokenizer)
    ids, labels, mask = beside(model, batch)
    log_probs = get_response_log_probs(model, ids, labels)["log_probs"]
    return sft_microbatch_train_step(log_probs, mask, steps, normalize_constant)[0]

def packed_micro_step(model, items: list[dict], steps: float) -> Tensor:
    """micro_step for the items of a PackedDataset: the mean over all their labels."""
    ids, labels = beside(model, torch.utils.data.default_collate(items))
    return -get_response_log_probs(model, ids, labels)["log_probs"].mean() / steps

def dpo_micro_step(model, reference, tokenizer, beta: float, pairs: list[dict], steps: float) -> Tensor:
    """micro_step for {"prompt", "chosen", "rejected"}."""
    return dpo_loss(model, reference, tokenizer, beta, *([pair[key] for pair in pairs] for key in PAIR)) / steps

@torch.no_grad()
def preference_accuracy(model, tokenizer, pairs: list[dict]) -> float:
    """Share of the pairs whose chosen response the policy finds likelier than the rejected one."""
    margins = [preference_margin(model, tokenizer, *([pair[key] for pair in pairs[i:i + 16]] for key in PAIR))
               for i in range(0, len(pairs), 16)]
    return (torch.cat(margins) > 0).double().mean().item()

# ---------------------------------------------------------------- explain, check, time, run
def toy_model(vocab_size: int, width: int) -> torch.nn.Module:
    """The least that has a language model's interface: the hidden state of a token is its embedding."""
    model = torch.nn.Module()
    model.hidden, model.lm_head = torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size, bias=False)
    model.forward = lambda ids: model.lm_head(model.hidden(ids))
    return model

def self_check(seed: int = 0) -> float:
    """Walks through a batch of two, and returns the largest difference of plain and chunked log-probs and gradients.
    Raises: AssertionError above 1e-6: float32 log-probs of a few nats are good to 5e-7, a wrong mask off by nats."""
    torch.manual_seed(seed)
    batch, model = collate([[1, 2, 3], [1]], [[4, 5], [6, 7]], pad_id=0), toy_model(11, 8)
    ids, labels, mask = batch.values()
    print("prompts [1 2 3] and [1], outputs [4 5] and [6 7], padded with 0, labels shifted by one:")
    print(*(f"  {key:14s} {value.int().tolist()}" for key, value in batch.items()), sep="\n")
    plain = get_response_log_probs(model, ids, labels, True)
    fast = get_response_log_probs_chunked(model, ids, labels, True, mask, chunk_tokens=3)
    sums = masked_normalize(plain["log_probs"], mask, dim=-1)
    print(f"log p of the outputs: {sums[0]:.3f} and {sums[1]:.3f} nats, summed (uniform: {-2 * math.log(11):.3f})")
    grads = [torch.autograd.grad(x["log_probs"][mask].sum(), list(model.parameters())) for x in (plain, fast)]
    pairs = [(plain[key].masked_fill(~mask, 0), fast[key]) for key in plain] + list(zip(*grads))
    worst = max((a - b).abs().max().item() for a, b in pairs)
    leaf = plain["log_probs"].detach().requires_grad_()
    loss, _ = sft_microbatch_train_step(leaf, mask, 4)
    print(f"SFT loss: minus their mean over 2 examples, {-sums.mean():.3f}; by 4 accumulation steps, {loss:.3f}")
    assert abs(loss.item() + sums.mean().item() / 4) < 1e-6 and (leaf.grad != 0).equal(mask), "the SFT loss is wrong"
    assert worst < 1e-6 and labels[mask].tolist() == [4, 5, 6, 7], f"chunked and plain differ by {worst:.1e}"
    return worst

def bench(seconds: float = 2.0) -> None:
    """Median milliseconds of log-probs and their backward pass, plain and chunked, at a vocabulary of 32,000."""
    model, ids = toy_model(32_000, 128), torch.arange(1024).view(4, 256)
    mask = ids % 256 >= 128
    chunked = functools.partial(get_response_log_probs_chunked, response_mask=mask, chunk_tokens=128)
    for name, f in [("plain, (4, 256, 32000) logits", get_response_log_probs), ("chunked, half of it prompt", chunked)]:
        timer = Timer("f(model, ids, ids)['log_probs'][mask].sum().backward()", globals=locals())
        time = timer.blocked_autorange(min_run_time=seconds)
        print(f"{name:30s} {time.median * 1e3:8.1f} ms (iqr {time.iqr * 1e3:.1f})")

DEFAULTS = {"sft": ("base", "sft.jsonl", "valid.jsonl", 3, 1e-3),     # model, data, held-out data, epochs, rate
            "instruct": ("base", "instructions.jsonl", "", 1, 1e-3),
            "dpo": ("instruct", "pairs.jsonl", "pairs_valid.jsonl", 1, 1e-4),
            "eval": ("sft", "valid.jsonl", "", 0, 0.0)}

def main(argv: list[str] | None = None) -> int:
    """The command line: tunes or evaluates a model; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", nargs="?", default="sft", choices=list(DEFAULTS))
    add("--model", help="Hugging Face folder (default: the embedded one of this seed, made if missing)")
    add("--data", help="default: the embedded task's")
    add("--valid", help="held-out problems (sft) or pairs (dpo); dpo without them holds out every tenth pair")
    add("--out", help="folder for the tuned model, or file for eval's answers")
    for name, *choices in (("task", "reasoning", "boxed", "gsm8k", "mmlu", "alpaca-eval", "safety"),
                           ("engine", "torch", "vllm"), ("dtype", "float32", "bfloat16"),
                           ("device", *["cuda"] * torch.cuda.is_available(), "cpu")):
        add("--" + name, default=choices[0], choices=choices)
    for name, kind, default, *about in (
            ("epochs", float, None, "default 3; instruct, dpo: 1"), ("batch-size", int, 32), ("beta", float, 0.1),
            ("lr", float, None, "default 1e-3; dpo: 1e-4; with --model a hundredth"), ("micro-batch-size", int, 32),
            ("temperature", float, None, "default 1; eval with --model: 0, which is greedy"), ("seq-length", int, 128),
            ("max-tokens", int, None, "default 64; --model: 512"), ("eval-every", int, 0, "steps, default at the end"),
            ("limit", int, 256, "problems to evaluate, default 256"), ("seed", int, 0), ("base-steps", int, 800)):
        add("--" + name, type=kind, default=default, help=about[0] if about else f"default {default}")
    add("--drop-long", action="store_true", help="train without the examples longer than the model's context")
    add("--explain", action="store_true", help="walk through a tiny batch and check the file")
    add("--bench", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.bench:
            bench()
        elif args.explain:
            print(f"chunked = plain to {self_check(args.seed):.1e}  OK")
        else:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"sft.py: {error}", file=sys.stderr)
        return 2
    return 0

def run(args: argparse.Namespace) -> None:
    """Puts the sibling files together."""
    import bpe
    import grpo
    import model as model_py
    import optim
    positive = "batch_size micro_batch_size seq_length max_tokens limit base_steps epochs lr beta".split()
    if wrong := [name for name in positive if getattr(args, name) is not None and not getattr(args, name) > 0]:
        raise ValueError(" and ".join("--" + name.replace("_", "-") for name in wrong) + " must be above 0")
    home, (folder, data, valid, epochs, lr) = f"out/arithmetic-{args.seed}", DEFAULTS[args.action]
    if not args.model and not os.path.exists(f"{home}/base/config.json"):
        print(f"{home}/base: training the base model from scratch")
        make_base(f"{home}/base", args.seed, args.base_steps)
    judge, source, lr = args.action == "eval", args.model or f"{home}/{folder}", args.lr or lr / 100 ** bool(args.model)
    heat = args.temperature if args.temperature is not None else float(not (judge and args.model))
    answers = f"out/eval-{args.task}.json{'l' * (args.task != 'alpaca-eval')}"
    out = args.out or (answers if judge else f"{home}/{args.action}")
    valid = args.valid or (f"{home}/base/data/{valid}" if valid and not args.data else None)
    data = args.data or f"{home}/base/data/{data}"
    near = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
    if near.is_dir() == (judge and near == Path(out)) or not os.access(near, os.W_OK) or [*Path(out).glob("model-*")]:
        raise ValueError(f"--out {out} cannot be written: {near} is read-only, the wrong kind, or holds shards")
    model = model_py.load_hf(source, device=args.device, dtype=torch.float32, attention=model_py.sdpa_attention)
    tokenizer = bpe.Tokenizer.from_file(os.path.join(source, "tokenizer.json"))
    print(f"{args.action}: {source}, {model_py.count_parameters(model):,} parameters, on {args.device}; data {data}")
    if args.action in ("sft", "eval"):                                  # those that write answers
        engine = grpo.open_engine(args.engine, model, tokenizer, source, end_of_text_id(tokenizer), args.dtype)
    optimizer = optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    sampling = dict(max_tokens=args.max_tokens or (512 if args.model else 64), min_tokens=1, seed=args.seed)
    tune = functools.partial(
        fine_tune, model, clip=optim.clip_grad_norm_, epochs=args.epochs or epochs, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, eval_every=args.eval_every, seed=args.seed,
        schedule=lambda step, total: optim.cosine_lr(step, lr, lr / 10, round(0.03 * total), total))
    fitting = functools.partial(keep_fitting, room=model.config.context_length, drop=args.drop_long)
    if judge:
        result = evaluate_task(args, engine, tokenizer, model, data, out, sampling | {"temperature": heat}, grpo)
    elif args.action == "sft":
        examples = read_problems(data, boxed=grpo.balanced_box)
        if not all(isinstance(e.get("response"), str) for e in examples) or not any(e["response"] for e in examples):
            raise ValueError(f"{data} holds prompts without a response to learn")
        examples = fitting(examples, lambda e: sum(len(encode(tokenizer, e[k])) for k in ("prompt", "response")) - 1)
        held_out = read_problems(valid, boxed=grpo.balanced_box)[:args.limit] if valid else []
        def evaluate(temperature: float, **options) -> dict:
            engine.sync(model)
            return log_generations(engine, tokenizer, held_out, grpo.r1_zero_reward, model=model, stop=["</answer>"],
                                   temperature=temperature, **sampling, **options) if held_out else {}
        mean_length = sum(len(encode(tokenizer, e["response"])) for e in examples) / len(examples)
        result = tune(optimizer, examples, functools.partial(sft_micro_step, model, tokenizer, mean_length),
                      evaluate=lambda: evaluate(heat, path=f"{out}/generations.jsonl", show=1))
        result |= {"greedy": evaluate(0.0)["accuracy"]} if held_out else {}
    elif args.action == "instruct":
        dataset = PackedDataset(tokenizer, data, args.seq_length, shuffle=True, seed=args.seed)
        result = tune(optimizer, list(dataset), functools.partial(packed_micro_step, model))
    else:
        longer = lambda pair: max(len(alpaca_ids(tokenizer, pair["prompt"], pair[side])) for side in PAIR[1:]) - 1
        pairs = fitting(read_hh_pairs(data), longer)
        held_out = fitting(read_hh_pairs(valid), longer) if valid else pairs[::10]
        pairs = pairs if valid else [p for i, p in enumerate(pairs) if i % 10]
        reference = copy.deepcopy(model).requires_grad_(False)
        print(f"preference accuracy before: {preference_accuracy(model, tokenizer, held_out):.3f}")
        result = tune(torch.optim.RMSprop(model.parameters(), lr=lr), pairs, keep_best="accuracy",
                      micro_step=functools.partial(dpo_micro_step, model, reference, tokenizer, args.beta),
                      evaluate=lambda: {"accuracy": preference_accuracy(model, tokenizer, held_out)})
    if not judge:
        model_py.save_hf(model, out, tokenizer)
        print(f"wrote {out}")
    print("RESULT " + json.dumps({"action": args.action, "seed": args.seed, **result}))

def evaluate_task(args, engine, tokenizer, model, data: str, out: str, sampling: dict, grpo) -> dict[str, float]:
    """Zero-shot: answers to a file, graded where there is a truth."""
    if (alpaca := args.task == "alpaca-eval") or args.task == "safety":                   # a JSON list, or a CSV file
        key, about = ("instruction", {"generator": args.model or "twelve"}) if alpaca else ("prompts_final", {})
        try:
            with open(data, encoding="utf-8", newline="") as file:
                rows = json.load(file) if alpaca else list(csv.DictReader(file))
            prompts = [encode(tokenizer, ALPACA_TEMPLATE.format(prompt=r[key], response="")) for r in rows[:args.limit]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{data}: {error!r}; expected a list of entries with {key!r}") from None
        end = tokenizer.decode([end_of_text_id(tokenizer)])           # it ends an answer and is no part of it
        rows = [{k: row[k] for k in (key, "dataset") if k in row} | {"output": a.text.removesuffix(end)} | about
                for row, a in zip(rows, engine.generate(prompts, **sampling))]
        write_text(out, json.dumps(rows, indent=1) if alpaca else "".join(json.dumps(row) + "\n" for row in rows))
        return {"answers": len(rows)}
    reward, template, stop = {"reasoning": (grpo.r1_zero_reward, REASONING_TEMPLATE, ["</answer>"]),
                              "boxed": (grpo.question_only_reward, "{question}", []), "mmlu": (mmlu_reward, "", []),
                              "gsm8k": (gsm8k_reward, "{question}\nAnswer:", [])}[args.task]
    problems = read_mmlu(data) if args.task == "mmlu" else read_problems(data, template, grpo.balanced_box)
    return log_generations(engine, tokenizer, problems[:args.limit], reward, model=model, path=out, show=3, stop=stop,
                           **sampling)

if __name__ == "__main__":
    sys.exit(main())
