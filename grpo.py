"""grpo.py - reinforcement learning from verifiable rewards: a grader, policy gradients up to GRPO, and the loop.

What:       Sample several answers to a question, grade each by rule, and make the better ones of the group likelier:
            REINFORCE, GRPO, Dr. GRPO, DAPO's asymmetric clip, GSPO and expert iteration, one loop for all of them,
            with our own generator or vLLM producing the answers.
Source:     Shao et al. 2024, arXiv:2402.03300 (GRPO); DeepSeek-AI 2025, arXiv:2501.12948 (R1-Zero rewards);
            Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Yu et al. 2025, arXiv:2503.14476 (DAPO);
            Zheng et al. 2025, arXiv:2507.18071 (GSPO); Anthony et al. 2017, arXiv:1705.08439 (expert iteration).
Copy:       this file alone; needs torch. main() alone imports siblings (bpe, model, optim, sft). MIT.
"""
from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Callable

import torch
from torch import Tensor

# Dims: N rollouts of a batch, G group size, B sequences of a micro-batch, T label positions

# ---------------------------------------------------------------------------------------------------------------------
# Rewards that can be verified
# ---------------------------------------------------------------------------------------------------------------------
# The grader never runs the model's text, and reads it once: no eval, no symbolic algebra, no big powers, and nothing
# longer than MAX_ANSWER characters is an answer. What it can parse as a number it compares exactly; the rest as text.

MAX_ANSWER = 256
SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9}
UNITS = set("mm cm dm m km in ft yd mi mg g kg lb lbs oz ml l h hr hrs s sec min mph kmh am pm x".split()) - {"x"}
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
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, min(len(text), start + 4 * MAX_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def normalize_answer(text: str) -> str:
    r"""One spelling for what means the same: `\dfrac12` -> `1/2`, `\text{ cm}` -> ` cm`, `$5,000$.` -> `5,000`."""
    for old, new in SPELLING:
        text = text.replace(old, new)
    text = TEXT.sub(r" \1", text)
    text = re.sub(r"\\sqrt ?\{(\w)\}", r"\\sqrt\1", text)
    text = SHORT_FRACTION.sub(lambda m: f" ({m[1] or m[2]})/({m[3] or m[4]})", text)
    text = re.sub(r"\(([+-]?\\?[\w.]+)\)/\(([+-]?\\?[\w.]+)\)", r"\1/\2", text)    # (1)/(2) -> 1/2, and "2 1/2" is mixed
    text = re.sub(r"([+-]) (?=\d)", r"\1", re.sub(r"\s+", " ", text)).strip().rstrip(".").strip()
    text = re.sub(r"^[A-Za-z](?:_\{?\w+\}?)? ?(?:=|\\in(?![a-z])) ?", "", text)   # x = 5 -> 5
    return text


def parse_number(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a normalized number, or None. '1 1/2 cm' -> (3/2, 'cm'); '50%' -> (50, '%'); '2x' -> None."""
    match = NUMBER.match(text)
    if not match or len(text) > MAX_ANSWER:
        return None
    part = match.groupdict()
    try:
        if part["whole"]:
            value = Fraction(part["whole"]) + Fraction(int(part["mixed"]), int(part["over"]))
        else:
            value = Fraction(part["top"].replace(",", "").rstrip("."))
            if part["bottom"]:
                value /= Fraction(part["bottom"].replace(",", "").rstrip("."))
    except ZeroDivisionError:
        return None
    value *= (-1 if part["sign"] == "-" else 1) * Fraction(10) ** int(part["power"] or 0)
    rest = text[match.end():]
    words = rest.lower().split()
    if words and words[0] in SCALES:
        value, words = value * SCALES[words[0]], words[1:]
    unit = re.sub(r"\^\{?([23])\}?", r"\1", " ".join(words))
    if not unit or unit == "%" or unit == "percent":
        return value, "%" if unit else ""
    attached = not rest.startswith(" ")
    if re.fullmatch(r"[a-z][a-z.]*[23]?(?:[ /][a-z][a-z.]*[23]?)*", unit) and (
            unit.rstrip("23.") in UNITS or (not attached and len(unit) > 1)):
        return value, unit.rstrip(".")
    return None


def split_list(text: str) -> tuple[str, list[str], str] | None:
    """('(', ['1', '2'], ')') of '(1, 2)'; brackets are '' for a bare list; None if there is no comma at the top level.
    A comma inside a thousands number counts as part of the number only where there are no brackets."""
    depths, left, right = [], "", ""
    for character in text:
        depths.append((depths[-1] if depths else 0) + (character in "([{\u27e8") - (character in ")]}\u27e9"))
    if text[:1] and text[0] in "([\u27e8" and text[-1] in ")]\u27e9" and 0 not in depths[:-1]:   # one pair around it all
        left, right, text, depths = text[0], text[-1], text[1:-1], [depth - 1 for depth in depths[1:-1]]
    parts, start = [], 0
    for i, character in enumerate(text):
        if character == "," and depths[i] == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return (left, parts, right) if len(parts) > 1 or left else None


def same_answer(given: str, truth: str, depth: int = 0) -> bool:
    """Whether two normalized answers mean the same. See `grade`."""
    a, b = parse_number(given), parse_number(truth)
    if a and b:
        (x, unit_x), (y, unit_y) = a, b
        if "%" in (unit_x, unit_y):                         # 50% is 0.5, and "50" where the question asked for percent
            per_cent = [v / 100 if u == "%" else v for v, u in (a, b)]
            return x == y or per_cent[0] == per_cent[1]
        return x == y and (not unit_x or not unit_y or unit_x.rstrip("s") == unit_y.rstrip("s"))
    lists = [split_list(given), split_list(truth)]
    if lists[0] and lists[1] and depth < 3:
        (left_a, parts_a, right_a), (left_b, parts_b, right_b) = lists
        if (left_a, right_a) == (left_b, right_b) and len(parts_a) == len(parts_b) <= 16:
            if left_a in ("", "\u27e8"):                    # {1, 2} and the bare "1, 2" are sets: any order
                left = list(parts_b)
                for part in parts_a:
                    found = next((i for i, other in enumerate(left) if same_answer(part, other, depth + 1)), None)
                    if found is None:
                        return False
                    left.pop(found)
                return True
            return all(same_answer(p, q, depth + 1) for p, q in zip(parts_a, parts_b))
    return bool(bare_text(given)) and bare_text(given) == bare_text(truth)


def bare_text(text: str) -> str:
    """Text without case, spaces (but those between digits), braces and backslashes; '(C)' becomes 'c'."""
    text = re.sub(r"(?<!\d) | (?!\d)|[\\{}]", "", text).lower()
    return text[1] if re.fullmatch(r"\([a-z]\)", text) else text


def grade(given: str, truth: str) -> bool:
    r"""Is `given` the same answer as `truth`?

    Numbers are compared exactly as fractions: 0.5 = 1/2 = \frac12 = 50%, 1,234 = 1234, 1\frac12 = 3/2; 0.33 is not
    1/3. A unit may be left out but not be another one. Tuples and intervals need equal brackets and order; sets and
    bare lists any order. Everything else is compared as text without spaces, case and LaTeX's decoration: 2\sqrt3
    equals 2\sqrt{3} and not \sqrt{12}. Answers of more than 256 characters are wrong.
    """
    given, truth = given.strip(), str(truth).strip()
    if not given or len(given) > MAX_ANSWER or len(truth) > MAX_ANSWER:
        return False
    return same_answer(normalize_answer(given), normalize_answer(truth))


def graded(answer: str | None, ground_truth) -> dict[str, float]:
    """The three rewards, from an answer that was found (or None when the format was wrong)."""
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    right = answer is not None and any(grade(answer, str(truth)) for truth in truths)
    return {"reward": float(right), "format_reward": float(answer is not None), "answer_reward": float(right)}


def r1_zero_reward(response: str, ground_truth) -> dict[str, float]:
    r"""1 for a right answer in the form `... </think> <answer> ... </answer>`, otherwise 0.

    The format alone is reported but earns nothing: a policy would learn to be content with it. The last <answer>
    counts. ground_truth: a string or number, or a list of acceptable ones. An answer may stand in \boxed{}.
    Example: r1_zero_reward("2+2=4 </think> <answer> 4 </answer>", "4")["reward"] -> 1.0
    """
    if "</think> <answer>" not in response:
        return graded(None, ground_truth)
    answer, closed, _ = response[response.rfind("<answer>") + len("<answer>"):].partition("</answer>")
    if not closed:
        return graded(None, ground_truth)
    if r"\boxed{" in answer:
        answer = balanced_box(answer) or ""
    return graded(answer, ground_truth)


def question_only_reward(response: str, ground_truth) -> dict[str, float]:
    r"""1 for a right answer in the last `\boxed{}` of the response, otherwise 0; for prompts that are the bare question."""
    return graded(balanced_box(response), ground_truth)


# ---------------------------------------------------------------------------------------------------------------------
# The algorithms, each next to its equation
# ---------------------------------------------------------------------------------------------------------------------


def masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the entries where mask is true, along `dim` or over all. NaN where the mask is empty (0 / 0): a mean of
    nothing has no value, and silence about it would hide an empty response.
    Example: masked_mean([1, 2, 3], [1, 1, 0]) -> 1.5
    """
    kept = tensor.masked_fill(~mask.bool(), 0)
    counts = mask.bool().to(tensor.dtype)
    return kept.sum() / counts.sum() if dim is None else kept.sum(dim) / counts.sum(dim)


def compute_group_normalized_rewards(
        reward_fn: Callable, rollout_responses: list[str], repeated_ground_truths: list, group_size: int,
        advantage_eps: float, normalize_by_std: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group of answers to one question (arXiv:2402.03300, sec. 4.1.2).

    std is the unbiased one (divided by G - 1). With normalize_by_std=False the division is left out (Dr. GRPO).
    Defined also at the edges: a group of one, and a group whose rewards are all alike, has advantage 0.
    Args: rollout_responses, repeated_ground_truths: N each, a group's members next to each other; N a multiple of G.
    Returns: advantages (N,), raw_rewards (N,), float32, and metadata: mean, std, min and max of the rewards, the means
    of format and answer reward, and the share of groups without signal.
    """
    N = len(rollout_responses)
    if group_size < 1 or N == 0 or N % group_size or len(repeated_ground_truths) != N:
        raise ValueError(f"{N} responses and {len(repeated_ground_truths)} ground truths do not make groups of "
                         f"{group_size}; need equally many of both, a multiple of the group size")
    scores = [reward_fn(response, truth) for response, truth in zip(rollout_responses, repeated_ground_truths)]
    raw = torch.tensor([score["reward"] for score in scores], dtype=torch.float64)       # (N,)
    groups = raw.view(-1, group_size)                                                    # (N / G, G)
    alike = (groups == groups[:, :1]).all(dim=1, keepdim=True)                           # true for a group of one
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std and group_size > 1:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + advantage_eps).masked_fill(alike, 1.0)
    advantages = advantages.masked_fill(alike, 0.0)
    metadata = {"reward_mean": raw.mean().item(), "reward_std": raw.std(correction=0).item(),
                "reward_min": raw.min().item(), "reward_max": raw.max().item(),
                "groups_without_signal": alike.double().mean().item()}
    for key in ("format_reward", "answer_reward"):
        metadata[key] = sum(score.get(key, 0.0) for score in scores) / N
    return advantages.reshape(N).float(), raw.float(), metadata


def column(values: Tensor, log_probs: Tensor, name: str) -> Tensor:
    """(B, 1): one value a sequence. A bare (B,) would broadcast along T without a word when B == T."""
    if values is None or values.numel() != log_probs.shape[0]:
        raise ValueError(f"{name} must hold one value a sequence, shape ({log_probs.shape[0]}, 1); "
                         f"got {None if values is None else tuple(values.shape)}")
    return values.reshape(-1, 1)


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """REINFORCE: -A_i log pi(o_t) per token. Args: (B, 1), (B, T). Returns: (B, T)."""
    return -column(raw_rewards_or_advantages, policy_log_probs, "raw_rewards_or_advantages") * policy_log_probs


def clip_range(cliprange) -> tuple[float, float]:
    """(low, high) of 0.2, or of (0.2, 0.28) (DAPO's "clip higher": room for unlikely tokens to grow)."""
    low, high = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(f"cliprange must be between 0 and 1 below and at least 0 above, got {cliprange}")
    return 1.0 - low, 1.0 + high


def clipped_surrogate(ratio: Tensor, advantages: Tensor, cliprange) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), and where the clipped side is the smaller one."""
    low, high = clip_range(cliprange)
    free, clipped = ratio * advantages, ratio.clamp(low, high) * advantages
    return -torch.minimum(free, clipped), {"clipped": (clipped < free).detach(), "ratio": ratio.detach()}


def compute_grpo_clip_loss(advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor,
                           cliprange) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's per-token loss, with rho_t = pi(o_t) / pi_old(o_t) (arXiv:2402.03300, eq. 3, without the KL term).

    Args: advantages (B, 1), policy_log_probs and old_log_probs (B, T), cliprange a number or (low, high).
    Returns: loss (B, T); metadata "clipped" (B, T) bool: where the clip took the gradient away, "ratio" (B, T).
    """
    ratio = (policy_log_probs - old_log_probs.detach()).exp()
    return clipped_surrogate(ratio, column(advantages, policy_log_probs, "advantages"), cliprange)


def compute_grpo_no_clip_loss(advantages: Tensor, policy_log_probs: Tensor,
                              old_log_probs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The ablation: -rho_t A_i, nothing holds the policy near the one that sampled."""
    ratio = (policy_log_probs - old_log_probs.detach()).exp()
    return -ratio * column(advantages, policy_log_probs, "advantages"), {"ratio": ratio.detach()}


def compute_gspo_loss(advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange,
                      response_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """GSPO: one ratio a sequence, s_i = exp(mean_t [log pi - log pi_old]), clipped as a whole (arXiv:2507.18071, eq. 5, 7).
    Returned at every token, so that the mean over a sequence is the sequence's loss. cliprange is small here: 3e-4."""
    log_ratio = masked_mean(policy_log_probs - old_log_probs.detach(), response_mask, dim=-1).unsqueeze(-1)   # (B, 1)
    loss, metadata = clipped_surrogate(log_ratio.exp(), column(advantages, policy_log_probs, "advantages"), cliprange)
    return loss.expand_as(policy_log_probs), {k: v.expand_as(policy_log_probs) for k, v in metadata.items()}


LOSS_TYPES = ("no_baseline", "reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "gspo")


def compute_policy_gradient_loss(policy_log_probs: Tensor, loss_type: str, raw_rewards: Tensor | None = None,
                                 advantages: Tensor | None = None, old_log_probs: Tensor | None = None,
                                 cliprange=None, response_mask: Tensor | None = None) -> tuple[Tensor, dict]:
    """The per-token loss (B, T) of that name, and its metadata. raw_rewards and advantages are (B, 1)."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is none of {', '.join(LOSS_TYPES)}")
    needed = {"no_baseline": {"raw_rewards": raw_rewards}, "reinforce_with_baseline": {"advantages": advantages}}.get(
        loss_type, {"advantages": advantages, "old_log_probs": old_log_probs})
    if loss_type in ("grpo_clip", "gspo"):
        needed["cliprange"] = cliprange
    if loss_type == "gspo":
        needed["response_mask"] = response_mask
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValueError(f"loss_type {loss_type!r} needs {' and '.join(missing)}")
    if loss_type == "no_baseline":
        return compute_naive_policy_gradient_loss(raw_rewards, policy_log_probs), {}
    if loss_type == "reinforce_with_baseline":
        return compute_naive_policy_gradient_loss(advantages, policy_log_probs), {}
    if loss_type == "grpo_clip":
        return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
    if loss_type == "grpo_no_clip":
        return compute_grpo_no_clip_loss(advantages, policy_log_probs, old_log_probs)
    return compute_gspo_loss(advantages, policy_log_probs, old_log_probs, cliprange, response_mask)


def aggregate(per_token: Tensor, mask: Tensor, length_normalization: str = "sequence",
              normalize_constant: float | None = None) -> Tensor:
    """From (B, T) to a scalar. Who divides by what is a choice with consequences:

    sequence  (1/B) sum_i (1/|o_i|) sum_t: every answer counts alike, so a token of a long one counts less (GRPO)
    token     (1/sum_i |o_i|) sum_i sum_t: every token counts alike (DAPO, sec. 3.3)
    constant  (1/B) sum_i (1/C) sum_t, C fixed, as the token limit: length changes no token's weight (Dr. GRPO, sec. 3.2)
    """
    if length_normalization == "sequence":
        return masked_mean(per_token, mask, dim=-1).mean()
    if length_normalization == "token":
        return masked_mean(per_token, mask)
    if length_normalization == "constant" and normalize_constant:
        return per_token.masked_fill(~mask.bool(), 0).sum(-1).div(normalize_constant).mean()
    raise ValueError(f"length_normalization {length_normalization!r} with normalize_constant {normalize_constant}: "
                     "use 'sequence', 'token', or 'constant' with a positive constant")


def grpo_microbatch_train_step(
        policy_log_probs: Tensor, response_mask: Tensor, gradient_accumulation_steps: float, loss_type: str,
        raw_rewards: Tensor | None = None, advantages: Tensor | None = None, old_log_probs: Tensor | None = None,
        cliprange=None, *, length_normalization: str = "sequence", normalize_constant: float | None = None,
        importance_weights: Tensor | None = None) -> tuple[Tensor, dict]:
    """One micro-batch: per-token loss, `aggregate`, divided by gradient_accumulation_steps, backward.

    Args: policy_log_probs, response_mask, old_log_probs, importance_weights (B, T); raw_rewards, advantages (B, 1).
    gradient_accumulation_steps may be a fraction: for micro-batches of unequal size, B_all / B (or tokens_all /
    tokens with "token") makes their sum the loss of the whole batch exactly.
    Returns: (loss as divided, detached; metadata with "clip_fraction" over the response tokens where there is a clip).
    """
    per_token, metadata = compute_policy_gradient_loss(policy_log_probs, loss_type, raw_rewards, advantages,
                                                       old_log_probs, cliprange, response_mask)
    if importance_weights is not None:
        per_token = per_token * importance_weights.detach()
    loss = aggregate(per_token, response_mask, length_normalization, normalize_constant) / gradient_accumulation_steps
    loss.backward()
    if "clipped" in metadata:
        metadata["clip_fraction"] = masked_mean(metadata["clipped"].float(), response_mask)
    return loss.detach(), metadata
