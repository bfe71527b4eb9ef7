"""train.py: the loop on tiny models, in this process and, where signals and crashes matter, in real ones."""
import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from test_ddp import Ranks, pretend_two_gpus
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(train.__file__).parent
PATIENCE = 600                      # seconds: only what hangs takes so long, on however busy a machine
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}      # a crash says where
TINY = ["--vocab-size", "300", "--context-length", "16", "--d-model", "32", "--num-layers", "1", "--num-heads", "2",
        "--batch-size", "4", "--eval-windows", "8", "--sample-tokens", "3", "--warmup-steps", "2", "--device", "cpu"]


def bigram(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The smallest language model: a table, and AdamW for it."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 16), torch.nn.Linear(16, 11))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def tokens(count: int = 500) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, count, dtype=np.uint16)


def quiet(model, optimizer, data, config, **options):
    return train.train(model, optimizer, data, data, config, log=lambda line: None, **options)


# ---------------------------------------------------------------------------------------------- windows and token files

def test_get_batch_shifts_by_one_and_starts_anywhere():
    data = np.arange(100, dtype=np.uint16)
    generator = torch.Generator().manual_seed(0)
    x, y = train.get_batch(data, 20_000, 7, "cpu", generator)
    assert x.shape == y.shape == (20_000, 7) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(7).expand(20_000, 7))
    counts = torch.bincount(x[:, 0], minlength=100)
    assert counts[93:].sum() == 0 and (counts[:93] > 0).all()             # starts 0..92: window and target both fit
    # uniform over 93 starts: mean 215, standard deviation 14.6; five of them is 73
    assert (counts[:93] - 20_000 / 93).abs().max() < 73


def test_get_batch_smallest_file_and_refusals():
    x, y = train.get_batch(np.arange(5), 3, 4, "cpu")
    assert (x == torch.arange(4)).all() and (y == torch.arange(1, 5)).all()
    with pytest.raises(ValueError, match="4 tokens are too few for windows of 4"):
        train.get_batch(np.arange(4), 3, 4, "cpu")
    with pytest.raises(ValueError, match="at least 1"):
        train.get_batch(np.arange(9), 0, 4, "cpu")
    with pytest.raises(RuntimeError):
        train.get_batch(np.arange(9), 1, 4, "cuda:99")


def test_open_tokens_refuses_what_would_fail_later(tmp_path):
    good = tmp_path / "good.npy"
    np.save(good, np.arange(50, dtype=np.uint16))
    assert isinstance(train.open_tokens(good, 8, 50), np.memmap)
    with pytest.raises(ValueError, match="id 49, outside the model's vocabulary of 49"):
        train.open_tokens(good, 8, 49)
    with pytest.raises(ValueError, match="too few"):
        train.open_tokens(good, 50, 50)
    for name, array in (("float", np.zeros(50)), ("matrix", np.zeros((5, 5), np.uint16))):
        np.save(tmp_path / name, array)
        with pytest.raises(ValueError, match="one dimension of integers"):
            train.open_tokens(tmp_path / f"{name}.npy", 8, 50)
    for name, content in (("text.npy", b"not an array"), ("empty.npy", b""), ("cut.npy", good.read_bytes()[:100])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a token file"):
            train.open_tokens(tmp_path / name, 8, 50)
    with pytest.raises(ValueError, match="not a token file"):
        train.open_tokens(tmp_path / "missing.npy", 8, 50)


def test_corpus_is_stable_and_split_by_document(tmp_path):
    counts = train.gather_corpus(tmp_path)
    texts = {split: (tmp_path / f"{split}.txt").read_bytes() for split in counts}
    again = train.gather_corpus(tmp_path / "again")
    assert again == counts and (tmp_path / "again" / "train.txt").read_bytes() == texts["train"]
    for split, (documents, size) in counts.items():
        assert len(texts[split]) == size and texts[split].count(b"<|endoftext|>") == documents
    share = counts["valid"][0] / (counts["train"][0] + counts["valid"][0])
    assert 0.05 < share < 0.15                                            # a tenth, of at least 500 documents
    assert b"def " in texts["train"] and "test_" not in os.listdir(tmp_path)
    documents = {split: {d for d in text.split(b"<|endoftext|>") if len(d) > 500} for split, text in texts.items()}
    assert not documents["train"] & documents["valid"]


def test_evaluation_starts_are_fixed_spread_and_whole():
    data = np.zeros(1000)
    starts = train.evaluation_starts(data, 10, 20)
    assert len(starts) == 20 and starts[0] == 0 and starts[-1] == 989     # 989 + 10 + 1 target = 1000
    assert (np.diff(starts) >= 10).all() and np.array_equal(starts, train.evaluation_starts(data, 10, 20))
    assert len(train.evaluation_starts(data, 10, 10 ** 6)) <= 99          # no more windows than fit side by side
    assert train.evaluation_starts(np.zeros(11), 10, 5).tolist() == [0]


# ------------------------------------------------------------------------------------------------------------- the loop

def test_evaluate_is_the_mean_over_all_windows():
    """Also where the last batch is smaller, which a mean of batch means would get wrong."""
    model, _ = bigram()
    data, starts = tokens(), np.arange(0, 70, 10)
    loss = train.evaluate(model, train.plain_loss, data, starts, 5, 3)
    x, y = train.windows_at(data, starts, 5, "cpu")
    whole = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert loss == pytest.approx(whole.item(), abs=1e-6)


def test_learns_what_can_be_learned():
    """0, 1, ..., 10, 0, 1, ...: the next token is certain, so the loss must come near 0 from ln 11 = 2.4."""
    data = (np.arange(2000) % 11).astype(np.uint16)
    model, optimizer = bigram()
    config = train.TrainConfig(steps=150, batch_size=16, context_length=8, max_lr=3e-2, eval_windows=16)
    result = quiet(model, optimizer, data, config)
    assert result["valid_loss"] < 0.05 and result["tokens"] == 150 * 16 * 8


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_change_nothing(micro):
    """Sums in another order: float32 differs by a few 1e-8 a step, magnified by AdamW's division; lr 1e-2 bounds it."""
    outcomes = []
    for size in (0, micro):
        model, optimizer = bigram()
        config = train.TrainConfig(steps=20, batch_size=8, context_length=5, micro_batch_size=size, max_lr=1e-2)
        losses = quiet(model, optimizer, tokens(), config)
        outcomes.append((torch.cat([p.detach().flatten() for p in model.parameters()]), losses["train_loss"]))
    assert (outcomes[0][0] - outcomes[1][0]).abs().max() < 2e-5
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], abs=1e-5)


def test_training_step_against_torch_by_hand():
    """Loss, norm before clipping, and the weights of one clipped step, beside torch's own pieces."""
    (model, optimizer), (twin, twin_optimizer) = bigram(), bigram()
    x, y = train.get_batch(tokens(), 8, 5, "cpu", torch.Generator().manual_seed(1))
    config = train.TrainConfig(clip_norm=0.01)
    loss, norm = train.training_step(model, optimizer, [(x[:4], y[:4]), (x[4:], y[4:])], train.plain_loss,
                                     torch.nn.utils.clip_grad_norm_, config).tolist()
    expected = torch.nn.functional.cross_entropy(twin(x).flatten(0, 1), y.flatten())
    expected.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    twin_optimizer.step()
    assert loss == pytest.approx(expected.item(), abs=1e-6) and norm == pytest.approx(expected_norm.item(), rel=1e-5)
    assert norm > 0.01                                                    # else the clipping was not tried
    for p, q in zip(model.parameters(), twin.parameters()):
        assert (p - q).abs().max() < 1e-5


def test_batches_that_do_not_divide():
    for sizes in (dict(batch_size=8, micro_batch_size=3), dict(batch_size=6, micro_batch_size=4)):
        with pytest.raises(ValueError, match="does not divide"):
            quiet(*bigram(), tokens(), train.TrainConfig(context_length=5, **sizes))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        train.TrainConfig(steps=0)
    with pytest.raises(ValueError, match="precision"):
        train.TrainConfig(precision="fp8")
    for name, least in dict(micro_batch_size=0, checkpoint_every=0, sample_every=0, clip_norm=1e-9).items():
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got -1"):
            train.TrainConfig(**{name: -1})


def test_not_finite_names_the_step_and_the_last_good_checkpoint(tmp_path):
    calls = []

    def loss_fn(model, x, y):
        calls.append(1)
        return train.plain_loss(model, x, y) * (math.nan if len(calls) == 7 else 1.0)
    config = train.TrainConfig(steps=50, batch_size=2, context_length=5, checkpoint_every=3, log_every=10,
                               eval_every=50)
    with pytest.raises(train.Stop, match=r"step 7 has loss nan.*last.pt, of step 6.*Likely causes"):
        quiet(*bigram(), tokens(), config, loss_fn=loss_fn, run_dir=tmp_path)
    state = train.read_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 6 and all(torch.isfinite(t).all() for t in state["model"].values())


def test_the_record_of_a_run(tmp_path):
    lines = []
    model, optimizer = bigram()
    config = train.TrainConfig(steps=10, batch_size=2, context_length=5, log_every=5, eval_every=5)
    train.train(model, optimizer, tokens(), tokens(), config, run_dir=tmp_path, log=lines.append, bytes_per_token=2.0,
                sample=lambda: "text", schedule=lambda step: 0.001 * (step + 1))
    assert lines[0].startswith("step 1/10 | loss 2.")
    assert any(" | lr 5.0e-03 | gnorm " in line and "tok/s | mem " in line and "eta" in line for line in lines)
    assert any("bits/byte" in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "lr" in r] == [1, 5, 10]
    assert [(r["step"], r["tokens"]) for r in records if "valid_loss" in r] == [(5, 50), (10, 100)]
    assert records[-1]["bits_per_byte"] == pytest.approx(records[-1]["valid_loss"] / math.log(2) / 2)


# ---------------------------------------------------------------------------------------------------------- checkpoints

def test_a_new_run_sets_an_older_runs_checkpoint_aside(tmp_path):
    """Else a restart before the first checkpoint would go on from it."""
    config = train.TrainConfig(steps=2, batch_size=2, context_length=5)
    quiet(*bigram(), tokens(), config, run_dir=tmp_path)

    def broken(model, x, y):
        raise RuntimeError("no step was made")
    with pytest.raises(RuntimeError, match="no step"):
        quiet(*bigram(), tokens(), config, run_dir=tmp_path, loss_fn=broken)
    assert not (tmp_path / "last.pt").exists() and train.read_checkpoint(tmp_path / "previous.pt")["step"] == 2


def test_mistakes_leave_an_older_checkpoint_in_its_place(tmp_path):
    config = train.TrainConfig(steps=2, batch_size=2, context_length=5)
    quiet(*bigram(), tokens(), config, run_dir=tmp_path)

    def schedule(step):
        raise ValueError("no such schedule")
    for options, message in ((dict(schedule=schedule), "no such schedule"), ({}, "5 tokens are too few")):
        with pytest.raises(ValueError, match=message):
            train.train(*bigram(), tokens(), tokens(500 if options else 5), config, run_dir=tmp_path, **options)
    assert (tmp_path / "last.pt").exists()


def test_going_on_where_nothing_is_left_gives_the_same_result_and_past_the_end_is_refused(tmp_path):
    config = train.TrainConfig(steps=4, batch_size=2, context_length=5)
    once = quiet(*bigram(), tokens(), config, run_dir=tmp_path, bytes_per_token=2.0)
    again = quiet(*bigram(seed=1), tokens(), config, run_dir=tmp_path, resume=True, bytes_per_token=2.0)
    for key in ("train_loss", "valid_loss", "bits_per_byte", "tokens"):
        assert again[key] == once[key], key
    shorter = train.TrainConfig(steps=3, batch_size=2, context_length=5)
    with pytest.raises(ValueError, match="of step 4, none of this run: raise --steps"):
        quiet(*bigram(), tokens(), shorter, run_dir=tmp_path, resume=True)
    model, optimizer = bigram()
    train.save_checkpoint(model, optimizer, 1, tmp_path / "last.pt")              # knows nothing of a run's data
    with pytest.raises(ValueError, match="of step 1, none of this run"):
        quiet(model, optimizer, tokens(), config, run_dir=tmp_path, resume=True)


def test_weights_in_fp32_do_not_go_on_in_bf16_without_their_copies(tmp_path):
    """AdamW would find moments, start no fp32 copies, and lose every small step to bf16's rounding."""
    import optim

    def run(precision, steps, dtype, **options):
        model, _ = bigram()
        optimizer = optim.AdamW(model.to(dtype).parameters(), lr=1e-2, state_dtype=torch.float32, master_weights=True)
        config = train.TrainConfig(steps=steps, batch_size=2, context_length=5, precision=precision)
        return quiet(model, optimizer, tokens(), config, run_dir=tmp_path, **options)
    run("fp32", 2, torch.float32)
    run("autocast", 3, torch.float32, resume=True)
    with pytest.raises(ValueError, match="lacks bf16's fp32 copies; resume with its own --precision"):
        run("bf16", 4, torch.bfloat16, resume=True)
    run("bf16", 2, torch.bfloat16)
    run("bf16", 3, torch.bfloat16, resume=True)
    run("fp32", 4, torch.float32, resume=True)                                    # their fp32 copies are there


def test_what_a_kill_while_saving_left_is_cleared_away(tmp_path):
    for name in (".last.pt.123.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    quiet(*bigram(), tokens(), train.TrainConfig(steps=1, batch_size=2, context_length=5), run_dir=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "log.jsonl", "mine.tmp"]


def test_checkpoint_round_trip_by_path_and_file(tmp_path):
    model, optimizer = bigram()
    quiet(model, optimizer, tokens(), train.TrainConfig(steps=3, batch_size=2, context_length=5))
    buffer = io.BytesIO()
    train.save_checkpoint(model, optimizer, 3, tmp_path / "a.pt")
    train.save_checkpoint(model, optimizer, 3, buffer)
    buffer.seek(0)
    for source in (tmp_path / "a.pt", str(tmp_path / "a.pt"), buffer):
        other, other_optimizer = bigram(seed=1)
        assert train.load_checkpoint(source, other, other_optimizer) == 3
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
        for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values()):
            assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)
    assert set(torch.load(tmp_path / "a.pt", weights_only=True)) == {"model", "optimizer", "step"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]         # no temporary file is left


def test_damaged_and_foreign_checkpoints_are_one_line(tmp_path):
    model, optimizer = bigram()
    path = tmp_path / "a.pt"
    train.save_checkpoint(model, optimizer, 3, path)
    whole = path.read_bytes()
    before = [p.clone() for p in model.parameters()]
    for content in (whole[:len(whole) // 2], b"", b"hello", whole[:200] + bytes(300) + whole[500:]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            train.load_checkpoint(path, model, optimizer)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="not written by save_checkpoint"):
        train.load_checkpoint(path, model, optimizer)
    with pytest.raises(ValueError, match="no checkpoint at"):
        train.load_checkpoint(tmp_path / "missing.pt", model, optimizer)
    wider = torch.nn.Sequential(torch.nn.Embedding(11, 32), torch.nn.Linear(32, 11))
    train.save_checkpoint(wider, torch.optim.AdamW(wider.parameters()), 3, path)
    with pytest.raises(ValueError, match=r"0.weight is \(11, 32\) there and \(11, 16\) here"):
        train.load_checkpoint(path, model, optimizer)
    train.save_checkpoint({"encoder": {}}, {}, 3, path)
    with pytest.raises(ValueError, match="encoder is .* there and absent here|absent there"):
        train.load_checkpoint(path, model, optimizer)
    train.save_checkpoint(model, {"state": {}, "param_groups": 3}, 3, path)
    with pytest.raises(ValueError, match="another optimizer's state"):
        train.load_checkpoint(path, model, optimizer)
    train.save_checkpoint(model, torch.optim.SGD([*model.parameters()][:1], lr=1.0), 3, path)
    with pytest.raises(ValueError, match="another optimizer's state"):
        train.load_checkpoint(path, model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))     # nothing was half loaded


def test_full_disk_keeps_the_older_checkpoint(tmp_path):
    """A file-size limit stands in for the full disk: the write fails in the middle."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
model = torch.nn.Linear(300, 300)
optimizer = torch.optim.AdamW(model.parameters())
train.save_checkpoint(model, optimizer, 1, "a.pt")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    train.save_checkpoint(model, optimizer, 2, "a.pt")
except OSError as error:
    print("OSError", error)
print(train.load_checkpoint("a.pt", model, optimizer))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("OSError") and done.stdout.endswith("\n1\n"), done.stdout + done.stderr
    assert os.listdir(tmp_path) == ["a.pt"]


# --------------------------------------------------------------------------------------- the command, in real processes

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with tokenizer.json, train.npy and valid.npy of some real text."""
    import bpe
    folder = tmp_path_factory.mktemp("tokens")
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    for split, part in (("train", text[:20_000]), ("valid", text[20_000:28_000])):
        (folder / f"{split}.txt").write_text(part + "<|endoftext|>", encoding="utf-8")
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(folder / "train.txt", 300, ["<|endoftext|>"], 1), ["<|endoftext|>"])
    tokenizer.save(folder / "tokenizer.json")
    for split in ("train", "valid"):
        bpe.encode_file(tokenizer, folder / f"{split}.txt", folder / f"{split}.npy", 1)
    return folder


def command(corpus: Path, run_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--tokens", str(corpus), "--run-dir", str(run_dir), *TINY, *flags]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(*arguments, capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, **options)


def start(arguments: list[str], until: str, **options) -> subprocess.Popen:
    """Starts a job and waits for the line of its output that begins so. The pipe is short: the job stands still as soon
    as it is 8 KB of lines ahead, so that it cannot end before this process comes to its signal."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, pipesize=4096, env=ENVIRONMENT, **options)
    for line in process.stdout:
        if line.startswith(until):
            return process
    pytest.fail(f"the job ended before {until}")


def same_state(a: Path, b: Path) -> bool:
    a, b = (train.read_checkpoint(path) for path in (a, b))
    flat = lambda x: [t for v in (x.values() if isinstance(x, dict) else x) for t in flat(v)] \
        if isinstance(x, (dict, list, tuple)) else [x]
    pairs = zip(flat([a["model"], a["optimizer"]["state"], a["data_rng"], a["torch_rng"]]),
                flat([b["model"], b["optimizer"]["state"], b["data_rng"], b["torch_rng"]]))
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


LONG = ["--steps", "300", "--log-every", "1", "--eval-every", "300"]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(command(corpus, folder, *LONG, "--checkpoint-every", "0"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.split("RESULT ")[1])
    assert result["tokens"] == 300 * 4 * 16 and result["bits_per_byte"] > 0
    assert result == json.loads((folder / "result.json").read_text())
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(corpus, whole, tmp_path, how):
    flags = [*LONG, "--checkpoint-every", "10" if how == signal.SIGKILL else "0"]
    process = start(command(corpus, tmp_path, *flags), "step 27/", stderr=subprocess.PIPE)
    process.send_signal(how)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), errors
    stopped = train.read_checkpoint(tmp_path / "last.pt")["step"]
    assert 20 <= stopped < 300
    if how == signal.SIGKILL:                                             # no handler ran: the last periodic checkpoint
        assert stopped % 10 == 0
    else:
        assert f"{how.name} after step {stopped}" in errors
        assert "--resume" in errors and "Traceback" not in errors
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 299, "loss": 1.0}\n{"step": 2')              # what a killed run can leave behind
    resumed = run(command(corpus, tmp_path, *flags, "--resume"))
    assert resumed.returncode == 0 and f"at step {stopped}" in resumed.stdout, resumed.stderr
    assert same_state(tmp_path / "last.pt", whole / "last.pt")
    losses = [{(r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
               if "loss" in r} for folder in (tmp_path, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 300
    state = train.read_checkpoint(whole / "last.pt")
    next(iter(state["model"].values()))[0, 0] += 1e-7                     # and the comparison can fail
    torch.save(state, tmp_path / "other.pt")
    assert not same_state(tmp_path / "other.pt", whole / "last.pt")


# -------------------------------------------------------------------------------------------------------- several ranks

def torchrun(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]


def start_ranks(arguments: list[str], until: str) -> subprocess.Popen:
    """The same of a job of several ranks; its errors go to the same pipe."""
    return start(torchrun(*arguments), until, stderr=subprocess.STDOUT)


def kill(launcher: subprocess.Popen, rank: int, how: signal.Signals) -> None:
    """Sends the signal to a rank of the job."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    variable = f"RANK={rank}".encode()
    found = [pid for pid in children if variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    assert len(found) == 1, found
    os.kill(int(found[0]), how)


@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp"])
def test_two_ranks_equal_one(corpus, tmp_path, kind):
    """The same global batch: float32 sums in another order, a few 1e-7 a step under AdamW, 12 steps of rate 4e-3."""
    flags = ["--steps", "12", "--eval-every", "12", "--log-every", "1"]
    one = run(command(corpus, tmp_path / "one", *flags))
    assert one.returncode == 0, one.stderr
    two = run(torchrun(*command(corpus, tmp_path / "two", *flags, "--parallel", kind)[1:]))
    assert two.returncode == 0, two.stderr
    for key, tolerance in (("loss", 1e-5), ("gnorm", 1e-4), ("valid_loss", 1e-5)):
        values = [[loss for _, loss in train.read_curve(tmp_path / name, key)] for name in ("one", "two")]
        assert len(values[0]) == len(values[1]) > 0
        assert max(abs(a - b) for a, b in zip(*values)) < tolerance, (key, values)
    states = [train.read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, tensor in states[0]["model"].items():
        assert (tensor - states[1]["model"][name]).abs().max() < 1e-4
    for i, entry in states[0]["optimizer"]["state"].items():                # the moments are whole, whoever owned them
        assert (entry["exp_avg"] - states[1]["optimizer"]["state"][i]["exp_avg"]).abs().max() < 1e-5
    back = run(command(corpus, tmp_path / "two", *flags, "--steps", "14", "--resume"))      # two ranks' on one
    assert back.returncode == 0 and "at step 12" in back.stdout, back.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc")
@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp"])
def test_a_killed_rank_ends_the_job_with_its_name_and_restarts_go_on_from_the_checkpoint(corpus, tmp_path, kind):
    flags = ["--steps", "150", "--eval-every", "150", "--log-every", "1", "--checkpoint-every", "10",
             "--parallel", kind]
    whole = run(torchrun(*command(corpus, tmp_path / "whole", *flags)[1:]))
    assert whole.returncode == 0, whole.stderr
    job = start_ranks(command(corpus, tmp_path / "killed", *flags)[1:], "step 12/")
    kill(job, 1, signal.SIGKILL)
    output, _ = job.communicate(timeout=PATIENCE)           # takes seconds; a collective alone would wait PATIENCE
    assert job.returncode != 0 and "rank      : 1 (local_rank: 1)" in output and "SIGKILL" in output, output[-3000:]
    assert train.read_checkpoint(tmp_path / "killed" / "last.pt")["step"] % 10 == 0
    job = start_ranks(["--max-restarts", "1", *command(corpus, tmp_path / "again", *flags)[1:]], "step 12/")
    kill(job, 1, signal.SIGKILL)
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode == 0 and "resumed from" in output, output[-3000:]
    assert same_state(tmp_path / "again" / "last.pt", tmp_path / "whole" / "last.pt")
    for folder in ("again", "whole"):
        lines = map(json.loads, (tmp_path / folder / "log.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "lr" in line] == list(range(1, 151))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks' processes in /proc")
def test_a_signal_to_one_rank_stops_all_at_one_step(corpus, tmp_path):
    flags = ["--steps", "100000", "--log-every", "1", "--checkpoint-every", "0", "--parallel", "fsdp"]
    job = start_ranks(command(corpus, tmp_path, *flags)[1:], "step 8/")
    kill(job, 1, signal.SIGTERM)
    output, _ = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0 and "the checkpoint" in output and "--resume" in output, output[-3000:]
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] >= 8


def resume_where_one_rank_alone_asks_for_it(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    import ddp
    for steps, resume in ((4, False), (6, rank == 0)):
        model, optimizer = bigram(seed=rank)
        config = train.TrainConfig(steps=steps, batch_size=4, context_length=5)
        quiet(model, optimizer, tokens(), config, parallel=ddp.DDP(model), run_dir=folder, resume=resume)
    return [p.detach() for p in model.parameters()]


def test_ranks_go_on_together_where_one_alone_was_told_to(tmp_path):
    """Over several hosts torchrun counts a restart where a rank died, and need not count it elsewhere."""
    pool = Ranks()
    try:
        ours = pool(resume_where_one_rank_alone_asks_for_it, str(tmp_path))
    finally:
        pool.stop()
    assert train.read_checkpoint(tmp_path / "last.pt")["step"] == 6
    model, optimizer = bigram()
    quiet(model, optimizer, tokens(), train.TrainConfig(steps=6, batch_size=4, context_length=5))
    for parameters in ours:                    # as if never stopped, to the rounding of AdamW's quotients in six steps
        assert all((p - q).abs().max() < 1e-5 for p, q in zip(parameters, model.parameters()))


@pytest.mark.parametrize("flags", [["--recompute-hidden", "0"], ["--recompute-hidden", "2"]])
def test_the_8b_benchmark_on_two_small_ranks(flags):
    """Its flags, with a model that fits: FSDP, bf16, selective recomputation (compiled only on a GPU: minutes)."""
    small = "--vocab-size 300 --context-length 32 --d-model 64 --num-layers 3 --num-heads 2 --d-ff 96".split()
    timed = run(torchrun(str(ROOT / "train.py"), "--benchmark", "8b", "--device", "cpu", "--attention", "sdpa",
                         "--update", "foreach", "--no-compile", "--repeats", "2", *small, *flags))
    assert timed.returncode == 0, timed.stderr[-2000:]
    rows = [line for line in timed.stdout.splitlines() if line.startswith("step ")]
    assert "2 x 32 tokens, bf16" in timed.stdout and "parallel fsdp" in timed.stdout and len(rows) == 1, timed.stdout


@pytest.mark.parametrize("hidden", [0, 2, 3])
def test_recomputation_makes_only_the_hidden_products_again_and_changes_no_gradient(hidden):
    """Of a block's seven products those of w1 and w3 are made twice where asked (w2's is read by nobody), attention and
    the others never. Gradients come from the same numbers: bit for bit."""
    import model as lm
    gradients, products = [], []
    for recompute in (None, hidden):
        torch.manual_seed(0)
        net = lm.TransformerLM(lm.ModelConfig(vocab_size=11, context_length=7, d_model=8, num_layers=3, num_heads=2,
                                              d_ff=24), lm.sdpa_attention)
        if recompute is not None:
            train.keep_products(net, recompute, lambda forward: forward)
        calls = []
        with CountProducts(calls):
            loss = lm.cross_entropy(net(torch.arange(7)[None]), torch.arange(1, 8)[None])
            forward = len(calls)
            loss.backward()
        products.append(len(calls) - forward)
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert products[1] - products[0] == 2 * hidden


def test_bf16_moments_follow_the_gradient_at_the_beta2_of_a_run_and_would_stall_at_0_999():
    """Gradients of 1, then of 0.5: the second moment has to come down from 1 to 0.25. bf16 has 8 bits: a step that
    would change v by less than 1/512 of it is rounded away, at 0.95 within 4% of the goal (two roundings: 8%)."""
    import optim

    def moment(beta2: float) -> float:
        p = torch.nn.Parameter(torch.ones(5))
        optimizer = optim.AdamW([p], lr=1e-3, betas=(0.9, beta2), state_dtype=torch.bfloat16)
        for gradient in (1.0, 0.5):
            for _ in range(min(3000, int(20 / (1 - beta2)))):
                p.grad = torch.full_like(p, gradient)
                optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.bfloat16
        return optimizer.state[p]["exp_avg_sq"][0].item()
    assert moment(train.TrainConfig().beta2) == pytest.approx(0.25, rel=0.08)
    assert abs(moment(0.999) - 0.25) > 0.1


class CountProducts(TorchDispatchMode):
    """Writes down every matrix product."""

    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.mm.default:
            self.calls.append(args[1].shape)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags, message", [
    (["--tokens", "nowhere"], "not a token file"),
    (["--vocab-size", "20"], "outside the model's vocabulary of 20"),
    (["--context-length", "1000000"], "too few"),
    (["--d-model", "33"], "33"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--micro-batch-size", "3"], "does not divide"),
    (["--device", "abacus"], "device 'abacus' is not there"),
    (["generate", "--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["compare", "nowhere"], "nowhere holds no run"),
    (["--benchmark", "small", "--repeats", "0"], "--repeats must be at least 1"),
    (["--benchmark", "small", "--warmup", "-1"], "--warmup at least 0, got 10 and -1"),
    (["--benchmark", "small", "--memory-snapshot", "."], "--memory-snapshot is of CUDA's memory"),
    (["--benchmark", "small", "--profile", __file__], "File exists"),
])
def test_bad_input_is_one_line_and_exit_code_2(corpus, tmp_path, flags, message):
    done = run(command(corpus, tmp_path / "run", *flags), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture
def here(corpus, tmp_path, monkeypatch, capsys):
    """here(*flags) runs the command in this process: its exit code, what it printed, what it complained of."""
    def call(*flags, folder=corpus):
        monkeypatch.setattr(sys, "argv", command(folder, tmp_path / "run", *flags)[1:])
        code = train.main()
        return code, *capsys.readouterr()
    return call


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "-1"], "temperature"), (["--top-p", "0"], "top_p"), (["--sample-tokens", "0"], "max_new_tokens"),
    (["--warmup-steps", "9"], "warmup_steps"), (["--clip-norm", "0"], "clip_norm must be at least 1e-09, got 0.0"),
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0, got -1"),
])
def test_settings_are_refused_before_the_training(here, tmp_path, flags, message):
    code, printed, errors = here("--steps", "3", *flags)
    assert code == 2 and message in errors and errors.count("\n") == 1 and "step" not in printed.split("| seed 0")[-1]
    assert not (tmp_path / "run/last.pt").exists()


def test_tokenizers_of_other_sizes(here, corpus, tmp_path):
    """Without an end of text, with gaps in its ids, smaller than the model; but not one that lacks the data's ids."""
    def folder(name, change):
        tokenizer = json.loads((corpus / "tokenizer.json").read_text())
        change(tokenizer)
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
        for split in ("train", "valid"):
            data = np.load(corpus / f"{split}.npy")
            np.save(tmp_path / name / f"{split}.npy", data[data != end])
        return tmp_path / name
    whole = json.loads((corpus / "tokenizer.json").read_text())
    [end] = [token["id"] for token in whole["added_tokens"]]
    flags = ["--steps", "2", "--sample-tokens", "60", "--temperature", "9", "--vocab-size", "4000"]
    for name, change in (("no end", lambda t: t.update(added_tokens=[])),
                         ("gap", lambda t: t["added_tokens"][0].update(id=3990)),
                         ("outside", lambda t: t["added_tokens"][0].update(id=5000))):
        code, printed, errors = here(*flags, folder=folder(name, change))
        assert code == 0 and '"bits_per_byte": ' in printed, (name, errors)
    code, _, errors = here(*flags[:2], folder=folder("less", lambda t: (
        [t["model"]["vocab"].pop(k) for k, i in list(t["model"]["vocab"].items()) if i >= 290],
        t["model"].update(merges=t["model"]["merges"][:290 - 256 - 1]))))
    assert code == 2 and "holds ids that its tokenizer.json has not" in errors and errors.count("\n") == 1


def test_several_processes_have_to_say_how_they_share_the_work(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = here("--steps", "2")
    assert code == 2 and errors == "train.py: 2 processes would do the same work; add --parallel ddp, zero1 or fsdp\n"


def test_more_ranks_than_gpus_is_one_line(here, monkeypatch):
    import ddp
    ends = []
    monkeypatch.setattr(ddp, "run_rank", lambda work, *args: ends.append(work(*args)))     # it would end this process
    pretend_two_gpus(monkeypatch)
    _, _, errors = here("--steps", "2", "--parallel", "ddp", "--device", "auto")
    assert ends == [2] and errors.count("\n") == 1 and "rank 2 has no GPU: this host has 2; lower" in errors


def test_a_mistake_leaves_a_finished_run_alone(here, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert here("--steps", "2")[0] == 0
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for flags in (["--attention", "triton"], ["--update", "triton"], ["--temperature", "-1"], ["--clip-norm", "-1"],
                  ["--micro-batch-size", "3"], ["--resume", "--d-model", "16"], ["--resume", "--steps", "1"]):
        code, _, errors = here("--steps", "2", *flags)
        assert code == 2 and errors.count("\n") == 1
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, flags


def test_a_result_is_not_taken_for_that_of_a_later_run(here, tmp_path, monkeypatch):
    assert here("--steps", "2")[0] == 0

    def fails(*arguments, begin, **options):
        begin()
        raise OSError("no disk")
    monkeypatch.setattr(train, "train", fails)
    assert here("--steps", "2")[0] == 2 and not (tmp_path / "run/result.json").exists()


def test_a_model_speaks_with_the_tokenizer_that_it_was_trained_with(here, corpus, tmp_path):
    assert here("--steps", "2")[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text("{}")
    assert here("generate", folder=tmp_path / "other")[0] == 0
    assert here("export", str(tmp_path / "hf"), folder=tmp_path / "other")[0] == 0
    kinds = [json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"] for folder in
             (corpus, tmp_path / "hf")]
    assert kinds[0] == kinds[1]
    (tmp_path / "run/tokenizer.json").unlink()                            # of a run that kept none
    assert here("generate")[0] == 0


def test_a_run_without_a_loss_is_an_empty_curve(tmp_path, monkeypatch):
    """It stopped before its first evaluation; matplotlib would take the style that is left for what to draw."""
    drawn = []

    class Plot:
        def __getattr__(self, name):
            return lambda *args, **options: drawn.append(args) if name == "plot" else None
    pyplot = types.SimpleNamespace(subplots=lambda figsize: (Plot(), Plot()))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(pyplot=pyplot))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    lines = [{"step": 1, "tokens": 80, "loss": 2.5}, {"step": 2, "tokens": 160, "loss": 2.0}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    train.plot([tmp_path])
    assert [[list(x) for x in args[:2]] for args in drawn] == [[[80, 160], [2.5, 2.0]], [[], []]]
    assert [args[2:] for args in drawn] == [("-",), ("o--",)]


def test_a_full_gpu_is_told_apart_from_a_mistake(here, monkeypatch):
    def run(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(train.Setup, "run", run)
    assert here("--steps", "2") == (1, "", "train.py: CUDA out of memory.\ntrain.py: lower --micro-batch-size, or "
                                           "raise --recompute\n")


def test_a_checkpoint_of_another_model_file_is_one_line(here, tmp_path):
    cases = (dict(model_config={"width": 3}), "width"), (dict(model_config="large"), "mapping"), ({}, "model_config")
    for config, message in cases:
        train.save_checkpoint(*bigram(), 3, tmp_path / "a.pt", **config)
        code, _, errors = here("generate", "--checkpoint", str(tmp_path / "a.pt"))
        assert code == 2 and "does not state a configuration" in errors and message in errors
        assert errors.count("\n") == 1


def test_help_says_defaults_and_words(here, capsys):
    with pytest.raises(SystemExit):
        here("--help")
    said = " ".join(capsys.readouterr().out.split())
    for line in ("--d-model D_MODEL default 192", "--max-lr MAX_LR default 0.004", "--beta2 BETA2 default 0.95",
                 "--norm NORM pre|post|none: default pre", "fp32|autocast|bf16: default fp32"):
        assert line in said, line


def test_alone_in_a_folder_the_command_says_what_it_needs(tmp_path):
    (tmp_path / "train.py").write_bytes((ROOT / "train.py").read_bytes())
    done = run([sys.executable, "train.py"], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.py, optim.py and bpe.py" in done.stderr


def test_generate_export_compare_explain_and_benchmark(corpus, tmp_path):
    assert run(command(corpus, tmp_path / "run", "--steps", "5", "--eval-every", "2")).returncode == 0
    said = run(command(corpus, tmp_path / "run", "generate", "--prompt", "import "))
    assert said.returncode == 0 and said.stdout.startswith("import "), said.stderr
    made = run(command(corpus, tmp_path / "run", "export", str(tmp_path / "hf")))
    assert made.returncode == 0, made.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(tmp_path / "hf"))
    table = run([sys.executable, str(ROOT / "train.py"), "compare", str(tmp_path / "run"), str(tmp_path / "run")])
    assert table.returncode == 0 and table.stdout.count("\nrun ") == 2, table.stderr
    table = run(command(corpus, tmp_path / "run", "compare", "--parallel", "ddp"))       # its own run; joins no job
    assert table.returncode == 0 and table.stdout.count("\nrun ") == 1 and not table.stderr, table.stderr
    told = run([sys.executable, str(ROOT / "train.py"), "--explain"])
    assert told.returncode == 0 and "ln 4096 = 8.32" in told.stdout, told.stderr
    timed = run(command(corpus, tmp_path / "run", "--benchmark", "small", "--d-model", "32", "--num-heads", "2",
                        "--num-layers", "1", "--warmup", "0", "--repeats", "1", "--profile", str(tmp_path / "a/b")))
    rows = [line.split() for line in timed.stdout.splitlines()]
    modes = [row[0] for row in rows if len(row) == 8 and row[6].endswith("%")]
    assert modes == ["forward", "forward+backward", "step"], timed.stdout + timed.stderr
    for mode in modes:                                                    # folders that were missing are made
        assert "traceEvents" in json.loads((tmp_path / f"a/b/trace-{mode}-0.json").read_text())
