"""sft.py - supervised and preference tuning: from a base model to one that answers in a format and prefers better answers.

What:       The tensors of fine-tuning (ids, labels, masks, log-probabilities, entropies), supervised fine-tuning on
            prompt/response pairs, packed instruction tuning, DPO, zero-shot evaluation, and an arithmetic task with
            a checkable answer, made by a seeded generator, on which all of it runs on a laptop.
Source:     Ouyang et al. 2022, arXiv:2203.02155 (SFT); Taori et al. 2023, Alpaca (the prompt template);
            Rafailov et al. 2023, arXiv:2305.18290, eq. 7 (DPO).
Copy:       this file alone; needs torch. main() alone imports siblings (bpe, model, optim, train, grpo). MIT.
"""
from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from typing import Callable, Iterable, Iterator

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
