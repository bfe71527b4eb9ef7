"""train.py - the pre-training loop: token files in, a model that speaks out.

What:       The embedded corpus, memory-mapped tokens and random windows; checkpoints that survive kill -9; the training step
            with gradient accumulation and mixed precision; evaluation on fixed windows; data parallelism under torchrun;
            benchmark modes.
Source:     Radford et al. 2019 (GPT-2) for the set-up; arXiv:1710.03740 for mixed precision; arXiv:2203.15556 appendix F
            for counting FLOPs.
Deviations: 1. Windows are drawn uniformly with replacement, not in epochs. 2. Batches are given for the whole job;
            micro-batches and ranks slice them and change nothing but rounding. 3. On a GPU a step's loss and gradient norm
            are looked at one step later, so that the device never waits for the host.
Copy:       this file alone; needs torch and numpy. Model, loss, optimizer, schedule and clipping are handed in. MIT.
Run:        python train.py                      trains the embedded default; the README shows what it prints
            python train.py --explain            says what a step of a run does, in numbers
            python train.py --benchmark small --modes step --precision autocast --compile
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import sysconfig
import threading
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Dims: B batch (sequences), T context length (tokens), D model width, V vocabulary, N tokens in a file

END_OF_TEXT = "<|endoftext|>"


class Stop(Exception):
    """A run cannot go on: the message says what happened and what to do, `code` is the process's exit status."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------- 1. text, tokens, windows

@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, and renames it onto `path` only when everything was written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())                       # the rename must not reach the disk before the bytes do
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def gather_corpus(out: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Writes train.txt and valid.txt from the standard library's sources, the text that every Python already holds.

    Sorted order, no tests, no installed packages; every document ends in <|endoftext|>. One in ten is held out: those where
    the SHA-256 of the relative path divides by ten, so that a new file moves no other from one side to the other.
    Returns: {"train": (documents, bytes), "valid": (documents, bytes)}.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts: dict[str, list[str]] = {"train": [], "valid": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if skipped & set(name.split("/")):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue                                      # a few sources declare another encoding
        if text.strip() and END_OF_TEXT not in text:
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
            texts["valid" if held_out else "train"].append(text)
    if not all(texts.values()):
        raise ValueError(f"no standard-library sources under {root}; give a folder of token files with --tokens")
    counts = {}
    for split, documents in texts.items():
        data = "".join(text + END_OF_TEXT for text in documents).encode()
        with write_whole(Path(out) / f"{split}.txt") as file:
            file.write(data)
        counts[split] = (len(documents), len(data))
    return counts


def open_tokens(path: str | os.PathLike, context_length: int, vocab_size: int) -> np.ndarray:
    """Memory-maps a token file (N,), and refuses what would fail, or lie, an hour later.

    Raises: ValueError for a missing or foreign file, fewer than context_length + 1 tokens, or an id >= vocab_size.
    """
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a token file ({error}); make one with: python bpe.py encode") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(f"{path} must hold one dimension of integers, it holds {tokens.dtype} {tokens.shape}")
    if len(tokens) <= context_length:
        raise ValueError(f"{path} holds {len(tokens)} tokens, too few for windows of {context_length} and their targets; "
                         "use more text or a smaller --context-length")
    largest = max(int(tokens[i:i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
    if largest >= vocab_size:
        raise ValueError(f"{path} holds token id {largest}, outside the model's vocabulary of {vocab_size}; "
                         "encode it with this model's tokenizer or raise --vocab-size")
    return tokens


def get_batch(tokens: np.ndarray, batch_size: int, context_length: int, device: str | torch.device,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Windows at uniformly random starts, and the same shifted by one: what the model sees and what it must say next.

    Args: tokens (N,) integers, N > context_length. generator: a CPU generator; None takes torch's global one.
    Returns: inputs and targets, both (B, T) int64 on `device`. Raises: ValueError for too few tokens or sizes under 1.
    Example: tokens 0..9, context_length 3, start 4 -> [4, 5, 6] and [5, 6, 7].
    """
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"batch_size and context_length must be at least 1, got {batch_size} and {context_length}")
    return windows_at(tokens, draw_starts(tokens, batch_size, context_length, generator), context_length, device)


def draw_starts(tokens: np.ndarray, batch_size: int, context_length: int, generator: torch.Generator | None) -> np.ndarray:
    """Random starts (B,), each of the N - T windows that have all their targets equally likely."""
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context_length} and their targets; "
                         "use more text or a smaller context length")
    return torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()


def windows_at(tokens: np.ndarray, starts: np.ndarray, context_length: int,
               device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The windows at given starts (B,). The copy to a GPU is from pinned memory and does not wait."""
    batch = torch.from_numpy(tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))     # (B, T + 1)
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]                                                                     # (B, T) each


# ------------------------------------------------------------------------------------------------------- 2. checkpoints

def bare(model: Any) -> Any:
    """The module inside torch.compile's and DDP's wrappers: its parameter names are the checkpoint's."""
    while hasattr(model, "_orig_mod") or hasattr(model, "module"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def save_checkpoint(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int,
                    out: str | os.PathLike | BinaryIO, **more: Any) -> None:
    """Writes model, optimizer, step and whatever else is given, so that torch.load(weights_only=True) reads it.

    Args: out: a path, replaced whole or not at all, or an open binary file. more: tensors, numbers, strings, dicts.
    Raises: OSError, when the disk is full say; the file that was there before is still there then.
    """
    write_checkpoint({"model": bare(model).state_dict(), "optimizer": optimizer.state_dict(), "step": step, **more}, out)


def write_checkpoint(state: dict[str, Any], out: str | os.PathLike | BinaryIO) -> None:
    """torch.save to an open file, or to a path: whole or not at all."""
    try:
        with write_whole(out) if isinstance(out, (str, os.PathLike)) else contextlib.nullcontext(out) as file:
            torch.save(state, file)
    except RuntimeError as error:                         # torch's zip writer reports a full disk as a RuntimeError
        raise OSError(f"could not write {out}: {error}") from None


def read_checkpoint(src: str | os.PathLike | BinaryIO) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Raises: ValueError, in one line, for a missing or damaged file."""
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {src}; train first, or name another") from None
    except Exception as error:                            # damaged files make torch.load raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"{src} is not a readable checkpoint: truncated, corrupt or foreign ({reason})") from None
    if not isinstance(state, dict) or not {"model", "optimizer", "step"} <= set(state):
        raise ValueError(f"{src} holds no model, optimizer and step; it was not written by save_checkpoint")
    return state


def load_checkpoint(src: str | os.PathLike | BinaryIO, model: torch.nn.Module,
                    optimizer: torch.optim.Optimizer | None = None) -> int:
    """Restores model and optimizer in place. Returns: the step. Raises: ValueError if unreadable or of another shape."""
    return restore(read_checkpoint(src), model, optimizer, src)


def restore(state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, src: Any) -> int:
    """Loads what `read_checkpoint` gave, or says which tensor does not fit before anything is changed."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()}
              for tensors in (state["model"], bare(model).state_dict())]
    wrong = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        there, here = (shape.get(wrong[0], "absent") for shape in shapes)
        raise ValueError(f"{src} is of another configuration: {wrong[0]} is {there} there and {here} here "
                         f"({len(wrong)} tensors differ); use the settings that it was trained with")
    if optimizer is not None:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(f"{src} holds another optimizer's state ({error}); resume with the one it was made with") from None
    bare(model).load_state_dict(state["model"])
    return state["step"]


# ---------------------------------------------------------------------------------------------------------- 3. the loop

@dataclass(frozen=True)
class TrainConfig:
    """One run. Sizes are for the whole job, whatever the ranks and micro-batches; losses are in nats per token."""
    steps: int = 1000
    batch_size: int = 32                 # sequences a step, over all ranks and micro-batches
    micro_batch_size: int = 0            # sequences a forward pass of one rank; 0: all of its share at once
    context_length: int = 256            # tokens
    max_lr: float = 3e-3
    min_lr: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    seed: int = 0
    eval_every: int = 200                # steps; and at the end
    eval_windows: int = 128              # of the validation tokens, evenly spread, the same ones every time
    checkpoint_every: int = 200          # steps; 0: only at the end
    sample_every: int = 0                # steps; 0: only at the end
    log_every: int = 20
    precision: str = "fp32"              # "fp32" | "autocast": fp32 weights, bf16 products | "bf16": bf16 weights too

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "autocast", "bf16"):
            raise ValueError(f"precision must be fp32, autocast or bf16, got {self.precision!r}")
        for name in ("steps", "batch_size", "context_length", "eval_every", "eval_windows", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Parallel:
    """How this process takes part in the job. The defaults are a job of one process."""
    rank: int = 0
    world_size: int = 1
    no_sync: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # for all micro-batches but the last
    finish: Callable[[], None] = lambda: None             # after backward: averages the gradients over the ranks
    clip: Callable | None = None                          # (parameters, max_norm) -> norm, where no rank sees all gradients
    full_state: Callable | None = None                    # () -> (model state, optimizer state), whole; every rank calls it
    load_state: Callable | None = None                    # (checkpoint): the way back


def plain_loss(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss in nats over the B * T targets, by torch's own cross-entropy of the full logits (B, T, V)."""
    return F.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())


def evaluation_starts(tokens: np.ndarray, context_length: int, count: int) -> np.ndarray:
    """Starts of at most `count` evenly spread windows that overlap as little as they can: the same for every run."""
    room = len(tokens) - context_length - 1
    return np.unique(np.linspace(0, room, min(count, room // context_length + 1)).astype(np.int64))


@torch.no_grad()
def evaluate(model: torch.nn.Module, loss_fn: Callable, tokens: np.ndarray, starts: np.ndarray, context_length: int,
             batch_size: int, autocast: Callable = contextlib.nullcontext) -> float:
    """Mean loss in nats per token; the denominator is all of len(starts) * T targets."""
    device = next(model.parameters()).device
    model.eval()
    total = torch.zeros((), device=device)                                       # read once, at the end
    for i in range(0, len(starts), batch_size):
        x, y = windows_at(tokens, starts[i:i + batch_size], context_length, device)
        with autocast():
            total += loss_fn(model, x, y).float() * len(x)
    model.train()
    return total.item() / len(starts)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, train_tokens: np.ndarray, valid_tokens: np.ndarray,
          config: TrainConfig, *, loss_fn: Callable = plain_loss, schedule: Callable[[int], float] | None = None,
          clip: Callable = torch.nn.utils.clip_grad_norm_, parallel: Parallel | None = None,
          run_dir: str | os.PathLike | None = None, resume: bool = False, more_state: dict | None = None,
          bytes_per_token: float = 0.0, sample: Callable[[], str] | None = None,
          log: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains in place, on whatever device the model lies.

    Args:
        train_tokens, valid_tokens: (N,) integers. loss_fn(model, x, y) -> mean nats over the targets y.
        schedule(step) -> rate, default constant max_lr. clip(parameters, max_norm) -> norm before clipping.
        run_dir: takes last.pt and log.jsonl; None writes nothing. resume: go on from run_dir/last.pt if it is there.
        more_state: goes into every checkpoint (the model's configuration, say). sample() -> text to show now and then.
        bytes_per_token: of the evaluation windows; gives bits per byte. log: takes each line.
    Returns: train_loss and valid_loss (nats per token), bits_per_byte, tokens, seconds, tokens_per_second.
    Raises: Stop for a loss or gradient norm that is not finite, on SIGTERM or Ctrl-C (after saving), and when the last
        checkpoint cannot be written; ValueError for a batch that does not divide.
    """
    parallel, schedule = parallel or Parallel(), schedule or (lambda step: config.max_lr)
    device, T = next(model.parameters()).device, config.context_length
    share = config.batch_size // parallel.world_size
    micro = min(config.micro_batch_size or share, share)
    if config.batch_size % parallel.world_size or share % micro:
        raise ValueError(f"a batch of {config.batch_size} sequences does not divide into {parallel.world_size} ranks "
                         f"times micro-batches of {micro}")
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "autocast")
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(config.seed)
    starts = evaluation_starts(valid_tokens, T, config.eval_windows)
    last = Path(run_dir) / "last.pt" if run_dir is not None else None
    first, seconds_before = 0, 0.0
    if resume and last and last.exists():
        state = read_checkpoint(last)
        first = parallel.load_state(state) if parallel.load_state else restore(state, model, optimizer, last)
        generator.set_state(state["data_rng"])
        torch.set_rng_state(state["torch_rng"])
        seconds_before = state["seconds"]
        log(f"resumed from {last} at step {first}")
    journal = Journal(last.parent if last and parallel.rank == 0 else None, first, config.steps,
                      log if parallel.rank == 0 else lambda line: None)
    began = time.perf_counter()
    elapsed = lambda: seconds_before + time.perf_counter() - began

    def save(step: int, final: bool = False) -> None:
        state = parallel.full_state() if parallel.full_state else (bare(model).state_dict(), optimizer.state_dict())
        if last is None or parallel.rank:
            return
        try:
            write_checkpoint({"model": state[0], "optimizer": state[1], "step": step, "data_rng": generator.get_state(),
                              "torch_rng": torch.get_rng_state(), "seconds": elapsed(),
                              "train_config": dataclasses.asdict(config), **(more_state or {})}, last)
            journal.saved = step
        except OSError as error:
            message = f"the checkpoint of step {step} was not written ({error}); " + \
                (f"that of step {journal.saved} is kept" if journal.saved else "there is no older one")
            if final:
                raise Stop(message + ". Free some space and run again with --resume") from None
            log(message + ". Training goes on")

    caught: list[int] = []                                # handlers can be set in the main thread alone
    handlers = {number: signal.signal(number, lambda n, frame: caught.append(n))
                for number in (signal.SIGTERM, signal.SIGINT) if last and threading.current_thread() is threading.main_thread()}
    loss_value = valid = math.nan
    reading = None                                        # (step, loss, norm) on their way to the host
    model.train()
    try:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step) * group.get("lr_scale", 1.0)
            mine = draw_starts(train_tokens, config.batch_size, T, generator)       # all ranks draw the same, ...
            mine = mine[parallel.rank * share:(parallel.rank + 1) * share]          # ... and take their own
            loss = torch.zeros((), device=device)
            for i in range(0, share, micro):
                with phase("data"):
                    x, y = windows_at(train_tokens, mine[i:i + micro], T, device)
                with contextlib.nullcontext() if i + micro == share else parallel.no_sync():
                    with phase("forward"), autocast():
                        part = loss_fn(model, x, y) * (micro / share)               # a sum of parts is the mean of all
                    with phase("backward"):
                        part.backward()
                loss += part.detach()
            parallel.finish()
            with phase("optimizer"):
                check_finite(reading, journal.saved, last)                          # of the step before
                norm = (parallel.clip or clip)(parameters, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            reading = read_later(step, loss, norm)

            done = step + 1
            due = lambda every: every and (done % every == 0 or done == config.steps)
            if due(config.log_every) or step == first:
                loss_value, norm_value = check_finite(reading, journal.saved, last)
                journal.step(done, loss_value, schedule(step), norm_value, config.batch_size * T, device)
            if due(config.eval_every) or done == config.steps:
                valid = evaluate(model, loss_fn, valid_tokens, starts, T, micro, autocast)
                journal.valid(done, valid, bits_per_byte(valid, bytes_per_token), elapsed())
            if sample and due(config.sample_every) and done < config.steps and parallel.rank == 0:
                log(f"sample at step {done}: {sample()!r}")
            if caught or due(config.checkpoint_every) or done == config.steps:
                check_finite(reading, journal.saved, last)                          # never save what is already lost
                save(done, final=bool(caught) or done == config.steps)
            if caught and done < config.steps:
                raise Stop(f"{signal.Signals(caught[0]).name} after step {done}; the checkpoint {last} is written: to go on, "
                           "add --resume to the same command", 128 + caught[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        journal.close()
    tokens, seconds = config.steps * config.batch_size * T, elapsed()
    return {"train_loss": loss_value, "valid_loss": valid, "bits_per_byte": bits_per_byte(valid, bytes_per_token),
            "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names a stretch of the step for profilers: an NVTX range on a GPU, a record_function range for torch.profiler."""
    with torch.profiler.record_function(name):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        yield
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float | None:
    """The loss in a unit that no tokenizer can flatter; None where the bytes are not known."""
    return nats_per_token / math.log(2) / bytes_per_token if bytes_per_token else None


def read_later(step: int, loss: Tensor, norm: Tensor | float) -> tuple[int, Tensor, torch.cuda.Event | None]:
    """Starts copying loss and norm to the host; `check_finite` reads them when they have arrived."""
    pair = torch.stack([loss.float(), torch.as_tensor(norm, device=loss.device).float()])
    if pair.device.type != "cuda":
        return step, pair, None
    host = torch.empty(2, pin_memory=True).copy_(pair, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return step, host, event


def check_finite(reading: tuple | None, saved: int, last: Path | None) -> tuple[float, float]:
    """(loss, norm) of `read_later`. Raises: Stop if one is not finite, with the last good checkpoint and likely causes."""
    if reading is None:
        return math.nan, math.nan
    step, pair, event = reading
    if event is not None:
        event.synchronize()
    loss, norm = pair.tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        good = f"the last good checkpoint is {last}, of step {saved}" if saved and last else "there is no checkpoint yet"
        raise Stop(f"step {step + 1} has loss {loss} and gradient norm {norm}; {good}. Likely causes: a rate too high or "
                   "a warm-up too short (try a third of --max-lr), clipping off, or a precision that overflows (try fp32)")
    return loss, norm


class Journal:
    """The run's record: a line a report on the terminal, the same values in log.jsonl (cut back to where a run resumes)."""

    def __init__(self, run_dir: Path | None, first: int, total: int, log: Callable[[str], None]):
        self.log, self.total, self.saved, self.file = log, total, first, None
        self.marked, self.marked_step = time.perf_counter(), first
        if run_dir:
            path = run_dir / "log.jsonl"
            lines = path.read_text().splitlines() if first and path.exists() else []
            with write_whole(path) as file:               # a killed run may have left half a line, and steps to redo
                for line in lines:
                    if line.endswith("}") and json.loads(line)["step"] <= first:
                        file.write(f"{line}\n".encode())
            self.file = open(path, "a", buffering=1, encoding="utf-8")

    def step(self, done: int, loss: float, rate: float, norm: float, tokens_per_step: int, device: torch.device) -> None:
        """Reports a step; the speed is that since the report before."""
        now, memory = time.perf_counter(), memory_in_use(device)
        seconds = (now - self.marked) / max(1, done - self.marked_step)
        self.marked, self.marked_step, eta = now, done, int(seconds * (self.total - done))
        self.log(f"step {done}/{self.total} | loss {loss:.3f} | lr {rate:.1e} | gnorm {norm:.2f} | "
                 f"{tokens_per_step / seconds / 1e3:.1f}k tok/s | mem {memory / 1e9:.1f} GB | eta {eta // 60}m{eta % 60:02d}s")
        self.write(step=done, loss=loss, lr=rate, gnorm=norm, tokens_per_second=tokens_per_step / seconds, memory=memory)

    def valid(self, done: int, loss: float, bits: float | None, seconds: float) -> None:
        """Reports an evaluation."""
        self.log(f"step {done}/{self.total} | valid {loss:.3f} nats/token" + (f" | {bits:.3f} bits/byte" if bits else "")
                 + f" | {seconds:.0f} s")
        self.write(step=done, valid_loss=loss, bits_per_byte=bits, seconds=seconds)

    def write(self, **values: Any) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.file:
            self.file.close()


def memory_in_use(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process on a CPU (0 where the platform does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                   # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ 4. putting it together

# name: (model, run). Every field of ModelConfig and TrainConfig is also a flag that overrides the preset.
PRESETS: dict[str, tuple[dict, dict]] = {
    "laptop": (dict(vocab_size=4096, context_length=256, d_model=192, num_layers=4, num_heads=6),
               dict(steps=600, batch_size=16, max_lr=4e-3, min_lr=4e-4, warmup_steps=60, eval_every=150,
                    checkpoint_every=150)),
    "tinystories": (dict(vocab_size=10_000, context_length=256, d_model=512, num_layers=4, num_heads=16, d_ff=1344),
                    dict(steps=10_000, batch_size=128, max_lr=3e-3, min_lr=3e-5, warmup_steps=500, eval_every=1000,
                         eval_windows=2048, checkpoint_every=2000, log_every=100, precision="autocast")),
    "owt": (dict(vocab_size=32_000, context_length=1024, d_model=768, num_layers=12, num_heads=12),
            dict(steps=20_000, batch_size=256, micro_batch_size=64, max_lr=2e-3, min_lr=2e-5, warmup_steps=1000,
                 eval_every=1000, eval_windows=1024, checkpoint_every=2000, log_every=50, precision="autocast")),
}
FOLDERS = {"laptop": "out/corpus", "tinystories": "out/tinystories", "owt": "out/owt"}
SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20), "xl": (2560, 32, 32),
         "10b": (4608, 50, 36)}                           # width, layers, heads


class Setup:
    """The siblings put together as the command line asks. They are imported here, inside main(), and handed on."""

    def __init__(self, args: argparse.Namespace):
        import bpe
        import model
        import optim
        self.args, self.bpe, self.lm, self.optim = args, bpe, model, optim
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind in there if there[kind]) if args.device == "auto" else args.device
        if not there.get(name.split(":")[0]):
            raise ValueError(f"device {name!r} is not there; use --device cpu, or a torch build that sees it")
        self.device = torch.device(name)
        shape, run = (dict(values) for values in PRESETS[args.preset])
        if args.benchmark:
            shape.update(zip(("d_model", "num_layers", "num_heads"), SIZES[args.benchmark]), d_ff=None)
        for values, kind in ((shape, model.ModelConfig), (run, TrainConfig)):
            values.update({f.name: getattr(args, f.name) for f in dataclasses.fields(kind)
                           if getattr(args, f.name, None) is not None})
        run["context_length"] = shape["context_length"]
        if args.warmup_steps is None:                     # a shorter run warms up for a shorter time
            run["warmup_steps"] = min(run["warmup_steps"], run["steps"] // 10)
        self.model_config, self.config = model.ModelConfig(**shape), TrainConfig(**run)
        if args.attention == "triton":
            import flash_attn_triton
            self.attention = flash_attn_triton.flash_attention
        else:
            self.attention = {"plain": model.plain_attention, "sdpa": model.sdpa_attention}[args.attention]
        fused = lambda m, x, y: model.linear_cross_entropy(
            m.hidden(x), m.lm_head.weight, y, backend="triton" if self.device.type == "cuda" else "torch")
        loss_fn = {"full": lambda m, x, y: model.cross_entropy(m(x), y), "fused": fused}[args.loss]
        self.loss_fn = torch.compile(loss_fn, mode=args.compile_mode) if args.compile else loss_fn

    def model(self) -> torch.nn.Module:
        """A new model; the same one for the same seed on every device."""
        torch.manual_seed(self.config.seed)
        model = self.lm.TransformerLM(self.model_config, attention=self.attention, checkpoint_every=self.args.recompute)
        return model.to(self.device, torch.bfloat16 if self.config.precision == "bf16" else torch.float32)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """AdamW with decay on the matrices alone, or Muon; every parameter in exactly one group."""
        c, own = self.config, [p for p in model.parameters() if p.requires_grad]
        if self.args.optimizer == "muon":
            optimizer = self.optim.Muon(model.named_parameters(), lr=c.max_lr, weight_decay=c.weight_decay,
                                        betas=(c.beta1, c.beta2))
        else:
            groups = [{"params": [p for p in own if p.dim() >= 2]},
                      {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0}]
            optimizer = self.optim.AdamW([g for g in groups if g["params"]], lr=c.max_lr, betas=(c.beta1, c.beta2),
                                         eps=1e-8, weight_decay=c.weight_decay, state_dtype=torch.float32,
                                         fused=None if self.args.update == "loop" else self.args.update, master_weights=True)
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(map(id, own)), "a parameter stands in no group, or in two"
        return optimizer

    def schedule(self, step: int) -> float:
        """The rate of a step, counted from 0: the first one already moves."""
        c = self.config
        return self.optim.cosine_lr(step + 1, c.max_lr, c.min_lr, c.warmup_steps, c.steps)

    def clip(self, parameters: Any, max_norm: float) -> Tensor:
        """One norm over all; a norm that is not finite is the loop's business, a step later."""
        return self.optim.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)

    def prepare(self) -> Path:
        """The folder with tokenizer.json, train.npy and valid.npy; what is missing of the embedded corpus is made now."""
        folder = Path(self.args.tokens or FOLDERS[self.args.preset])
        if self.args.tokens is None and self.args.preset == "laptop" and not (folder / "valid.npy").exists():
            print(f"corpus: {gather_corpus(folder)} (documents, bytes) in {folder}")
            vocab, merges = self.bpe.train_bpe(folder / "train.txt", self.model_config.vocab_size, [END_OF_TEXT])
            tokenizer = self.bpe.Tokenizer(vocab, merges, [END_OF_TEXT])
            tokenizer.save(folder / "tokenizer.json")
            for split in ("train", "valid"):
                self.bpe.encode_file(tokenizer, folder / f"{split}.txt", folder / f"{split}.npy")
        return folder

    def run(self) -> dict[str, Any]:
        """Trains as the flags say, prints a sample and the RESULT line, which also goes to result.json."""
        args, config, folder = self.args, self.config, self.prepare()
        tokens = {split: open_tokens(folder / f"{split}.npy", config.context_length, self.model_config.vocab_size)
                  for split in ("train", "valid")}
        tokenizer = self.bpe.Tokenizer.from_file(folder / "tokenizer.json")
        model = self.model()
        optimizer, parallel = self.optimizer(model), Parallel()
        run_dir = Path(args.run_dir or f"out/{args.preset}")
        if (run_dir / "last.pt").exists() and not args.resume:
            (run_dir / "last.pt").replace(run_dir / "previous.pt")
        starts = evaluation_starts(tokens["valid"], config.context_length, config.eval_windows)
        targets = windows_at(tokens["valid"], starts, config.context_length, "cpu")[1]
        lengths = torch.tensor([len(tokenizer.vocab[i]) for i in range(len(tokenizer.vocab))])
        sample = lambda: self.sample(model, tokenizer)
        about = {"model_config": dataclasses.asdict(self.model_config), "train_config": dataclasses.asdict(config),
                 "command": " ".join(sys.argv), "device": str(self.device), "torch": torch.__version__,
                 "python": platform.python_version(), "numpy": np.__version__}
        with write_whole(run_dir / "about.json") as file:
            file.write(json.dumps(about, indent=1).encode())
        for name in ("train", "model", "optim", "bpe"):   # the run keeps the source that made it
            shutil.copy(Path(__file__).with_name(f"{name}.py"), run_dir)
        print(f"{self.lm.count_parameters(model):,} parameters | {len(tokens['train']):,} training tokens | "
              f"{config.steps} steps of {config.batch_size} x {config.context_length} tokens | {self.device}, "
              f"{config.precision}, attention {args.attention}, loss {args.loss}, {args.optimizer} | seed {config.seed}")
        result = train(model, optimizer, tokens["train"], tokens["valid"], config, loss_fn=self.loss_fn,
                       schedule=self.schedule, clip=self.clip, parallel=parallel, run_dir=run_dir, resume=args.resume,
                       more_state={"model_config": about["model_config"]}, sample=sample,
                       bytes_per_token=lengths[targets].float().mean().item())
        print(f"\n{sample()}\n")
        with write_whole(run_dir / "result.json") as file:
            file.write(json.dumps(result).encode())
        plot(run_dir)
        print("RESULT " + json.dumps(result))
        return result

    def sample(self, model: torch.nn.Module, tokenizer: Any) -> str:
        """What the model writes after --prompt."""
        args = self.args
        prompt = tokenizer.encode(args.prompt) or [tokenizer.special_tokens[END_OF_TEXT]]
        new = self.lm.generate(bare(model), [prompt], max_new_tokens=args.sample_tokens, temperature=args.temperature,
                               top_p=args.top_p, stop_ids=[tokenizer.special_tokens[END_OF_TEXT]], seed=self.config.seed)
        return args.prompt + tokenizer.decode(new[0].ids)

    def from_checkpoint(self) -> tuple[torch.nn.Module, Any]:
        """The model of --checkpoint, in the shape that it states itself, and the tokenizer of its tokens."""
        path = Path(self.args.checkpoint or Path(self.args.run_dir or f"out/{self.args.preset}") / "last.pt")
        state = read_checkpoint(path)
        if "model_config" not in state:
            raise ValueError(f"{path} does not state its model's configuration; it was not written by train.py")
        self.model_config = self.lm.ModelConfig(**state["model_config"])
        model = self.model()
        restore(state, model, None, path)
        folder = Path(self.args.tokens or FOLDERS[self.args.preset])
        return model.eval(), self.bpe.Tokenizer.from_file(folder / "tokenizer.json")


def plot(*run_dirs: Path) -> None:
    """Loss against tokens of one or more runs, to loss.png in the first one's folder, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no picture of the loss: for {run_dirs[0] / 'loss.png'}, pip install matplotlib")
        return
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for run_dir in run_dirs:
        run = json.loads((run_dir / "about.json").read_text())["train_config"]
        lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
        for key, style in (("loss", "-"), ("valid_loss", "o--")):
            points = [(line["step"] * run["batch_size"] * run["context_length"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points), style, label=f"{run_dir.name}: {key}", markersize=4, linewidth=1)
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.legend(fontsize=7)
    figure.savefig(run_dirs[0] / "loss.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def compare(run_dirs: list[Path]) -> None:
    """One row a run: its losses, and the tokens it needed to get to the final loss of the first."""
    target = None
    print(f"{'run':28s} {'steps':>6s} {'batch':>6s} {'max lr':>8s} {'train':>7s} {'valid':>7s} {'bits/byte':>9s} "
          f"{'tokens to row 1':>15s}")
    for run_dir in run_dirs:
        run = json.loads((run_dir / "about.json").read_text())["train_config"]
        result = json.loads((run_dir / "result.json").read_text())
        row = f"{run_dir.name:28s} {run['steps']:6d} {run['batch_size']:6d} {run['max_lr']:8.1e} "
        if "stopped" in result:
            print(row + result["stopped"][:60])
            continue
        target = target or result["valid_loss"]
        evals = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines() if "valid_loss" in line]
        reached = [e["step"] * run["batch_size"] * run["context_length"] for e in evals if e["valid_loss"] <= target]
        print(row + f"{result['train_loss']:7.3f} {result['valid_loss']:7.3f} {result['bits_per_byte']:9.3f} "
              f"{reached[0] if reached else 'not reached':>15}")


# -------------------------------------------------------------------------------------------------- 5. how fast, and why

def bench(setup: Setup) -> None:
    """Times forward, forward+backward and whole steps on random tokens, beside this machine's matrix-product ceiling."""
    args, config, device = setup.args, setup.config, setup.device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    B, T = config.batch_size, config.context_length
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    ceiling = 2 * n ** 3 / statistics.median(measure(lambda: a @ b, synchronize, 5, 15))
    flops = setup.lm.count_flops(setup.model_config, T)
    causal = B * (flops["total"] - flops["attention scores and sums"] / 2)      # half of the scores lie in the future
    print(f"{setup.lm.count_parameters(setup.model_config) / 1e6:.1f}M parameters, batch {B} x {T}, {config.precision}, "
          f"compile {args.compile}, attention {args.attention}, loss {args.loss}, recompute {args.recompute} | "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__} | ceiling "
          f"{ceiling / 1e12:.2f} TFLOP/s ({dtype} product of {n})")
    print(f"{'mode':18s} {'mean ms':>9s} {'std':>7s} {'median':>9s} {'tokens/s':>11s} {'TFLOP/s':>8s} {'of ceiling':>10s} "
          f"{'peak GB':>8s}")
    tokens = np.random.default_rng(config.seed).integers(0, setup.model_config.vocab_size, 1 << 22, dtype=np.uint16)
    generator = torch.Generator().manual_seed(config.seed)
    for mode in args.modes:
        model = optimizer = None
        try:
            model = setup.model()
            optimizer = setup.optimizer(model)

            def one() -> None:
                with phase("data"):
                    x, y = get_batch(tokens, B, T, device, generator)
                with phase("forward"), torch.set_grad_enabled(mode != "forward"), \
                        torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "autocast"):
                    loss = setup.loss_fn(model, x, y)
                if mode != "forward":
                    with phase("backward"):
                        loss.backward()
                if mode == "step":
                    with phase("optimizer"):
                        setup.clip(model.parameters(), config.clip_norm)
                        optimizer.step()
                if mode != "forward":
                    optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            if args.memory_snapshot:
                torch.cuda.memory._record_memory_history()
            times = measure(one, synchronize, args.warmup, args.repeats)
            seconds = statistics.median(times)
            work = causal * (1 if mode == "forward" else 3) / seconds
            print(f"{mode:18s} {statistics.mean(times) * 1e3:9.2f} {statistics.pstdev(times) * 1e3:7.2f} {seconds * 1e3:9.2f} "
                  f"{B * T / seconds:11,.0f} {work / 1e12:8.2f} {work / ceiling:10.1%} {memory_in_use(device) / 1e9:8.2f}")
            if args.profile:
                with torch.profiler.profile() as profile:
                    measure(one, synchronize, 0, 3)
                key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
                print(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))
                profile.export_chrome_trace(str(Path(args.profile) / f"trace-{mode}.json"))
            if args.memory_snapshot:
                torch.cuda.memory._dump_snapshot(str(Path(args.memory_snapshot) / f"memory-{mode}.pickle"))
        except torch.OutOfMemoryError:
            print(f"{mode:18s} out of memory: lower --batch-size, or add --recompute 1")
        del model, optimizer


def measure(f: Callable[[], Any], synchronize: Callable, warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` ones; the device is waited for before and after each."""
    times = []
    for i in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        f()
        synchronize()
        times.append(time.perf_counter() - start)
    return times[warmup:]


# --------------------------------------------------------------------------------------------------------- 6. self-check

def self_check(seed: int = 0) -> float:
    """On a bigram model: four micro-batches equal one batch, and a resumed run equals one that never stopped, bit for bit.

    Returns: the largest parameter difference between one batch and four. Raises: AssertionError above 1e-6 (a forgotten
    division by four is off by 1e-1), or for any difference after resuming.
    """
    import tempfile
    tokens = np.random.default_rng(seed).integers(0, 17, 1000, dtype=np.uint16)

    def one_run(run_dir: str | None = None, resume: bool = False, **changes: Any) -> Tensor:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(17, 8), torch.nn.Linear(8, 17))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = TrainConfig(**{**dict(steps=8, batch_size=8, context_length=5, eval_windows=4, checkpoint_every=0), **changes})
        train(model, optimizer, tokens, tokens, config, run_dir=run_dir, resume=resume, log=lambda line: None)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = one_run()
    apart = (one_run(micro_batch_size=2) - whole).abs().max().item()
    assert apart < 1e-6, f"four micro-batches differ from one batch by {apart:.1e}"
    with tempfile.TemporaryDirectory() as folder:
        one_run(run_dir=folder, steps=5)
        assert torch.equal(one_run(run_dir=folder, resume=True), whole), "a resumed run differs from one that never stopped"
    return apart


def explain(setup: Setup) -> None:
    """What one step of the run that the flags ask for does, in numbers."""
    c, m, count = setup.config, setup.model_config, setup.lm.count_parameters(setup.model_config)
    tokens, flops = c.batch_size * c.context_length, 3 * setup.lm.count_flops(m, c.context_length)["total"]
    micro = c.micro_batch_size or c.batch_size
    print(f"""One step of `python train.py` with these flags:
  batch     {c.batch_size} windows of {c.context_length} tokens = {tokens:,} tokens, drawn anywhere in the token file,
            read in {c.batch_size // micro} micro-batch(es) of {micro}; targets are the same windows one token later
  forward   {m.num_layers} blocks of width {m.d_model}, {count:,} parameters; an untrained model should say
            ln {m.vocab_size} = {math.log(m.vocab_size):.2f} nats per token
  FLOPs     {flops * c.batch_size:.2e} a step, forward and backward (three times the forward pass)
  gradient  one norm over all parameters, cut to {c.clip_norm}; not finite: the run stops and names its last checkpoint
  rate      {' '.join(f'{setup.schedule(s):.1e}' for s in (0, c.warmup_steps, c.steps // 2, c.steps - 1))} at steps 0, """
          f"""{c.warmup_steps}, {c.steps // 2}, {c.steps - 1}
  memory    {16 * count / 1e6:.0f} MB for weights, gradients and AdamW's two moments in fp32, and activations on top
  run       {c.steps} steps = {c.steps * tokens:,} tokens, {c.steps * tokens / count:.1f} a parameter""")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", default="train", choices=["train", "corpus", "generate", "export", "compare"])
    parser.add_argument("runs", nargs="*", type=Path, help="compare: folders of runs; export: the folder to write")
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), default="laptop")
    add("--tokens", help="folder with tokenizer.json, train.npy, valid.npy (default: the preset's under out/)")
    add("--run-dir", help="where checkpoints and logs go (default out/PRESET)")
    add("--resume", action="store_true", help="go on from RUN_DIR/last.pt")
    add("--checkpoint", help="generate, export: default RUN_DIR/last.pt")
    add("--optimizer", choices=["adamw", "muon"], default="adamw")
    add("--update", choices=["loop", "foreach", "triton"], default="foreach", help="AdamW's way over the parameters")
    add("--device", default="auto")
    add("--attention", choices=["plain", "sdpa", "triton"], default="sdpa")
    add("--loss", choices=["full", "fused"], default="full", help="fused: the (B * T, V) logits never exist")
    add("--compile", action="store_true")
    add("--compile-mode", default=None, help="torch.compile's mode: reduce-overhead uses CUDA graphs")
    add("--recompute", type=int, default=0, metavar="K", help="keep activations only at every K-th block")
    add("--prompt", default="def ")
    add("--sample-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.7)
    add("--top-p", type=float, default=0.95)
    add("--benchmark", choices=list(SIZES), help="time a model of this size instead of training")
    add("--modes", nargs="+", choices=["forward", "forward+backward", "step"], default=["forward", "forward+backward", "step"])
    add("--warmup", type=int, default=5)
    add("--repeats", type=int, default=10)
    add("--profile", metavar="DIR", help="with --benchmark: print torch.profiler's table, write its trace")
    add("--memory-snapshot", metavar="DIR", help="with --benchmark: write CUDA's memory history")
    add("--explain", action="store_true", help="say what a step does, check the loop, and stop")
    add("--seed", type=int)
    import model
    taken = set()
    for config in (model.ModelConfig, TrainConfig):
        hints = typing.get_type_hints(config)
        for f in dataclasses.fields(config):
            hint = hints[f.name]
            kind = next((part for part in typing.get_args(hint) or (hint,) if part in (int, float, str, bool)), None)
            if kind and f.name != "seed" and f"--{f.name}" not in taken:
                taken.add(f"--{f.name}")
                how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
                add("--" + f.name.replace("_", "-"), help=f"{config.__name__}, default by preset", **how)
    args = parser.parse_args()
    try:
        if args.action == "corpus":
            print(gather_corpus(args.tokens or FOLDERS["laptop"]))
            return 0
        if args.action == "compare":
            compare(args.runs)
            plot(*args.runs)
            return 0
        setup = Setup(args)
        if args.explain:
            explain(setup)
            print(f"\nfour micro-batches = one batch to {self_check():.1e}, resumed = never stopped bit for bit  OK")
        elif args.benchmark:
            bench(setup)
        elif args.action in ("generate", "export"):
            model, tokenizer = setup.from_checkpoint()
            if args.action == "generate":
                print(setup.sample(model, tokenizer))
            else:
                out = args.runs[0] if args.runs else Path("out/export")
                setup.lm.save_hf(model, out, tokenizer)
                print(f"{out}: config.json, model.safetensors and tokenizer.json for transformers and vLLM")
        else:
            setup.run()
    except Stop as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return stop.code
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
