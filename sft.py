"""sft.py - supervised and preference tuning: from a base model to one that answers in a format and prefers better answers.

What:       The tensors of fine-tuning (ids, labels, masks, log-probabilities, entropies), supervised fine-tuning on
            prompt/response pairs, packed instruction tuning, DPO, zero-shot evaluation, and an arithmetic task with
            a checkable answer, made by a seeded generator, on which all of it runs on a laptop.
Source:     Ouyang et al. 2022, arXiv:2203.02155 (SFT); Taori et al. 2023, Alpaca (the prompt template);
            Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (DPO).
Copy:       this file alone; needs torch. main() alone imports siblings (bpe, model, optim, train, grpo). MIT.
"""
from __future__ import annotations

import argparse
import copy
import csv
import gzip
import json
import math
import os
import random
import re
import sys
import time
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Dims: B sequences, T label positions (one fewer than tokens), D model width, V vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# Two kinds of tokenizer, two kinds of model: the only three places that know the difference
# ---------------------------------------------------------------------------------------------------------------------


def encode(tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of `text`. Hugging Face's tokenizers add a BOS token unless told otherwise; ours never do."""
    if hasattr(tokenizer, "convert_tokens_to_ids"):                       # the mark of a transformers tokenizer
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    return list(tokenizer.encode(text))


def end_of_text_id(tokenizer) -> int:
    """The id that ends a document, which pads as well: the mask, never the pad id, says what counts."""
    if getattr(tokenizer, "eos_token_id", None) is not None:
        return int(tokenizer.eos_token_id)
    special_tokens = getattr(tokenizer, "special_tokens", None) or {}
    for name in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if name in special_tokens:
            return int(special_tokens[name])
    raise ValueError(f"the tokenizer has no end-of-text token (its special tokens: {sorted(special_tokens)}); "
                     "train or load it with '<|endoftext|>'")


def logits_of(model, input_ids: Tensor) -> Tensor:
    """(B, T) ids -> (B, T, V) logits: ours returns the tensor, transformers an object that holds it."""
    output = model(input_ids)
    return output.logits if hasattr(output, "logits") else output


# ---------------------------------------------------------------------------------------------------------------------
# The tensors of fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def collate(prompt_ids: list[list[int]], output_ids: list[list[int]], pad_id: int) -> dict[str, Tensor]:
    """Join prompt and output, pad on the right, shift by one.

    Returns: input_ids (B, T) and labels (B, T), int64, T = longest joined row - 1; response_mask (B, T), bool, true
    where the *label* is a token of the output. The mask comes from the lengths: a padding id that also is a real
    token (end of text, mostly) must count where it is real and not where it pads.
    Example: prompt [1, 2], output [3, 4] -> input_ids [1, 2, 3], labels [2, 3, 4], mask [0, 1, 1].
    Raises: ValueError if the lists differ in length, are empty, or a joined row has fewer than two tokens.
    """
    if len(prompt_ids) != len(output_ids) or not prompt_ids:
        raise ValueError(f"need as many outputs as prompts and at least one, got {len(prompt_ids)} prompts and "
                         f"{len(output_ids)} outputs")
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
    """`collate` for strings. Prompt and output are tokenized apart, as they are when the output is generated:
    joined first, a merge could swallow the border and the mask would cut a token in two."""
    if isinstance(prompt_strs, str) or isinstance(output_strs, str):
        raise ValueError("prompt_strs and output_strs are lists of strings; wrap a single one in a list")
    pad_id = getattr(tokenizer, "pad_token_id", None)
    return collate([encode(tokenizer, p) for p in prompt_strs], [encode(tokenizer, o) for o in output_strs],
                   end_of_text_id(tokenizer) if pad_id is None else pad_id)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution: (..., V) -> (...). H = -sum_v p_v log p_v.

    Stable: log p comes from log_softmax, and a token of probability 0 (logit -inf) adds 0, not NaN.
    Example: compute_entropy([[0, 0]]) -> [0.6931]
    """
    log_probs = at_least_float32(logits).log_softmax(-1)
    probs = log_probs.exp()
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(-1)


def get_response_log_probs(model, input_ids: Tensor, labels: Tensor,
                           return_token_entropy: bool = False) -> dict[str, Tensor]:
    """log p(label | what came before) at every position.

    Args: input_ids, labels (B, T) as `collate` makes them.
    Returns: log_probs (B, T) in nats, prompt and padding positions included; with return_token_entropy also
    token_entropy (B, T), without gradient.
    """
    logits = at_least_float32(logits_of(model, input_ids))                               # (B, T, V)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)                         # (B, T)
    result = {"log_probs": picked - logits.logsumexp(-1)}
    if return_token_entropy:
        with torch.no_grad():
            result["token_entropy"] = compute_entropy(logits)
    return result


def get_response_log_probs_chunked(model, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False,
                                   response_mask: Tensor | None = None, chunk_tokens: int = 2048) -> dict[str, Tensor]:
    """The same for our TransformerLM without ever holding the (B, T, V) logits: the head runs over `chunk_tokens`
    positions at a time, and again in the backward pass. With a response_mask it runs at the masked positions alone;
    the others come back as 0. At V = 151,936 a chunk of 2048 costs 1.2 GB in fp32 where 256 x 1024 would cost 159 GB.
    """
    if not hasattr(model, "hidden"):
        raise ValueError("the chunked version needs model.hidden(ids) and model.lm_head; "
                         "use get_response_log_probs for other models")
    hidden = model.hidden(input_ids)                                                     # (B, T, D)
    where = torch.ones_like(labels, dtype=torch.bool) if response_mask is None else response_mask.bool()
    rows, targets = hidden[where], labels[where]                                         # (N, D), (N,)

    def head(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(model.lm_head(rows))                                   # (chunk, V)
        entropy = compute_entropy(logits.detach()) if return_token_entropy else logits.new_zeros(len(rows))
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1), entropy

    parts = [checkpoint(head, r, t, use_reentrant=False)
             for r, t in zip(rows.split(chunk_tokens), targets.split(chunk_tokens))] if len(rows) else [
             (rows.sum(-1), rows.sum(-1))]                                               # nothing to score, still a graph
    log_probs = torch.cat([p[0] for p in parts])
    zeros = torch.zeros(labels.shape, dtype=log_probs.dtype, device=labels.device)
    result = {"log_probs": zeros.masked_scatter(where, log_probs)}
    if return_token_entropy:
        result["token_entropy"] = zeros.masked_scatter(where, torch.cat([p[1] for p in parts]).detach())
    return result


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float = 1.0) -> Tensor:
    """Sum over the mask (along `dim`, or over all), divided by a constant. An empty mask sums to 0.

    Masked-out entries are left out, not multiplied by 0: a NaN or inf there does no harm.
    Example: masked_normalize([1, 2, 3], [1, 1, 0], normalize_constant=2) -> 1.5
    """
    kept = tensor.masked_fill(~mask.bool(), 0)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def sft_microbatch_train_step(policy_log_probs: Tensor, response_mask: Tensor, gradient_accumulation_steps: float,
                              normalize_constant: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the responses, and its backward pass.

    loss = mean over the B examples of [-sum over the response / normalize_constant] / gradient_accumulation_steps
    Args: policy_log_probs, response_mask (B, T).
    Returns: (loss as above, detached scalar; metadata). An example with an empty response adds 0 and still counts in B.
    """
    per_example = -masked_normalize(policy_log_probs, response_mask, dim=-1, normalize_constant=normalize_constant)
    loss = per_example.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum().detach(), "per_example": per_example.detach()}


# ---------------------------------------------------------------------------------------------------------------------
# Instruction tuning: documents packed end to end
# ---------------------------------------------------------------------------------------------------------------------

ALPACA_TEMPLATE = ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                   "request.\n\n### Instruction:\n{prompt}\n\n### Response:\n{response}")   # Taori et al. 2023


def read_json_lines(path: str) -> list[dict]:
    """The objects of a .jsonl or .jsonl.gz file. Raises: ValueError naming the line that is not a JSON object."""
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError("not a JSON object")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:                                            # json and unicode errors are ValueErrors
        raise ValueError(f"{path}, line {number if rows or 'number' in locals() else 1}: {error}; "
                         "expected one JSON object a line") from None
    if not rows:
        raise ValueError(f"{path} holds no examples; expected one JSON object a line")
    return rows


class PackedDataset(torch.utils.data.Dataset):
    """Instruction data as one long row of tokens, cut into chunks of `seq_length`.

    Each example becomes the Alpaca template plus the end-of-text id; the documents are joined (in shuffled order
    with shuffle=True, seeded) and cut without overlap. Item i is {"input_ids", "labels"}, each (seq_length,) int64,
    labels shifted by one, so that the last label of a chunk is the first input of the next. A last chunk that is not
    full is dropped. Tokens of the instruction are trained on too: that is what packing trades for its speed.
    """

    def __init__(self, tokenizer, dataset_path: str, seq_length: int, shuffle: bool, seed: int = 0):
        if seq_length < 1:
            raise ValueError(f"seq_length must be at least 1, got {seq_length}")
        examples = read_json_lines(dataset_path)
        for number, example in enumerate(examples, 1):
            if not (isinstance(example.get("prompt"), str) and isinstance(example.get("response"), str)):
                raise ValueError(f"{dataset_path}, example {number}: needs the strings 'prompt' and 'response', "
                                 f"has {sorted(example)}")
        if shuffle:
            random.Random(seed).shuffle(examples)
        ids: list[int] = []
        for example in examples:
            text = ALPACA_TEMPLATE.format(prompt=example["prompt"], response=example["response"])
            ids += encode(tokenizer, text, add_special_tokens=True) + [end_of_text_id(tokenizer)]
        if len(ids) <= seq_length:
            raise ValueError(f"{dataset_path} packs to {len(ids)} tokens: too few for one chunk of {seq_length} + 1")
        self.tokens, self.seq_length = torch.tensor(ids, dtype=torch.long), seq_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"chunk {i} of {len(self)}")
        start, T = i * self.seq_length, self.seq_length
        return {"input_ids": self.tokens[start:start + T], "labels": self.tokens[start + 1:start + T + 1]}


def iterate_batches(dataset, batch_size: int, shuffle: bool, seed: int = 0) -> torch.utils.data.DataLoader:
    """Batches {"input_ids", "labels"} (batch_size, seq_length) over one epoch; the last may be smaller."""
    return torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle,
                                       generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Reading an answer out of free text
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?:(?<![\w)])-)?\.\d+")


def parse_gsm8k_response(model_output: str) -> str | None:
    """The last number of the text, without thousands commas, or None. 'She has 1,234 eggs.' -> '1234'"""
    last = None
    for last in NUMBER.finditer(model_output):
        pass
    return last.group().replace(",", "") if last else None


def parse_mmlu_response(mmlu_example: dict, model_output: str) -> str | None:
    """The letter A..D the text chooses, or None when it chooses none or none of the options.

    In this order: 'answer is B' (the last one said), a text that starts with the letter, a letter in brackets.
    Example: 'The correct answer is B. There is ...' -> 'B'; 'The correct answer is 10000.' -> None
    """
    letters = "ABCD"[:len(mmlu_example.get("options") or "ABCD")]
    said = re.findall(rf"\b(?i:answer|option|choice)\s*(?:is|:)?\s*[:\"'(*]*([{letters}])(?![\w'])(?! [a-z])",
                      model_output)
    if said:
        return said[-1]
    for pattern in (rf"\s*[\"'(*]*([{letters}])(?=[.):,*\"']|\s*$|\n)", rf".*\(([{letters}])\)"):
        match = re.match(pattern, model_output, re.DOTALL)
        if match:
            return match.group(1)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Preference tuning: DPO
# ---------------------------------------------------------------------------------------------------------------------


def alpaca_log_probs(model, tokenizer, prompts: list[str], responses: list[str]) -> Tensor:
    """log p of the whole templated text and the end-of-text id after it, summed over tokens: (B,), in nats.

    The text is tokenized whole. The prompt's share is the same for both responses and cancels in the difference.
    """
    eos = end_of_text_id(tokenizer)
    rows = [encode(tokenizer, ALPACA_TEMPLATE.format(prompt=p, response=r), add_special_tokens=True) + [eos]
            for p, r in zip(prompts, responses)]
    batch = collate([row[:1] for row in rows], [row[1:] for row in rows], pad_id=eos)
    device = next(model.parameters()).device
    scored = get_response_log_probs(model, batch["input_ids"].to(device), batch["labels"].to(device))
    return masked_normalize(scored["log_probs"], batch["response_mask"].to(device), dim=-1)


def preference_margin(model, tokenizer, prompts: list[str], chosen: list[str], rejected: list[str]) -> Tensor:
    """log p(chosen | prompt) - log p(rejected | prompt), (B,): positive where the model prefers the chosen one."""
    scores = alpaca_log_probs(model, tokenizer, prompts + prompts, chosen + rejected)
    return scores[:len(prompts)] - scores[len(prompts):]


def dpo_loss(lm, lm_ref, tokenizer, beta: float, prompt, response_chosen, response_rejected) -> Tensor:
    """-log sigmoid(beta * [policy's margin - reference's margin]), mean over the pairs (arXiv:2305.18290, eq. 7).

    Args: prompt, response_chosen, response_rejected: a string each, or a list of strings each. lm_ref is not
    differentiated and may live on another device. Returns: a scalar on lm's device.
    Sums of log-probs, not means: a mean would reward length for its own sake.
    """
    as_list = [[x] if isinstance(x, str) else list(x) for x in (prompt, response_chosen, response_rejected)]
    if len({len(x) for x in as_list}) != 1 or not as_list[0]:
        raise ValueError(f"need as many prompts as chosen and rejected responses, got {[len(x) for x in as_list]}")
    margin = preference_margin(lm, tokenizer, *as_list)                                  # (B,)
    with torch.no_grad():
        margin_ref = preference_margin(lm_ref, tokenizer, *as_list).to(margin.device)
    return -F.logsigmoid(beta * (margin - margin_ref)).mean()


def read_hh_pairs(path: str) -> list[dict]:
    """Single-turn pairs of a file in the form of Anthropic's HH: {"chosen", "rejected"}, each a whole dialogue
    '\\n\\nHuman: ...\\n\\nAssistant: ...'. Dialogues of several turns, or with different first turns, are left out.
    Lines {"prompt", "chosen", "rejected"} are taken as they are."""
    pairs = []
    for row in read_json_lines(path):
        if not (isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str)):
            raise ValueError(f"{path}: a pair needs the strings 'chosen' and 'rejected', this line has {sorted(row)}")
        if "prompt" in row:
            pairs.append({key: row[key] for key in ("prompt", "chosen", "rejected")})
            continue
        sides = [re.split(r"\n\n(?:Human|Assistant):", row[side]) for side in ("chosen", "rejected")]
        if all(len(side) == 3 and not side[0].strip() for side in sides) and sides[0][1] == sides[1][1]:
            prompt, chosen, rejected = sides[0][1].strip(), sides[0][2].strip(), sides[1][2].strip()
            if chosen != rejected:
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise ValueError(f"{path} holds no single-turn pair")
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# The embedded task: arithmetic with a checkable answer, made by a seeded generator
# ---------------------------------------------------------------------------------------------------------------------

NAMES = "Ann Ben Eva Ivo Kim Leo Mia Tom".split()
THINGS = "apples books coins eggs keys nuts pens shells".split()
WORDS = {"+": "finds {b}", "-": "loses {b}", "*2": "doubles them", "*3": "triples them"}


def arithmetic_problems(count: int, seed: int, held_out: bool = False) -> list[dict]:
    """`count` problems of two to four steps, in words or as an expression; the same for the same seed.

    Held-out problems are those whose numbers and operations hash to 0 modulo 10: no training problem has the same.
    Example: {"question": "What is (7 + 5) * 2 - 3?", "work": "7+5=12, 12*2=24, 24-3=21", "answer": "21"}
    """
    rng = random.Random(f"{seed} {held_out}")
    problems = []
    while len(problems) < count:
        total = start = rng.randint(2, 20)
        expression, key, work, story = str(start), str(start), [], []
        for _ in range(rng.randint(2, 4)):
            operation = rng.choice("+-+-*")
            b = rng.randint(2, 3) if operation == "*" else rng.randint(2, 9)
            after = {"+": total + b, "-": total - b, "*": total * b}[operation]
            if not 0 <= after <= 99:
                break
            work.append(f"{total}{operation}{b}={after}")
            expression = f"({expression}) * {b}" if operation == "*" and work[1:] else f"{expression} {operation} {b}"
            story.append(WORDS[operation if operation != "*" else f"*{b}"].format(b=b))
            total, key = after, key + operation + str(b)
        if len(work) < 2 or (zlib.crc32(key.encode()) % 10 == 0) != held_out:
            continue
        question = f"What is {expression}?" if rng.random() < 0.5 else (
            "{n} has {a} {t}, {middle} and {last}. How many {t} now?".format(
                n=rng.choice(NAMES), a=start, t=rng.choice(THINGS), middle=", ".join(story[:-1]), last=story[-1]))
        problems.append({"question": question, "work": ", ".join(work), "answer": str(total)})
    return problems


def write_arithmetic(folder: str, seed: int, corpus: str = "", count: int = 20_000, demonstrations: int = 512,
                     quick: float = 0.6) -> None:
    """The task as files that the commands here read like any other data:

    base.txt          documents for pre-training: questions with their work (4 of 5) or the answer alone, and `corpus`
    sft.jsonl         {"prompt", "response", "answer"}: the think/answer format. A share `quick` of the demonstrations does
                      not think: it names the answer at once, which a small model seldom gets right. SFT imitates both kinds;
                      only a reward can tell them apart.
    train.jsonl, valid.jsonl    {"prompt", "answer"} for reinforcement learning, and held out
    instructions.jsonl, pairs.jsonl, pairs_valid.jsonl    the task for PackedDataset and DPO: work is preferred to none
    """
    rng = random.Random(seed)
    def prompt(p):
        return f"User: {p['question']}\nAssistant: <think>"
    def thinking(p):
        return f" {p['work']}</think> <answer>{p['answer']}</answer>"
    def guessing(p):
        return f" I know this.</think> <answer>{p['answer']}</answer>"
    problems = arithmetic_problems(count, seed)
    documents = [f"Question: {p['question']}\n" + (f"Work: {p['work']}\n" if rng.random() < 0.8 else "") + f"Answer: {p['answer']}"
                 for p in problems]
    if corpus:
        documents += [corpus[i:i + 500] for i in range(0, len(corpus), 500)]
        rng.shuffle(documents)
    shown, held_out = arithmetic_problems(demonstrations, seed + 1), arithmetic_problems(1000, seed, held_out=True)
    def pair(p):
        return {"prompt": p["question"], "chosen": f"{p['work']}. So {p['answer']}.", "rejected": f"{p['answer']}."}
    files = {"base.txt": "<|endoftext|>".join(documents),
             "sft.jsonl": [{"prompt": prompt(p), "answer": p["answer"],
                            "response": (guessing if rng.random() < quick else thinking)(p)} for p in shown],
             "train.jsonl": [{"prompt": prompt(p), "answer": p["answer"]} for p in problems],
             "valid.jsonl": [{"prompt": prompt(p), "answer": p["answer"]} for p in held_out],
             "instructions.jsonl": [{"prompt": p["question"], "response": pair(p)["chosen" if rng.random() < 0.5 else "rejected"]}
                                    for p in problems[:4000]],
             "pairs.jsonl": [pair(p) for p in shown], "pairs_valid.jsonl": [pair(p) for p in held_out[:200]]}
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        write_whole(os.path.join(folder, name), content.encode())


def write_whole(path: str, content: bytes) -> None:   # twin: grpo.py
    """All of it or nothing: to a temporary name first, then renamed."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def make_base(folder: str, seed: int, steps: int = 800, log: Callable[[str], None] = print) -> None:
    """The embedded base model, a Hugging Face folder: a tokenizer and 0.7 million parameters, both from nothing.

    Numbers are single digits to the tokenizer (it is trained on the text without them), as in Llama 2 and Qwen2.5; the
    tags of the format are special tokens.
    """
    import bpe
    import model as model_py
    import optim
    import train
    data = os.path.join(folder, "data")
    train.gather_corpus(os.path.join(folder, "corpus"))
    with open(os.path.join(folder, "corpus", "train.txt"), encoding="utf-8") as file:
        corpus = file.read(150_000)
    write_arithmetic(data, seed, corpus.replace("<|endoftext|>", "\n"))
    with open(os.path.join(data, "base.txt"), encoding="utf-8") as file:
        text = file.read()
    words = re.sub(r" ?\d+", "\n", text + "User: Assistant: I know this." * 500 + ALPACA_TEMPLATE.format(prompt="", response="So ") * 500)
    write_whole(os.path.join(data, "words.txt"), words.encode())
    special_tokens = ["<|endoftext|>", "<think>", "</think>", "<answer>", "</answer>"]
    vocab, merges = bpe.train_bpe(os.path.join(data, "words.txt"), 512, special_tokens)
    tokenizer = bpe.Tokenizer(vocab, merges, special_tokens)
    tokens = np.array(tokenizer.encode(text), dtype=np.uint16)
    config = train.TrainConfig(steps=steps, batch_size=32, context_length=128, max_lr=3e-3, min_lr=3e-4, warmup_steps=50,
                               eval_every=steps, log_every=100, checkpoint_every=0, seed=seed)
    torch.manual_seed(seed)
    lm = model_py.TransformerLM(model_py.ModelConfig(vocab_size=512, context_length=256, d_model=128, num_layers=3, num_heads=4),
                                attention=model_py.sdpa_attention)
    optimizer = optim.AdamW(lm.parameters(), lr=config.max_lr, betas=(config.beta1, config.beta2), weight_decay=0.1)
    cut = len(tokens) - 20_000
    train.train(lm, optimizer, tokens[:cut], tokens[cut:], config, clip=optim.clip_grad_norm_, log=log,
                schedule=lambda step: optim.cosine_lr(step, config.max_lr, config.min_lr, config.warmup_steps, steps))
    model_py.save_hf(lm, folder, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: prompts in, graded answers out, with either engine
# ---------------------------------------------------------------------------------------------------------------------

REASONING_TEMPLATE = ("Solve the problem step by step, then state the result. The steps go between <think> and </think>, the "
                      "result between <answer> and </answer>.\nUser: {question}\nAssistant: <think>")
MMLU_TEMPLATE = ("Answer this multiple-choice question about {subject}. Reply with the sentence \"The correct answer is _\", "
                 "with A, B, C or D in place of the blank.\n\nQuestion: {question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")


def read_problems(path: str, template: str = REASONING_TEMPLATE, boxed: Callable[[str], str | None] | None = None) -> list[dict]:
    """{"prompt", "answer", "response"} from JSON lines of any of these forms: our own {"prompt", "answer"}; GSM8K's
    {"question", "answer": "... #### 42"}; MATH's {"problem", "solution"}, whose answer is the last \\boxed{} (found by
    `boxed`) unless {"answer"} states it. `response` is the worked solution in the think/answer format, if there is one."""
    problems = []
    for number, row in enumerate(read_json_lines(path), 1):
        if isinstance(row.get("prompt"), str):
            problems.append(row)
            continue
        question, steps = row.get("question", row.get("problem")), row.get("solution", row.get("answer"))
        answer = row.get("answer", boxed(row["solution"]) if boxed and isinstance(row.get("solution"), str) else None)
        if isinstance(answer, str) and "####" in answer:
            steps, _, answer = (part.strip() for part in re.sub(r"<<[^>]*>>", "", answer).rpartition("####"))
        if not isinstance(question, str) or answer is None:
            raise ValueError(f"{path}, example {number}: has {sorted(row)}; expected prompt and answer, question and answer "
                             "(GSM8K), or problem and solution with a \\boxed{} answer (MATH)")
        problems.append({"prompt": template.format(question=question), "answer": str(answer),
                         "response": f" {steps}</think> <answer>{answer}</answer>"})
    return problems


def read_mmlu(path: str) -> list[dict]:
    """The questions of MMLU's CSV files (question, four options, letter), of one file or of a folder of them."""
    problems = []
    for file in sorted(Path(path).rglob("*.csv")) if os.path.isdir(path) else [Path(path)]:
        subject = re.sub(r"_(dev|val|test)$", "", file.stem).replace("_", " ")
        with open(file, encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                if len(row) != 6 or row[5].strip() not in "ABCD":
                    raise ValueError(f"{file}: expected question, four options and a letter A to D in each row, got {row}")
                prompt = MMLU_TEMPLATE.format(subject=subject, question=row[0], **dict(zip("abcd", row[1:5])))
                problems.append({"prompt": prompt, "answer": row[5].strip(), "subject": subject, "options": row[1:5]})
    if not problems:
        raise ValueError(f"{path} holds no MMLU questions")
    return problems


def gsm8k_reward(response: str, ground_truth: str) -> dict[str, float]:
    """The last number of the response against the truth; the format is right if there is a number at all."""
    number = parse_gsm8k_response(response)
    right = number is not None and Fraction(number) == Fraction(str(ground_truth).replace(",", ""))
    return {"reward": float(right), "format_reward": float(number is not None), "answer_reward": float(right)}


def mmlu_reward(response: str, ground_truth: str) -> dict[str, float]:
    letter = parse_mmlu_response({}, response)
    return {"reward": float(letter == ground_truth), "format_reward": float(letter is not None),
            "answer_reward": float(letter == ground_truth)}


def log_generations(engine, tokenizer, problems: list[dict], reward_fn: Callable, *, model=None, path: str | None = None,
                    show: int = 0, log: Callable[[str], None] = print, **settings) -> dict[str, float]:
    """Answer the problems, grade them, and keep a record of each.

    Args: engine.generate as in grpo.py; settings go to it (max_tokens, temperature, stop, seed). model: scores the entropy.
    path: takes a JSON line an answer: prompt, response, truth, the three rewards, mean entropy, length.
    show: prints so many examples of each outcome.
    Returns: accuracy; format; counts of (format, answer) rewards (1,1), (1,0), (0,0); mean entropy in nats per token; mean
    length in tokens of all, right and wrong answers (NaN where there are none); examples_per_second of generation.
    """
    started = time.perf_counter()
    prompt_ids = [encode(tokenizer, p["prompt"]) for p in problems]
    answers = engine.generate(prompt_ids, **settings)
    seconds = time.perf_counter() - started
    rows = [{"prompt": p["prompt"], "response": a.text, "truth": p["answer"], **reward_fn(a.text, p["answer"]),
             "length": len(a.ids)} for p, a in zip(problems, answers)]
    for start in range(0, len(rows) if model is not None else 0, 64):
        device = next(model.parameters()).device
        part = slice(start, start + 64)
        batch = {k: v.to(device) for k, v in collate(prompt_ids[part], [a.ids for a in answers[part]],
                                                     end_of_text_id(tokenizer)).items()}
        with torch.no_grad():
            entropy = get_response_log_probs_chunked(model, batch["input_ids"], batch["labels"], True, batch["response_mask"])
        for row, value, mask in zip(rows[part], entropy["token_entropy"], batch["response_mask"]):
            row["entropy"] = (value.sum() / mask.sum()).item()
    if path:
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    outcome = {(1, 1): [], (1, 0): [], (0, 0): []}
    for row in rows:
        outcome[int(row["format_reward"]), int(row["answer_reward"])].append(row)
    for (form, right), members in outcome.items():
        for row in members[:show]:
            log(f"  format {form}, answer {right}: {row['prompt'][-160:]!r} -> {row['response'][:240]!r} (truth {row['truth']})")
    def mean(key, members):
        values = [row[key] for row in members if key in row]
        return sum(values) / len(values) if values else math.nan
    summary = {"accuracy": mean("answer_reward", rows), "format": mean("format_reward", rows),
               **{f"count_{f}{r}": len(members) for (f, r), members in outcome.items()},
               "entropy": mean("entropy", rows), "length": mean("length", rows), "length_right": mean("length", outcome[1, 1]),
               "length_wrong": mean("length", outcome[1, 0] + outcome[0, 0]), "examples_per_second": len(rows) / seconds}
    return {k: v for k, v in summary.items() if not (isinstance(v, float) and math.isnan(v))}


# ---------------------------------------------------------------------------------------------------------------------
# One loop for the three ways of tuning
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneConfig:
    """One run. batch_size counts examples an optimizer step; micro_batch_size changes memory, not the result."""
    epochs: float = 3.0
    batch_size: int = 32
    micro_batch_size: int = 32
    lr: float = 1e-5
    warmup_share: float = 0.03
    clip_norm: float = 1.0
    eval_every: int = 0                  # steps; 0: at the end only
    keep_best: str = ""                  # keep the weights with the highest of this number of the evaluation
    seed: int = 0


def fine_tune(model, optimizer, examples: list, micro_step: Callable, config: TuneConfig, *, schedule: Callable, clip: Callable,
              evaluate: Callable[[], dict] | None = None, log: Callable[[str], None] = print) -> dict[str, float]:
    """Gradient accumulation, clipping, a schedule, evaluation; what an example is, micro_step alone knows.

    micro_step(examples, accumulation_steps) -> loss, after its backward pass. schedule(step, total) -> learning rate.
    Micro-batches may be unequal: each is told batch / its own size, so that their sum is the batch's mean.
    Returns: the last (or best) evaluation, with "loss" of the last step.
    """
    per_epoch = max(1, len(examples) // config.batch_size)
    total, best, result = max(1, round(config.epochs * per_epoch)), None, {}
    for step in range(total):
        epoch, at = divmod(step, per_epoch)
        order = list(range(len(examples)))
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        batch = [examples[i] for i in order[at * config.batch_size:(at + 1) * config.batch_size]]
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, total)
        loss, began = 0.0, time.perf_counter()
        for start in range(0, len(batch), config.micro_batch_size):
            part = batch[start:start + config.micro_batch_size]
            loss += float(micro_step(part, len(batch) / len(part)))
        norm = float(clip([p for p in model.parameters() if p.grad is not None], config.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss):
            raise ValueError(f"step {step + 1} has loss {loss}; lower the learning rate ({schedule(step, total):.1e})")
        last = step + 1 == total
        if last or (config.eval_every and (step + 1) % config.eval_every == 0):
            result = {"loss": loss, **(evaluate() if evaluate else {})}
            if config.keep_best and (best is None or result[config.keep_best] > best[0][config.keep_best]):
                best = (result, copy.deepcopy(model.state_dict()))
        if last or (step + 1) % 10 == 0 or "accuracy" in result and config.eval_every and (step + 1) % config.eval_every == 0:
            shown = {k: v for k, v in result.items() if k != "loss"} if last or (
                config.eval_every and (step + 1) % config.eval_every == 0) else {}
            log(" | ".join([f"step {step + 1}/{total}", f"loss {loss:.4f}", f"lr {schedule(step, total):.1e}", f"gnorm {norm:.2f}",
                            f"{len(batch) / (time.perf_counter() - began):.0f} examples/s"] + [f"{k} {v:.3f}" for k, v in shown.items()]))
    if best:
        result = best[0]
        model.load_state_dict(best[1])
    return result


def sft_micro_step(model, tokenizer, normalize_constant: float) -> Callable:
    """micro_step for {"prompt", "response"}; the response is followed by end of text unless it ends in </answer>."""
    device = next(model.parameters()).device
    def step(examples: list[dict], accumulation_steps: float) -> Tensor:
        batch = tokenize_prompt_and_output([e["prompt"] for e in examples], [e["response"] for e in examples], tokenizer)
        batch = {key: value.to(device) for key, value in batch.items()}
        log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
        return sft_microbatch_train_step(log_probs, batch["response_mask"], accumulation_steps, normalize_constant)[0]
    return step


def packed_micro_step(model) -> Callable:
    """micro_step for the items of a PackedDataset: the mean over all their labels."""
    device = next(model.parameters()).device
    def step(items: list[dict], accumulation_steps: float) -> Tensor:
        batch = {key: torch.stack([item[key] for item in items]).to(device) for key in ("input_ids", "labels")}
        loss = -get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"].mean() / accumulation_steps
        loss.backward()
        return loss.detach()
    return step


def dpo_micro_step(model, reference, tokenizer, beta: float) -> Callable:
    """micro_step for {"prompt", "chosen", "rejected"}."""
    def step(pairs: list[dict], accumulation_steps: float) -> Tensor:
        loss = dpo_loss(model, reference, tokenizer, beta, *([p[k] for p in pairs] for k in ("prompt", "chosen", "rejected")))
        (loss / accumulation_steps).backward()
        return loss.detach() / accumulation_steps
    return step


@torch.no_grad()
def preference_accuracy(model, tokenizer, pairs: list[dict], batch_size: int = 16) -> float:
    """Share of pairs whose chosen response the policy finds likelier than the rejected one."""
    margins = [preference_margin(model, tokenizer, *([p[k] for p in pairs[i:i + batch_size]] for k in ("prompt", "chosen", "rejected")))
               for i in range(0, len(pairs), batch_size)]
    return (torch.cat(margins) > 0).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Explain, check, time, run
# ---------------------------------------------------------------------------------------------------------------------


class ToyModel(torch.nn.Module):
    """The least that has the interface of a language model: a token's hidden state is its embedding."""

    def __init__(self, vocab_size: int = 11, width: int = 8):
        super().__init__()
        self.embedding, self.lm_head = torch.nn.Embedding(vocab_size, width), torch.nn.Linear(width, vocab_size, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.hidden(ids))


def explain() -> None:
    """A batch of two, with its labels and mask, and what the losses divide by."""
    batch = collate([[1, 2, 3], [1]], [[4, 5], [6, 7]], pad_id=0)
    print("prompts [1 2 3] and [1], outputs [4 5] and [6 7], padded with 0, labels shifted by one:")
    for key, value in batch.items():
        print(f"  {key:14s} {value.int().tolist()}")
    torch.manual_seed(0)
    scored = get_response_log_probs(ToyModel(), batch["input_ids"], batch["labels"], True)
    sums = masked_normalize(scored["log_probs"], batch["response_mask"], dim=-1)
    print(f"log p of the responses: {[round(x, 3) for x in sums.tolist()]} nats, summed under the mask (ln 11 a token would be "
          f"{-2 * math.log(11):.3f})")
    print(f"SFT loss: minus their mean over the 2 examples, {-sums.mean():.3f}; divided once more by the accumulation steps")
    policy, reference = torch.tensor(-3.0 + 5.0), torch.tensor(-4.0 + 4.5)
    print(f"DPO: margin {policy:.1f} of the policy, {reference:.1f} of the reference, beta 0.1: loss "
          f"{-F.logsigmoid(0.1 * (policy - reference)):.4f} = -log sigmoid(0.1 * 1.5); ln 2 = 0.6931 where they agree")


def self_check(seed: int = 0) -> float:
    """Chunked and plain log-probs, entropies and gradients agree, and masks count what they should.

    Raises: AssertionError above 1e-6: float32 log-probs of a few nats are good to 1e-6, a wrong mask is wrong by nats."""
    torch.manual_seed(seed)
    model, worst = ToyModel(), 0.0
    batch = collate([[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 1, 2], [3]], pad_id=0)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["response_mask"]
    assert mask.sum(-1).tolist() == [2, 4, 1] and labels[mask].tolist() == [7, 8, 9, 10, 1, 2, 3], "the mask is not on the output"
    plain = get_response_log_probs(model, ids, labels, True)
    fast = get_response_log_probs_chunked(model, ids, labels, True, mask, chunk_tokens=2)
    for key in plain:
        worst = max(worst, (plain[key].masked_fill(~mask, 0) - fast[key]).abs().max().item())
    grads = [torch.autograd.grad(s["log_probs"][mask].sum(), list(model.parameters())) for s in (plain, fast)]
    worst = max(worst, max((a - b).abs().max().item() for a, b in zip(*grads)))
    leaf = plain["log_probs"].detach().requires_grad_()
    loss, _ = sft_microbatch_train_step(leaf, mask, 2, 3.0)
    worst = max(worst, abs(loss.item() + plain["log_probs"][mask].sum().item() / (3 * 3.0 * 2)))
    assert (leaf.grad != 0).equal(mask), "the gradient is not on the output alone"
    assert worst < 1e-6, f"chunked and plain differ by {worst:.1e}"
    return worst


def bench(repeats: int = 5) -> None:
    """Median milliseconds and peak size of log-probs with backward, plain and chunked, at a vocabulary of 32,000."""
    model = ToyModel(32_000, 128)
    ids = torch.randint(32_000, (4, 256), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 128:] = True
    for name, f in [("plain, (4, 256, 32000) logits", lambda: get_response_log_probs(model, ids, ids)["log_probs"]),
                    ("chunked, half of them masked", lambda: get_response_log_probs_chunked(model, ids, ids, False, mask, 128)["log_probs"])]:
        times = []
        for _ in range(repeats + 1):                                  # the first is a warm-up
            t = time.perf_counter()
            f()[mask].sum().backward()
            times.append((time.perf_counter() - t) * 1e3)
        times = sorted(times[1:])
        print(f"{name:32s} {times[len(times) // 2]:8.1f} ms  (min {times[0]:.1f}, max {times[-1]:.1f})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", nargs="?", default="sft", choices=["sft", "instruct", "dpo", "eval"])
    add("--model", help="Hugging Face folder (default: the embedded one of this seed, made if missing)")
    add("--data", help="JSON lines; default the embedded task's")
    add("--valid", help="held-out problems (sft) or pairs (dpo)")
    add("--out", help="folder for the tuned model")
    add("--task", default="reasoning", choices=["reasoning", "boxed", "gsm8k", "mmlu", "alpaca-eval", "safety"], help="for eval")
    add("--engine", default="torch", choices=["torch", "vllm"])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--epochs", type=float)
    add("--batch-size", type=int)
    add("--micro-batch-size", type=int, default=32)
    add("--lr", type=float)
    add("--beta", type=float, default=0.1, help="of DPO")
    add("--seq-length", type=int, default=128, help="of packed chunks")
    add("--max-tokens", type=int, default=64)
    add("--temperature", type=float, default=1.0)
    add("--limit", type=int, default=256, help="problems to evaluate on")
    add("--eval-every", type=int, default=0)
    add("--base-steps", type=int, default=800)
    add("--seed", type=int, default=0)
    add("--explain", action="store_true")
    add("--bench", action="store_true")
    args = parser.parse_args(argv)
    try:
        if args.bench:
            bench()
        elif args.explain:
            explain()
            print(f"chunked = plain to {self_check(args.seed):.1e}  OK")
        else:
            run(args)
    except (ValueError, OSError) as error:
        print(f"sft.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """The actions that need the sibling files."""
    import bpe
    import grpo
    import model as model_py
    import optim
    home = f"out/arithmetic-{args.seed}"
    defaults = {"sft": ("base", "sft.jsonl", "valid.jsonl", 3, 32, 1e-3), "instruct": ("base", "instructions.jsonl", None, 2, 32, 1e-3),
                "dpo": ("instruct", "pairs.jsonl", "pairs_valid.jsonl", 1, 32, 1e-5), "eval": ("sft", "valid.jsonl", None, 0, 1, 0.0)}
    folder, data, valid, epochs, batch_size, lr = defaults[args.action]
    source = args.model or f"{home}/{folder}"
    data, valid = args.data or f"{home}/base/data/{data}", args.valid or (f"{home}/base/data/{valid}" if valid and not args.data else None)
    out = args.out or f"{home}/{args.action}"
    if not args.model and not os.path.exists(f"{home}/base/config.json"):
        print(f"training the base model {home}/base from scratch")
        make_base(f"{home}/base", args.seed, args.base_steps)
    model = model_py.load_hf(source, device=args.device, attention=model_py.sdpa_attention)
    tokenizer = bpe.Tokenizer.from_file(os.path.join(source, "tokenizer.json"))
    print(f"{args.action}: {source}, {model_py.count_parameters(model):,} parameters, on {args.device}; data {data}")
    engine = grpo.open_engine(args.engine, model, tokenizer, source, end_of_text_id(tokenizer))
    settings = dict(max_tokens=args.max_tokens, min_tokens=1, stop=["</answer>"], seed=args.seed)
    config = TuneConfig(epochs=args.epochs or epochs, batch_size=args.batch_size or batch_size, lr=args.lr or lr, seed=args.seed,
                        micro_batch_size=args.micro_batch_size, eval_every=args.eval_every, keep_best="accuracy" if args.action == "dpo" else "")

    def schedule(step, total):
        return optim.cosine_lr(step, config.lr, config.lr / 10, round(config.warmup_share * total), total)

    def held_out(temperature=args.temperature, **options):
        problems = read_problems(valid, boxed=grpo.balanced_box)[:args.limit]
        engine.sync(model)
        return log_generations(engine, tokenizer, problems, grpo.r1_zero_reward, model=model, temperature=temperature, **settings, **options)
    common = dict(schedule=schedule, clip=optim.clip_grad_norm_)
    if args.action == "sft":
        examples = read_problems(data, boxed=grpo.balanced_box)
        mean_length = sum(len(encode(tokenizer, e["response"])) for e in examples) / len(examples)
        optimizer = optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        result = fine_tune(model, optimizer, examples, sft_micro_step(model, tokenizer, mean_length), config,
                           evaluate=held_out if valid else None, **common)
        if valid:
            result = held_out(path=f"{out}-generations.jsonl", show=2) | {"greedy": held_out(temperature=0.0)["accuracy"]}
    elif args.action == "instruct":
        dataset = PackedDataset(tokenizer, data, args.seq_length, shuffle=True, seed=args.seed)
        optimizer = optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        result = fine_tune(model, optimizer, [dataset[i] for i in range(len(dataset))], packed_micro_step(model), config, **common)
    elif args.action == "dpo":
        pairs, held = read_hh_pairs(data), read_hh_pairs(valid) if valid else None
        if held is None:                                              # every tenth pair judges, and is not learned from
            pairs, held = [p for i, p in enumerate(pairs) if i % 10], pairs[::10]
        reference = copy.deepcopy(model).requires_grad_(False)
        print(f"preference accuracy before: {preference_accuracy(model, tokenizer, held):.3f}")
        optimizer = torch.optim.RMSprop(model.parameters(), lr=config.lr)
        result = fine_tune(model, optimizer, pairs, dpo_micro_step(model, reference, tokenizer, args.beta), config,
                           evaluate=lambda: {"accuracy": preference_accuracy(model, tokenizer, held)}, **common)
    else:
        result = evaluate_task(args, engine, tokenizer, model, data, settings, grpo)
    if args.action != "eval":
        model_py.save_hf(model, out, tokenizer)
        print(f"wrote {out}")
    print("RESULT " + json.dumps({"action": args.action, "seed": args.seed, **result}))


def evaluate_task(args, engine, tokenizer, model, data, settings, grpo) -> dict[str, float]:
    """Zero-shot: answers to a file, graded where there is a truth."""
    out = args.out or f"out/eval-{args.task}.jsonl"
    settings |= {"temperature": args.temperature, "stop": []}
    if args.task in ("alpaca-eval", "safety"):
        if args.task == "alpaca-eval":
            with open(data, encoding="utf-8") as file:
                rows = [{"instruction": row["instruction"], "dataset": row.get("dataset", "")} for row in json.load(file)][:args.limit]
        else:
            with open(data, encoding="utf-8", newline="") as file:
                rows = [{"prompts_final": row["prompts_final"]} for row in csv.DictReader(file)][:args.limit]
        prompts = [ALPACA_TEMPLATE.format(prompt=row.get("instruction", row.get("prompts_final")), response="") for row in rows]
        answers = engine.generate([encode(tokenizer, p) for p in prompts], **settings)
        for row, answer in zip(rows, answers):
            row |= {"output": answer.text} | ({"generator": args.model} if args.task == "alpaca-eval" else {})
        text = json.dumps(rows, indent=1) if args.task == "alpaca-eval" else "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(out, text.encode())
        return {"answers": len(rows)}
    reward, template = {"reasoning": (grpo.r1_zero_reward, REASONING_TEMPLATE), "boxed": (grpo.question_only_reward, "{question}"),
                        "gsm8k": (gsm8k_reward, "{question}\nAnswer:"), "mmlu": (mmlu_reward, "")}[args.task]
    problems = (read_mmlu(data) if args.task == "mmlu" else read_problems(data, template, grpo.balanced_box))[:args.limit]
    if args.task == "reasoning":
        settings["stop"] = ["</answer>"]
    return log_generations(engine, tokenizer, problems, reward, model=model, path=out, show=3, **settings)


if __name__ == "__main__":
    sys.exit(main())
