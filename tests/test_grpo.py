"""grpo.py against hand-worked numbers (tests/fixtures/grpo_*.json), its edges, bad input, and its loop."""

import json
import math
from pathlib import Path

import pytest
import torch

import grpo

FIXTURES = Path(__file__).parent / "fixtures"
NUMBERS = json.loads((FIXTURES / "grpo_numbers.json").read_text())
# The numbers are float64 to about 16 digits and so is the code under test here: 1e-12 leaves room for the order of sums
# only. The wrong versions (no clip, token mean for sequence mean, biased std, no accumulation) are wrong by over 1e-2.
TIGHT = dict(rtol=0, atol=1e-12)


def number(name):
    return torch.tensor(NUMBERS[name], dtype=torch.float64)


def fixed_reward(rewards):
    """A reward function that reads the reward off a list; the response is the index."""
    return lambda response, truth: {
        "reward": rewards[int(response)],
        "format_reward": 1.0,
        "answer_reward": float(truth),
    }


# -------------------------------------------------------------------------------- the grader


@pytest.mark.parametrize("given, truth, right", json.loads((FIXTURES / "grpo_graded.json").read_text()))
def test_graded_answers(given, truth, right):
    assert grpo.grade(given, truth) is right


def test_right_answers_are_right_both_ways():
    for given, truth, right in json.loads((FIXTURES / "grpo_graded.json").read_text()):
        assert grpo.grade(truth, given) is right, (truth, given)


@pytest.mark.parametrize(
    "response, truth, format_reward, reward",
    [
        ("2+2=4 </think> <answer> 4 </answer>", "4", 1, 1),
        ("2+2=4 </think> <answer>4</answer> and more", 4, 1, 1),
        ("2+2=5 </think> <answer> 5 </answer>", "4", 1, 0),
        ("2+2=4</think><answer> 4 </answer>", "4", 0, 0),  # the space between the tags is the format
        ("2+2=4 </think> <answer> 4", "4", 0, 0),  # never closed
        ("</answer> </think> <answer> 4", "4", 0, 0),  # closed before it opened
        ("<answer> 4 </answer>", "4", 0, 0),  # no thinking
        ("4", "4", 0, 0),
        ("", "4", 0, 0),
        ("x </think> <answer> </answer>", "4", 1, 0),
        ("x </think> <answer> 3 </answer> <answer> 4 </answer>", "4", 1, 1),  # the last one counts
        ("x </think> <answer> 4 </answer> <answer> 3 </answer>", "4", 1, 0),
        (r"x </think> <answer> \boxed{\frac{1}{2}} </answer>", "0.5", 1, 1),
        (r"x </think> <answer> \boxed{4 </answer>", "4", 1, 0),
        ("x </think> <answer> 0.5 </answer>", ["7", "1/2"], 1, 1),  # any of several truths
        ("x </think> <answer> 0.5 </answer>", 0.5, 1, 1),
    ],
)
def test_r1_zero_reward(response, truth, format_reward, reward):
    assert grpo.r1_zero_reward(response, truth) == {
        "format_reward": float(format_reward),
        "answer_reward": float(reward),
        "reward": float(reward),
    }


@pytest.mark.parametrize(
    "response, format_reward, reward",
    [
        (r"so \boxed{4}", 1, 1),
        (r"\boxed{3} no, \boxed{4}", 1, 1),
        (r"\boxed{4} no, \boxed{3}", 1, 0),
        (r"\boxed{\frac{8}{2}}", 1, 1),
        (r"\boxed{{4}}", 1, 1),
        (r"\boxed{4", 0, 0),
        ("4", 0, 0),
        (r"\boxed{}", 1, 0),
        ("4}", 0, 0),
        (r"\boxed{4}}", 1, 1),
    ],
)
def test_question_only_reward(response, format_reward, reward):
    got = grpo.question_only_reward(response, "4")
    assert (got["format_reward"], got["reward"]) == (format_reward, reward)


HOSTILE = {
    "braces": "{" * 10**6,
    "boxes": r"\boxed{" * 150_000,
    "open box": r"\boxed{" + "{" * 10**6,
    "closed box": r"\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
    "digits": "9" * 10**6,
    "answer of digits": "</think> <answer>" + "9" * 10**6 + "</answer>",
    "tags": "</think> <answer>" * 60_000,
    "boxed digits": r"\boxed{" + "9" * 10**6 + "}",
    "fractions": r"\boxed{" + r"\frac{" * 160_000 + "}",
    "power": "</think> <answer> 9e99 </answer>",
    "commas": "</think> <answer> (" + "1," * 120 + "1) </answer>",
    "nested": "</think> <answer> " + "(1," * 80 + "</answer>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_read_once(name):
    # No clock here: a scan that is quadratic in these 1 MB would not come back for hours. `--bench` prints the time.
    for reward in (grpo.r1_zero_reward, grpo.question_only_reward):
        assert reward(HOSTILE[name], "1")["reward"] == 0


def test_model_text_is_never_run(tmp_path):
    witness = tmp_path / "witness"
    text = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    grpo.r1_zero_reward(f"</think> <answer> {text} </answer>", "1")
    assert not witness.exists()


# -------------------------------------------------------------------------------- group advantages


def test_group_normalized_rewards_known_answer():
    rewards, G = NUMBERS["raw_rewards"], NUMBERS["group_size"]
    for by_std, expected in ((True, "advantages"), (False, "advantages_without_std")):
        advantages, raw, metadata = grpo.compute_group_normalized_rewards(
            fixed_reward(rewards), ["0", "1", "2", "3"], [1, 0, 0, 1], G, NUMBERS["advantage_eps"], by_std
        )
        # float32 out: 2^-24 relative; a biased std would be wrong by a factor of 1.41, a left-out eps by 2e-6
        torch.testing.assert_close(advantages.double(), number(expected), rtol=1e-7, atol=0)
        assert raw.tolist() == rewards and metadata["reward"] == 0.5 and metadata["answer_reward"] == 0.5


def test_groups_without_signal_have_advantage_zero():
    for rewards, G in (([1.0, 0.5, 0.2], 1), ([0.1] * 6, 3), ([0.0] * 4, 4)):
        for eps in (1e-6, 0.0):
            advantages, _, metadata = grpo.compute_group_normalized_rewards(
                fixed_reward(rewards), [str(i) for i in range(len(rewards))], [0] * len(rewards), G, eps, True
            )
            assert advantages.tolist() == [0.0] * len(rewards) and metadata["no_signal"] == 1.0


@pytest.mark.parametrize(
    "responses, truths, group_size", [(["0"] * 3, [1] * 3, 2), ([], [], 2), (["0"] * 2, [1], 2), (["0"], [1], 0)]
)
def test_groups_that_do_not_divide(responses, truths, group_size):
    with pytest.raises(ValueError, match="groups of"):
        grpo.compute_group_normalized_rewards(fixed_reward([1]), responses, truths, group_size, 1e-6, True)


# -------------------------------------------------------------------------------- losses


def arguments():
    return dict(
        raw_rewards=number("raw_rewards")[:, None],
        advantages=number("advantages")[:, None],
        old_log_probs=number("old_log_probs"),
    )


@pytest.mark.parametrize("loss_type", NUMBERS["per_token"])
def test_per_token_losses(loss_type):
    loss, metadata = grpo.compute_policy_gradient_loss(
        number("policy_log_probs"), loss_type, cliprange=0.2, response_mask=torch.tensor(NUMBERS["mask"]), **arguments()
    )
    torch.testing.assert_close(loss, torch.tensor(NUMBERS["per_token"][loss_type], dtype=torch.float64), **TIGHT)
    if loss_type == "grpo_clip":
        assert metadata["clipped"].tolist() == [[bool(x) for x in row] for row in NUMBERS["clipped"]]


@pytest.mark.parametrize(
    "case",
    NUMBERS["steps"],
    ids=lambda c: "-".join(str(c[k]) for k in ("loss_type", "length_normalization", "cliprange", "weighted")),
)
def test_microbatch_step_known_answer(case):
    log_probs = number("policy_log_probs").requires_grad_()
    loss, metadata = grpo.grpo_microbatch_train_step(
        log_probs,
        torch.tensor(NUMBERS["mask"]),
        NUMBERS["gradient_accumulation_steps"],
        case["loss_type"],
        cliprange=tuple(case["cliprange"]),
        length_normalization=case["length_normalization"],
        normalize_constant=case["normalize_constant"],
        importance_weights=number("importance_weights") if case["weighted"] else None,
        **arguments(),
    )
    torch.testing.assert_close(loss.double(), torch.tensor(case["loss"], dtype=torch.float64), **TIGHT)
    torch.testing.assert_close(log_probs.grad, torch.tensor(case["gradient"], dtype=torch.float64), **TIGHT)
    if case["clip_fraction"] is not None:
        assert abs(metadata["clip_fraction"].item() - case["clip_fraction"]) < 1e-6
    assert not loss.requires_grad


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_ragged_micro_batches_are_the_whole_batch(normalization):
    mask, whole = torch.tensor(NUMBERS["mask"]), number("policy_log_probs").requires_grad_()
    settings = dict(loss_type="grpo_clip", cliprange=0.2, length_normalization=normalization, normalize_constant=7.0)
    loss, _ = grpo.grpo_microbatch_train_step(whole, mask, 1, **settings, **arguments())
    parts, total = number("policy_log_probs").requires_grad_(), 0.0
    for rows in ([0], [1, 2, 3]):
        share = mask.sum().item() / mask[rows].sum().item() if normalization == "token" else len(mask) / len(rows)
        part, _ = grpo.grpo_microbatch_train_step(
            parts[rows], mask[rows], share, **settings, **{k: v[rows] for k, v in arguments().items()}
        )
        total += part
    torch.testing.assert_close(total, loss, **TIGHT)
    torch.testing.assert_close(parts.grad, whole.grad, **TIGHT)


def test_masked_mean():
    x, m = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[1, 1, 0], [0, 0, 1]])
    assert grpo.masked_mean(x, m).item() == 3.0
    assert grpo.masked_mean(x, m, dim=1).tolist() == [1.5, 6.0]
    assert grpo.masked_mean(x, m, dim=0).tolist() == [1.0, 2.0, 6.0]
    empty = grpo.masked_mean(x, torch.tensor([[0, 0, 0], [0, 0, 1]]), dim=1)
    assert math.isnan(empty[0]) and empty[1] == 6.0  # 0 / 0, as defined
    x[0, 2] = float("inf")  # outside the mask: no business of the mean's
    assert grpo.masked_mean(x, m, dim=1).tolist() == [1.5, 6.0]


def test_on_policy_clip_loss_has_reinforce_gradient():
    """At pi = pi_old all ratios are 1: nothing clips and the gradient is REINFORCE's."""
    grads = []
    for loss_type in ("grpo_clip", "reinforce_with_baseline"):
        log_probs = number("policy_log_probs").requires_grad_()
        grpo.grpo_microbatch_train_step(
            log_probs,
            torch.tensor(NUMBERS["mask"]),
            1,
            loss_type,
            cliprange=0.2,
            **(arguments() | {"old_log_probs": log_probs.detach()}),
        )
        grads.append(log_probs.grad)
    torch.testing.assert_close(*grads, **TIGHT)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(loss_type="ppo"), "none of"),
        (dict(old_log_probs=None), "needs old_log_probs"),
        (dict(cliprange=None), "needs cliprange"),
        (dict(advantages=torch.ones(3)), "size 3"),
        (dict(cliprange=-0.1), "cliprange"),
        (dict(length_normalization="mean"), "length_normalization"),
        (dict(length_normalization="constant"), "constant with a constant"),
    ],
)
def test_bad_arguments_of_the_step(change, message):
    settings = dict(loss_type="grpo_clip", cliprange=0.2, **arguments()) | change
    with pytest.raises((ValueError, RuntimeError), match=message):
        grpo.grpo_microbatch_train_step(number("policy_log_probs"), torch.tensor(NUMBERS["mask"]), 1, **settings)


def test_bare_advantages_do_not_broadcast_along_time():
    square = torch.zeros(3, 3)
    loss = grpo.compute_naive_policy_gradient_loss(torch.tensor([1.0, 2.0, 3.0]), square - 1)
    assert loss.tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


# -------------------------------------------------------------------------------- the loop


class TinyTokenizer:
    """Bytes, and one token that ends an answer."""

    special_tokens = {"<|endoftext|>": 256, "</answer>": 257}
    vocab = range(258)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return "".join(chr(i) if i < 256 else {256: "", 257: "</answer>"}[i] for i in ids)


def make_run(seed=0):
    """A model of a few thousand parameters, and a reward it can learn at once: the share of small bytes."""
    import model as model_py

    torch.manual_seed(seed)
    lm = model_py.TransformerLM(
        model_py.ModelConfig(vocab_size=258, context_length=32, d_model=16, num_layers=1, num_heads=2)
    )
    tokenizer = TinyTokenizer()
    engine = grpo.TorchEngine(lm, tokenizer, model_py.generate, [256])
    problems = [{"prompt": f"{i}:", "answer": 64} for i in range(12)]

    def reward(response, truth):
        share = sum(ord(c) < truth for c in response) / max(1, len(response))
        return {"reward": share, "format_reward": 1.0, "answer_reward": share}

    return lm, tokenizer, engine, problems, reward


def train(config, run=None, seed=0, optimizer=torch.optim.AdamW, **options):
    import sft

    lm, tokenizer, engine, problems, reward = run or make_run(seed)

    def score(answers):
        batch = sft.collate([a.prompt_ids for a in answers], [a.ids for a in answers], 256)
        scored = sft.get_response_log_probs_chunked(
            lm, batch["input_ids"], batch["labels"], response_mask=batch["response_mask"]
        )
        return scored["log_probs"], batch["response_mask"]

    history = grpo.train_grpo(
        lm,
        optimizer(lm.parameters(), lr=config.lr),
        engine,
        problems,
        config,
        **(
            dict(
                reward_fn=reward,
                encode=tokenizer.encode,
                score=score,
                evaluate=dict,
                clip=torch.nn.utils.clip_grad_norm_,
                log=lambda line: None,
            )
            | options
        ),
    )
    return torch.cat([p.detach().flatten() for p in lm.parameters()]), history


SMALL = dict(steps=3, lr=1e-2, rollout_batch_size=16, group_size=4, train_batch_size=16, min_tokens=2, max_tokens=6)


def test_the_policy_learns_what_is_rewarded():
    _, history = train(
        grpo.GRPOConfig(**SMALL | dict(steps=25, lr=3e-2, rollout_batch_size=96, group_size=8, train_batch_size=96))
    )
    rewards = [line["reward"] for line in history[1:]]
    assert rewards[0] < 0.4 < 0.6 < sum(rewards[-3:]) / 3, rewards
    assert history[-1]["gap"] < 1e-5  # engine and trainer are one model here
    assert {"entropy", "length", "truncated", "gnorm", "rollout_tok/s"} <= set(history[-1])


@pytest.mark.parametrize(
    "setting",
    [
        dict(loss_type="no_baseline"),
        dict(loss_type="reinforce_with_baseline"),
        dict(loss_type="grpo_no_clip", train_batch_size=8),
        dict(loss_type="gspo", cliprange=3e-4, train_batch_size=8),
        dict(normalize_by_std=False, length_normalization="constant"),
        dict(length_normalization="token", cliprange_high=0.28),
        dict(epochs_per_rollout=2, train_batch_size=8, importance_cap=2.0),
        dict(algorithm="expert-iteration"),
    ],
    ids=str,
)
def test_every_ablation_changes_the_policy_and_micro_batches_do_not(setting):
    start = torch.cat([p.detach().flatten() for p in make_run()[0].parameters()])
    runs = []
    for tokens in (10_000, 20):
        run = make_run()
        reward = (
            run[-1] if "algorithm" not in setting else lambda r, t: {"reward": float(run[-1](r, t)["reward"] > 0.3)}
        )
        config = grpo.GRPOConfig(**SMALL | dict(steps=2, lr=0.1, clip_norm=1e9, micro_batch_tokens=tokens) | setting)
        runs.append(train(config, run, reward_fn=reward, optimizer=torch.optim.SGD)[0])  # SGD: a wrong scale shows
    assert (runs[0] - start).abs().max() > 1e-3
    # float32 sums in another order: 1e-6 of a weight; a micro-batch that weighs wrong moves weights by 1e-3 and more
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_update_weighs_answers_of_unequal_length_alike_in_any_micro_batches(normalization):
    """The log-probs are the parameters here, so that one SGD step of rate 1 shows the gradient, worked by hand."""
    from types import SimpleNamespace

    lengths, advantages = [2, 5, 1, 4], torch.tensor([1.0, -1.0, 0.0, 2.0])
    answers = [SimpleNamespace(prompt_ids=[0], ids=[1] * n, logprobs=[-1.0] * n, row=i) for i, n in enumerate(lengths)]
    for tokens in (1000, 6, 1):
        table = torch.full((4, 5), -1.0, requires_grad=True)

        def score(part):
            rows, T = [a.row for a in part], max(len(a.ids) for a in part)
            mask = torch.tensor([[t < len(a.ids) for t in range(T)] for a in part])
            return table[rows][:, :T], mask

        sums = grpo.update(
            score,
            [table],
            torch.optim.SGD([table], lr=1.0),
            answers,
            advantages,
            advantages,
            None,
            grpo.GRPOConfig(micro_batch_tokens=tokens, length_normalization=normalization, max_tokens=8),
            lambda parameters, norm: 0.0,
        )
        for i, n in enumerate(lengths):
            per = {"sequence": 4 * n, "token": sum(lengths), "constant": 4 * 8}[normalization]
            want = torch.where(torch.arange(5) < n, -1.0 + advantages[i] / per, torch.tensor(-1.0))
            torch.testing.assert_close(table[i].detach(), want, rtol=0, atol=1e-6)
        assert sums["tokens"] == 11 and sums["trained"] == 14  # the answer without an advantage is not computed


@pytest.mark.parametrize("cap, weight", [(2.0, math.exp(0.5)), (1.2, 1.2), (0.0, 1.0)])
def test_importance_weights_are_trainer_over_engine_and_capped(cap, weight):
    from types import SimpleNamespace

    answers = [SimpleNamespace(prompt_ids=[0], ids=[1], logprobs=[-1.5])]
    table, advantage = torch.full((1, 1), -1.0, requires_grad=True), torch.ones(1)
    config = grpo.GRPOConfig(importance_cap=cap)
    sgd, mask = torch.optim.SGD([table], lr=1.0), torch.ones(1, 1, dtype=torch.bool)
    sums = grpo.update(
        lambda part: (table, mask), [table], sgd, answers, advantage, advantage, None, config, lambda *_: 0.0
    )
    assert abs(table.item() - (-1 + weight)) < 1e-6 and abs(sums["gap"] - 0.5) < 1e-6


def test_ids_that_the_tokenizer_lacks_are_left_out_of_the_text():
    engine = grpo.TorchEngine(
        make_run()[0], TinyTokenizer(), lambda *args, **settings: settings["decode"]([72, 300, 105])
    )
    assert engine.generate([[1]]) == "Hi"


def test_off_policy_ratios_are_to_the_policy_that_sampled():
    """Four large steps on one rollout batch: the later ones clip, which they never would against themselves."""
    config = grpo.GRPOConfig(**SMALL | dict(steps=2, lr=0.05, train_batch_size=8, epochs_per_rollout=2))
    assert all(line["clipped"] > 0 for line in train(config)[1][1:])
    on_policy = grpo.GRPOConfig(**SMALL | dict(steps=2, lr=0.05))
    assert all(line["clipped"] == 0 for line in train(on_policy)[1][1:])


def test_resume_is_the_run_that_was_never_stopped(tmp_path):
    config = grpo.GRPOConfig(**SMALL | dict(steps=5, checkpoint_every=2, train_batch_size=8))
    whole, history = train(config, run_dir=str(tmp_path / "a"))

    class Killed(Exception):
        pass

    lines = []

    def kill(line):
        lines.append(line)
        if len(lines) == 5:  # after step 4's line, and before it is saved
            raise Killed

    with pytest.raises(Killed):
        train(config, run_dir=str(tmp_path / "b"), log=kill)
    resumed, again = train(config, run_dir=str(tmp_path / "b"), resume=True, seed=7)
    assert torch.equal(resumed, whole)  # bit for bit, on a CPU
    timed = ("rollout_s", "train_s", "rollout_tok/s", "train_tok/s")
    strip = [[{k: v for k, v in line.items() if k not in timed} for line in log] for log in (history, again)]
    assert strip[0] == strip[1]
    logged = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [0, 1, 2, 3, 4, 5]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "last.pt").write_bytes((tmp_path / "b" / "last.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="c/last.pt"):
        train(config, run_dir=str(tmp_path / "c"), resume=True)
    with pytest.raises(ValueError, match="another lr"):
        train(grpo.GRPOConfig(**SMALL | dict(lr=1e-3)), run_dir=str(tmp_path / "b"), resume=True)
    from train import save_checkpoint

    save_checkpoint({}, {}, 3, tmp_path / "d" / "last.pt")  # pre-training's, say, which has no such settings
    with pytest.raises(ValueError, match="d/last.pt was made with another algorithm, "):
        train(config, run_dir=str(tmp_path / "d"), resume=True)


def test_resume_takes_no_checkpoint_of_an_earlier_run_in_the_same_folder(tmp_path):
    config = grpo.GRPOConfig(**SMALL | dict(checkpoint_every=2))
    train(config, run_dir=str(tmp_path))
    earlier = (tmp_path / "last.pt").read_bytes()

    def kill(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the next run there is killed before it has saved anything
        train(config, run_dir=str(tmp_path), log=kill)
    assert (tmp_path / "previous.pt").read_bytes() == earlier and not (tmp_path / "last.pt").exists()
    lines = []
    train(config, run_dir=str(tmp_path), resume=True, log=lines.append)
    assert lines[0].startswith("step 0/3")


def test_the_same_command_twice_gives_the_same_numbers():
    a, b, c = (train(grpo.GRPOConfig(**SMALL | dict(seed=s)))[0] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_step_without_signal_changes_nothing():
    run = make_run()
    start = torch.cat([p.detach().flatten() for p in run[0].parameters()])
    after, history = train(grpo.GRPOConfig(**SMALL), run, reward_fn=lambda r, t: {"reward": 1.0})
    assert torch.equal(after, start) and history[-1]["no_signal"] == 1.0 and history[-1]["gnorm"] == 0.0


def test_rollouts_in_another_dtype_have_a_gap_and_follow_the_trainer():
    import model as model_py

    lm, tokenizer, _, problems, reward = make_run()
    engine = grpo.TorchEngine(lm, tokenizer, model_py.generate, [256], dtype=torch.bfloat16)
    _, history = train(grpo.GRPOConfig(**SMALL), (lm, tokenizer, engine, problems, reward))
    assert 1e-5 < history[-1]["gap"] < 0.1  # bfloat16 keeps 8 bits of a log-prob near 5
    engine.sync(lm)
    for p, q in zip(lm.parameters(), engine.model.parameters()):
        assert torch.equal(p.detach().bfloat16(), q)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(group_size=5), "not a multiple of group_size"),
        (dict(train_batch_size=6), "not a multiple of train_batch_size"),
        (dict(loss_type="ppo"), "none of"),
        (dict(algorithm="sft"), "none of"),
        (dict(length_normalization="x"), "none of"),
        (dict(group_size=1), "group_size 1 leaves every advantage 0"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(max_tokens=1), "below min_tokens"),
        (dict(cliprange=2.0), "cliprange"),
        (dict(importance_cap=2.0, temperature=0.7), "1 with importance_cap"),
        (dict(temperature=0.0), "above 0"),
        (dict(temperature=math.inf), "temperature must be at least 0 and finite"),
        (dict(lr=math.nan), "lr must be at least 0"),
        (dict(importance_cap=-1.0), "importance_cap must be at least 0"),
        (dict(advantage_eps=-1e-6), "advantage_eps must be at least 0"),
        (dict(checkpoint_every=-1), "checkpoint_every must be at least 0"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        grpo.GRPOConfig(**SMALL | change)


def test_too_few_problems_and_a_loss_that_is_not_finite():
    run = make_run()
    with pytest.raises(ValueError, match="too few"):
        train(grpo.GRPOConfig(**SMALL | dict(group_size=1, loss_type="no_baseline")), run)
    with pytest.raises(ValueError, match="Lower the learning rate"):
        train(grpo.GRPOConfig(**SMALL), run, reward_fn=lambda r, t: {"reward": float("nan") if r < "P" else 1.0})
    broken = make_run()
    broken[0].ln_final.weight.data.fill_(math.nan)  # what a rate far too high leaves; the loss of no signal is 0
    with pytest.raises(ValueError, match="step 1 has {'entropy': nan}. Lower the learning rate"):
        train(grpo.GRPOConfig(**SMALL), broken, reward_fn=lambda r, t: {"reward": 0.0})


@pytest.mark.parametrize(
    "lengths, limit, groups",
    [([9, 2, 3], 12, [[1, 2], [0]]), ([], 5, []), ([7], 5, [[0]]), ([1, 1, 1, 1], 2, [[0, 1], [2, 3]])],
)
def test_micro_batches(lengths, limit, groups):
    assert grpo.micro_batches(lengths, limit) == groups


def test_table_of_a_run_that_has_just_begun(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "accuracy": 0.25}\n')
    assert grpo.main(["--table", str(tmp_path)]) == 0
    assert "0.250 -> 0.250" in capsys.readouterr().out


def test_help_names_both_defaults(capsys):
    with pytest.raises(SystemExit):
        grpo.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--steps STEPS default 200; without --model 100" in text
    assert "--lr LR default 1e-05; without --model 0.0001" in text
    assert "--group-size GROUP_SIZE default 8 --" in text


def test_normalize_answer_s_own_examples():
    for text, plain in ((r"\dfrac12", "1/2"), (r"2\text{ cm}", "2 cm"), ("$5,000$.", "5,000")):
        assert grpo.normalize_answer(text) == plain and f"`{text}` -> `{plain}`" in grpo.normalize_answer.__doc__


def test_command_line_says_one_line(capsys, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    for argv, message in (
        (["--table", str(tmp_path)], "log.jsonl holds no examples"),
        (["--group-size", "7"], "multiple of group_size"),
        (["--model", "/nowhere"], "cannot read"),
        (["--table", "/nowhere"], "No such file"),
        (["--compile"], "--dtype bfloat16"),
    ):
        assert grpo.main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("grpo.py: ") and "\n" not in error and message in error, error


def test_self_check():
    assert grpo.self_check() < 1e-6


# -------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with its tokenizer, and problems in GSM8K's form."""
    import bpe
    import model as model_py

    path, tokenizer = tmp_path_factory.mktemp("model"), bpe.Tokenizer.from_file(
        FIXTURES / "sft_tiny" / "tokenizer.json"
    )
    torch.manual_seed(0)
    model_py.save_hf(
        model_py.TransformerLM(
            model_py.ModelConfig(vocab_size=320, context_length=256, d_model=16, num_layers=1, num_heads=2)
        ),
        path,
        tokenizer,
    )
    (path / "gsm8k.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": f"so\n#### {i + 1}"}) + "\n" for i in range(40))
    )
    return path


SMALL_RUN = [
    "--rollout-batch-size",
    "8",
    "--group-size",
    "4",
    "--train-batch-size",
    "4",
    "--max-tokens",
    "6",
    "--eval-size",
    "2",
    "--eval-every",
    "2",
    "--checkpoint-every",
    "1",
    "--reward",
    "coin",
]


def test_a_real_run_from_files_resumes_and_prints_its_table(folder, tmp_path, capsys):
    argv = [
        "--model",
        str(folder),
        "--data",
        str(folder / "gsm8k.jsonl"),
        "--run-dir",
        str(tmp_path / "run"),
        *SMALL_RUN,
    ]
    assert grpo.main([*argv, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "engine: torch" in out and "38 problems, 2 held out" in out and "RESULT {" in out
    assert grpo.main([*argv, "--steps", "3", "--resume"]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert grpo.main(["--table", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run")[-28:] in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[1]["gnorm"] > 0
    import model as model_py

    before, after = model_py.load_hf(folder), model_py.load_hf(tmp_path / "run")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_problems_that_nobody_could_learn_from_are_named_before_the_first_step(folder, tmp_path, capsys):
    rows = [{"prompt": f"{i}+1?", "answer": i + 1} for i in range(40)]
    data, argv = tmp_path / "d.jsonl", ["--model", str(folder), "--data", str(tmp_path / "d.jsonl"), *SMALL_RUN]

    def run(rows, *more):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = grpo.main([*argv, "--run-dir", str(tmp_path / "run"), "--steps", "1", *more])
        return code, *capsys.readouterr()

    for answer in ({"answer": None}, {"answer": ""}, {"response": "x"}):
        code, out, err = run([*rows[1:], {"prompt": "p"} | answer])
        assert code == 2 and err.count("\n") == 1 and "1 of the problems have no answer" in err and "step" not in out
    assert run([{"prompt": "p", "answer": 0}, *rows])[0] == 0  # 0 is an answer
    for place in (0, 1):  # held out, and trained on
        long = [*rows[:place], {"prompt": "a b c " * 200, "answer": 1}, *rows[place:]]
        code, out, err = run(long)
        assert code == 2 and err.count("\n") == 1 and "examples, longer than the 250 tokens" in err, err
        assert "'a b c a b c" in err and "step" not in out
        code, out, err = run(long, "--drop-long")
        assert code == 0 and "left out 1 of" in out, err


@pytest.mark.parametrize("reward", ["r1_zero", "question_only"])
def test_the_prompt_asks_for_what_is_rewarded(folder, tmp_path, monkeypatch, reward):
    seen, generate = set(), grpo.TorchEngine.generate

    def listen(self, prompts, **settings):
        seen.update((self.tokenizer.decode(p), tuple(settings["stop"])) for p in prompts)
        return generate(self, prompts, **settings)

    monkeypatch.setattr(grpo.TorchEngine, "generate", listen)
    argv = ["--model", str(folder), "--data", str(folder / "gsm8k.jsonl"), "--run-dir", str(tmp_path / "run")]
    assert grpo.main([*argv, *SMALL_RUN, "--steps", "1", "--reward", reward]) == 0
    for prompt, stop in seen:
        if reward == "question_only":  # the question alone; the model's own habit is to put its answer in a box
            assert prompt.endswith("+1?") and len(prompt) < 6 and stop == ()
        else:
            assert prompt.endswith("+1?\nAssistant: <think>") and "<answer>" in prompt and stop == ("</answer>",)


def test_vllm_that_is_missing_is_said_and_not_replaced(folder, capsys):
    import importlib.util

    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is here; test_grpo_vllm.py runs it")
    assert (
        grpo.main(["--model", str(folder), "--data", str(folder / "gsm8k.jsonl"), "--engine", "vllm", *SMALL_RUN]) == 2
    )
    error = capsys.readouterr().err.strip()
    assert "pip install vllm" in error and "\n" not in error
