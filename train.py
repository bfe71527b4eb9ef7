"""train.py - the pre-training loop: token files in, a model that speaks out.

What:       The embedded corpus, memory-mapped tokens and random windows; checkpoints that survive kill -9; a step with
            gradient accumulation, mixed precision and data parallelism; evaluation on fixed windows; benchmark modes.
Source:     Radford et al. 2019 (GPT-2) for the set-up; arXiv:1710.03740 for mixed precision; arXiv:2203.15556,
            appendix F, for counting FLOPs.
Deviations: 1. Windows are drawn uniformly with replacement, not in epochs. 2. Batches are given for the whole job:
            micro-batches and ranks slice them and change nothing but rounding. 3. Losses are read from the device when
            they are reported, so that it never waits; a step that went wrong is named all the same.
Copy:       this file alone; needs torch and numpy. All else is handed in; only main() takes model, optim, bpe. MIT.
Run:        python train.py                      trains the embedded default; the README shows what it prints
            python train.py --explain            says what a step of a run does, in numbers
            python train.py --benchmark small --modes step --precision autocast --compile
            torchrun --nproc-per-node 2 train.py --benchmark 8b     on two H200s 4.93 s a step of 8.1 G parameters and
              65,536 tokens, 60% of what their matrix products reach; --attention cudnn 4.66 s, 64%
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Dims: B batch (sequences), T context length (tokens), D model width, V vocabulary, N tokens in a file

END_OF_TEXT, SOURCES = "<|endoftext|>", ("train.py", "model.py", "optim.py", "bpe.py")

class Stop(Exception):
    """A run cannot go on: the message says what happened and what to do, `code` is the process's exit status."""
    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code

# ------------------------------------------------------------------------------ 1. text, tokens, windows

@contextlib.contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, and renames it onto `path` only when everything was written."""
    if (path := Path(path)).exists() and not path.is_file():   # a folder, or /dev/null, which root would replace
        raise FileExistsError(f"{path} is there and is no file; name another")
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
    Sorted order, no tests, no installed packages; every document ends in <|endoftext|>. One in ten is held out, by the
    hash of its path: a new file moves no other. Returns: {"train": (documents, bytes), "valid": (documents, bytes)}."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts: dict[str, list[bytes]] = {"train": [], "valid": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not skipped & set(name.split("/")) and (text := path.read_bytes()).strip():
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
            with contextlib.suppress(UnicodeDecodeError):             # a few declare another encoding
                texts["valid" if held_out else "train"].append((text.decode() + END_OF_TEXT).encode())
    if not all(texts.values()):
        raise ValueError(f"no standard-library sources under {root}; give a folder of token files with --tokens")
    for split, documents in texts.items():
        with write_whole(Path(out) / f"{split}.txt") as file:
            file.writelines(documents)
    return {split: (len(documents), sum(map(len, documents))) for split, documents in texts.items()}

def open_tokens(path: str | os.PathLike, context_length: int, vocab_size: int) -> np.ndarray:
    """Memory-maps a token file (N,). Raises: ValueError for a missing or foreign file, one of fewer than
    context_length + 1 tokens, or an id outside the vocabulary: what would fail, or lie, an hour later."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a token file ({error}); see bpe.py encode, or make tinystories") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise ValueError(f"{path} must hold one dimension of integers, it holds {tokens.dtype} {tokens.shape}")
    check_length(tokens, context_length)
    largest = max(int(tokens[i:i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
    if largest >= vocab_size:
        raise ValueError(f"{path} holds id {largest}, outside the model's vocabulary of {vocab_size}; set --vocab-size")
    return tokens

def check_length(tokens: np.ndarray, context_length: int) -> None:
    """Raises: ValueError unless there is a whole window with all its targets."""
    if len(tokens) <= context_length:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context_length}; take more or shorter ones")

def get_batch(tokens: np.ndarray, batch_size: int, context_length: int, device: str | torch.device,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Windows at uniformly random starts, and the same shifted by one: what the model sees and what it must say next.
    Args: tokens (N,) integers, N > context_length. generator: a CPU generator; None takes torch's global one.
    Returns: inputs and targets, both (B, T) int64 on `device`. Raises: ValueError for too few tokens or sizes under 1.
    Example: tokens 0..9, context_length 3, start 4 -> [4, 5, 6] and [5, 6, 7]."""
    if batch_size < 1 or context_length < 1:
        raise ValueError(f"batch_size and context_length must be at least 1, got {batch_size} and {context_length}")
    check_length(tokens, context_length)
    starts = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    return windows_at(tokens, starts, context_length, device)

def windows_at(tokens: np.ndarray, starts: np.ndarray, context_length: int,
               device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The windows at given starts (B,). The copy to a GPU is from pinned memory and does not wait."""
    batch = torch.from_numpy(tokens[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))     # (B, T + 1)
    if torch.device(device).type == "cuda":
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]                                                                     # (B, T) each

# ------------------------------------------------------------------------------ 2. checkpoints

def save_checkpoint(model: torch.nn.Module | dict, optimizer: torch.optim.Optimizer | dict, step: int,
                    out: str | os.PathLike | BinaryIO, **more: Any) -> None:
    """Writes model and optimizer, or their state dicts, the step and whatever else is given. out: a path, replaced
    whole or not at all, or an open binary file. more: tensors, numbers, strings, dicts of them, which
    torch.load(weights_only=True) reads back. Raises: OSError, when the disk is full say; an older file stays then.
    Example: save_checkpoint(model, optimizer, 100, "last.pt"); load_checkpoint("last.pt", model, optimizer) -> 100"""
    model, optimizer = (x if isinstance(x, dict) else x.state_dict() for x in (model, optimizer))
    try:
        with write_whole(out) if isinstance(out, (str, os.PathLike)) else contextlib.nullcontext(out) as file:
            torch.save({"model": model, "optimizer": optimizer, "step": step, **more}, file)
    except RuntimeError as error:                         # torch's zip writer reports a full disk as a RuntimeError
        raise OSError(f"could not write {out}, is the disk full? ({error})") from None

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

def load_checkpoint(src: str | os.PathLike | BinaryIO | dict, model: torch.nn.Module,
                    optimizer: torch.optim.Optimizer | None = None) -> int:
    """Restores model and optimizer in place, from a file or from what `read_checkpoint` gave. Returns: the step.
    Raises: ValueError, before anything has changed, if it is unreadable, or of another shape, and says which tensor."""
    state, name = (src, "the checkpoint") if isinstance(src, dict) else (read_checkpoint(src), src)
    there, here = ({key: tuple(getattr(tensor, "shape", ())) for key, tensor in tensors.items()}
                   for tensors in (state["model"], model.state_dict()))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise ValueError(f"{name} is of another configuration: {key} is {there.get(key, 'absent')} there and "
                             f"{here.get(key, 'absent')} here; use its own settings")
    if optimizer is not None:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} holds another optimizer's state ({error}); resume with that one") from None
    model.load_state_dict(state["model"])
    return state["step"]

# ------------------------------------------------------------------------------ 3. the loop

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
        least = dict(micro_batch_size=0, warmup_steps=0, checkpoint_every=0, sample_every=0, clip_norm=1e-9)
        for name in (*least, "steps", "batch_size", "context_length", "eval_every", "eval_windows", "log_every"):
            if not getattr(self, name) >= least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {getattr(self, name)}")

def plain_loss(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean loss in nats over the B * T targets, by torch's own cross-entropy of the full logits (B, T, V)."""
    return F.cross_entropy(model(x).flatten(0, -2).float(), y.flatten())

def evaluation_starts(tokens: np.ndarray, context_length: int, count: int) -> np.ndarray:
    """Starts of at most `count` evenly spread windows that overlap as little as they can: the same for every run."""
    room = len(tokens) - context_length - 1
    return np.unique(np.linspace(0, room, min(count, room // context_length + 1)).astype(np.int64))

@torch.no_grad()
def evaluate(model: torch.nn.Module, loss_fn: Callable, tokens: np.ndarray, starts: np.ndarray, context_length: int,
             batch_size: int, precision: str = "fp32") -> float:
    """Mean loss in nats per token; the denominator is all of len(starts) * T targets."""
    device = next(model.parameters()).device
    model.eval()
    total = torch.zeros((), device=device)                                       # read once, at the end
    for i in range(0, len(starts), batch_size):
        x, y = windows_at(tokens, starts[i:i + batch_size], context_length, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            total += loss_fn(model, x, y).float() * len(x)
    model.train()
    return total.item() / len(starts)

def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list[tuple[Tensor, Tensor]],
                  loss_fn: Callable, clip: Callable, config: TrainConfig, parallel: Any = None) -> Tensor:
    """One update from the micro-batches (x, y) of this rank, all of one size.
    Returns: (2,) on the device: mean loss over the whole job's targets in nats, gradient norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss, low = torch.zeros((), device=batch[0][0].device), config.precision == "autocast"
    for i, (x, y) in enumerate(batch):
        quiet = parallel is not None and i + 1 < len(batch)              # gradients travel after the last one only
        with parallel.no_sync() if quiet else contextlib.nullcontext():
            with phase("forward"), torch.autocast(x.device.type, torch.bfloat16, enabled=low):
                part = loss_fn(model, x, y) / len(batch)                 # the parts' sum is the mean over all targets
            with phase("backward"):
                part.backward()
        loss += part.detach()
    with phase("optimizer"):
        if parallel is not None:
            parallel.finish_gradient_synchronization()
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        own = partial(clip, [p for p in model.parameters() if p.requires_grad])
        norm = getattr(parallel, "clip_grad_norm_", own)(config.clip_norm)      # FSDP's: no rank sees all gradients
        optimizer.step()
    return torch.stack([loss, norm.to(loss)])

@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Names a stretch of the step, for torch.profiler and as an NVTX range."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield

def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, train_tokens: np.ndarray, valid_tokens: np.ndarray,
          config: TrainConfig, *, loss_fn: Callable = plain_loss, schedule: Callable[[int], float] | None = None,
          clip: Callable = torch.nn.utils.clip_grad_norm_, parallel: Any = None,
          run_dir: str | os.PathLike | None = None, resume: bool = False, more_state: dict | None = None,
          bytes_per_token: float = 0.0, sample: Callable[[], str] | None = None,
          log: Callable[[str], None] = print, begin: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains in place, on whatever device the model lies.
    Args: train_tokens, valid_tokens (N,) integers. loss_fn(model, x, y) -> mean nats over the targets y.
    schedule(step) -> rate, default constant max_lr. clip(parameters, max_norm) -> norm before clipping. parallel: the
    ddp.DDP or sharded_optim.FSDP that wraps the model in a job of several ranks. run_dir: takes last.pt and log.jsonl;
    None writes nothing. resume: go on from run_dir/last.pt if it is there; a run that does not renames it previous.pt.
    more_state: goes into every checkpoint (the model's configuration, say). sample() -> text to show. begin() is called
    on rank 0 once nothing forbids the run. bytes_per_token: of the evaluation windows, for the loss in bits a byte.
    Returns: train_loss and valid_loss (nats per token), bits_per_byte, tokens, seconds, tokens_per_second.
    Raises: Stop for a loss or norm that is not finite, and on SIGTERM or Ctrl-C, after saving (ranks: at a report);
    OSError where it cannot (the older file stays); ValueError for a batch that does not divide, a foreign last.pt."""
    many, sharded, ranks = parallel is not None, hasattr(parallel, "full_state_dict"), torch.distributed
    rank, world_size = (ranks.get_rank(), ranks.get_world_size()) if many else (0, 1)
    device, T, share = next(model.parameters()).device, config.context_length, config.batch_size // world_size
    micro, step_tokens = min(config.micro_batch_size or share, share), config.batch_size * T
    if config.batch_size % world_size or not share or share % micro:
        raise ValueError(f"a batch of {config.batch_size} does not divide into {world_size} ranks x batches of {micro}")
    schedule = schedule or (lambda step: config.max_lr)
    check_length(train_tokens, T), check_length(valid_tokens, T), schedule(0)     # mistakes, before anything is touched
    generator = torch.Generator().manual_seed(config.seed)
    starts = evaluation_starts(valid_tokens, T, config.eval_windows)
    last = Path(run_dir) / "last.pt" if run_dir is not None else None
    first, saved, seconds_before, loss, valid, bits = 0, 0, 0.0, math.nan, math.nan, None
    resume = resume and last is not None and last.exists()
    if largest_of_ranks(resume, device) if many else resume:             # or some would go on and others begin
        state = read_checkpoint(last)
        if state["step"] > config.steps or "data_rng" not in state:
            raise ValueError(f"{last} is of step {state['step']}, none of this run: raise --steps or drop --resume")
        if sharded:
            parallel.load_full_state_dict(state["model"])
            parallel.load_full_optimizer_state_dict(optimizer, state["optimizer"])
        else:
            load_checkpoint(state, model, optimizer)
            if any(t.dtype.itemsize < state["model"][key].dtype.itemsize for key, t in model.state_dict().items()):
                raise ValueError(f"{last} lacks bf16's fp32 copies; resume with its own --precision and --parallel")
        generator.set_state(state["data_rng"]), torch.set_rng_state(state["torch_rng"])
        first = saved = state["step"]
        seconds_before, (loss, valid, bits) = state["seconds"], state.get("losses", (loss, valid, bits))
        log(f"resumed from {last} at step {first}")
    elif last and last.exists() and rank == 0:            # another run's: no restart may take it for one of this run
        os.replace(last, last.with_name("previous.pt"))
    if rank == 0:
        begin()
    for left in last.parent.glob(".last.pt.*.tmp") if last and rank == 0 else ():    # by one killed while it saved
        left.unlink()
    journal = cut_journal(last.with_name("log.jsonl"), first) if last and rank == 0 else None
    began, marked = time.perf_counter() - seconds_before, (time.perf_counter(), first)

    def report(line: str, **values: Any) -> None:         # for people, and the same values for programs
        log(f"step {values['step']}/{config.steps} | {line}")
        if journal:
            with open(journal, "a", encoding="utf-8") as file:
                print(json.dumps({**values, "tokens": values["step"] * step_tokens}), file=file)

    def save(step: int) -> None:                          # every rank calls it: to gather is a collective
        if sharded:                                       # FSDP: no rank holds whole tensors
            state = parallel.full_state_dict(rank=0), parallel.full_optimizer_state_dict(optimizer, rank=0)
        else:                                             # ZeRO-1: the moments have owners
            state = model, optimizer.state_dict(**{"rank": 0} if hasattr(optimizer, "owner") else {})
        if last and rank == 0:
            save_checkpoint(*state, step, last, data_rng=generator.get_state(), torch_rng=torch.get_rng_state(),
                            seconds=time.perf_counter() - began, losses=(loss, valid, bits),
                            train_config=asdict(config), **(more_state or {}))
        if many:                                          # before that no rank leaves and has the launcher end the job
            largest_of_ranks(0, device)

    caught: list[int] = []                                # signals, acted on between two steps
    handlers = {number: signal.signal(number, lambda n, frame: caught.append(n))
                for number in (signal.SIGTERM, signal.SIGINT) if last}
    recent: list[Tensor] = []                             # (loss, norm) of the steps since they were last read
    model.train()
    try:
        for done in range(first + 1, config.steps + 1):
            rate = schedule(done - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with phase("data"):
                drawn = torch.randint(len(train_tokens) - T, (config.batch_size,), generator=generator).numpy()
                mine = drawn[rank * share:(rank + 1) * share]            # all ranks draw the same, each takes its own
                batch = [windows_at(train_tokens, part, T, device) for part in np.split(mine, share // micro)]
            recent.append(training_step(model, optimizer, batch, loss_fn, clip, config, parallel))

            due = lambda every: every > 0 and done % every == 0 or done == config.steps
            logging = due(config.log_every) or done == first + 1
            stopping = max(caught, default=0)             # asked once: a signal may come between any two lines
            if many:                                      # all stop at one step, or some would wait for ever
                stopping = largest_of_ranks(stopping, device) if logging else 0
            saving = stopping or due(config.checkpoint_every)
            if logging or saving:
                loss, norm = read_losses(recent, done, saved, last)      # never save what is already lost
            if logging:
                speed = (done - marked[1]) * step_tokens / (time.perf_counter() - marked[0])
                eta, memory = int((config.steps - done) * step_tokens / speed), memory_in_use(device)
                marked = time.perf_counter(), done
                report(f"loss {loss:.3f} | lr {rate:.1e} | gnorm {norm:.2f} | {speed / 1e3:.1f}k tok/s | "
                       f"mem {memory / 1e9:.1f} GB | eta {eta // 60}m{eta % 60:02d}s",
                       step=done, loss=loss, lr=rate, gnorm=norm, tokens_per_second=speed, memory=memory)
            if due(config.eval_every):
                valid = evaluate(model, loss_fn, valid_tokens, starts, T, micro, config.precision)
                bits = valid / math.log(2) / bytes_per_token if bytes_per_token else None
                report(f"valid {valid:.3f} nats/token" + (f" | {bits:.3f} bits/byte" if bits else ""),
                       step=done, valid_loss=valid, bits_per_byte=bits, seconds=time.perf_counter() - began)
            if sample and rank == 0 and config.sample_every and done % config.sample_every == 0 and done < config.steps:
                log(f"sample at step {done}: {sample()!r}")
            if saving:
                save(done)
                saved = done
            if stopping and done < config.steps:
                raise Stop(f"{signal.Signals(stopping).name} after step {done}; the checkpoint {last} is written: to "
                           "go on, add --resume to the same command", code=128 + stopping)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    tokens, seconds = config.steps * step_tokens, time.perf_counter() - began
    return {"train_loss": loss, "valid_loss": valid, "bits_per_byte": bits, "tokens": tokens,
            "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1)}

def largest_of_ranks(number: int, device: torch.device) -> int:
    """What the rank with the largest number has; waits for the device."""
    number = torch.tensor(number, device=device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return number.item()

def read_losses(recent: list[Tensor], done: int, saved: int, last: Path | None) -> list[float]:
    """Waits for the device, empties `recent` and returns its newest [loss, norm].
    Raises: Stop at the first step whose loss or norm was not finite, with the last good checkpoint, likely causes."""
    values = torch.stack(recent).tolist()
    recent.clear()
    for step, pair in enumerate(values, done - len(values) + 1):
        if not all(map(math.isfinite, pair)):
            good = f"the last good checkpoint is {last}, of step {saved}" if saved and last else "there is none"
            raise Stop(f"step {step} has loss {pair[0]} and gradient norm {pair[1]}; {good}. Likely causes: a rate too "
                       "high or a warm-up too short (try a third of --max-lr), no clipping, a precision that overflows")
    return values[-1]

def cut_journal(path: Path, first: int) -> Path:
    """Ends log.jsonl where the run begins: a killed one may have left half a line, and steps to do again."""
    lines = path.read_text(encoding="utf-8").splitlines() if first and path.exists() else []
    with write_whole(path) as file:
        whole = (line for line in lines if line.endswith("}"))
        file.writelines(f"{line}\n".encode() for line in whole if json.loads(line)["step"] <= first)
    return path

def memory_in_use(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource                                       # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# ------------------------------------------------------------------------------ 4. putting it together

# Every field of ModelConfig and TrainConfig is a flag; a preset, or a benchmark's size, says what it is if not given.
PRESETS: dict[str, dict] = {
    "corpus": dict(vocab_size=4096, context_length=256, d_model=192, num_layers=4, num_heads=6, steps=350,
                   batch_size=16, max_lr=4e-3, min_lr=4e-4, warmup_steps=40, eval_every=50, checkpoint_every=50),
    "tinystories": dict(vocab_size=10_000, context_length=256, d_model=512, num_layers=4, num_heads=16, d_ff=1344,
                        steps=10_000, batch_size=128, max_lr=3e-3, min_lr=3e-5, warmup_steps=500, eval_every=1000,
                        eval_windows=2048, checkpoint_every=2000, log_every=100, precision="autocast"),
    "owt": dict(vocab_size=32_000, context_length=1024, d_model=768, num_layers=12, num_heads=12, steps=20_000,
                batch_size=256, micro_batch_size=64, max_lr=2e-3, min_lr=2e-5, warmup_steps=1000, eval_every=1000,
                eval_windows=1024, checkpoint_every=2000, log_every=50, precision="autocast"),
}
SIZES = {name: dict(d_model=width, num_layers=layers, num_heads=heads, d_ff=None) for name, width, layers, heads in [
    ("small", 768, 12, 12), ("medium", 1024, 24, 16), ("large", 1280, 36, 20), ("xl", 2560, 32, 32),
    ("8b", 4096, 34, 32), ("10b", 4608, 50, 36)]}
# Two GPUs of 141 GB, under torchrun. A rank holds, in GB: fp32 masters 16.3, bf16 moments 16.3, of 34 blocks what
# attention and products gave 54.9, of 31 the feed-forward's hidden products 44.7; then, where the backward pass begins,
# the head 1.2 and its gradient in fp32 (twice) and bf16 6.2, the stream 1.1: 140.7 in all, measured 142.3. bf16 moments
# do not stall at beta2 = 0.95: a step moves the second by 5% of what it lacks; it settles within 7%, the update in 4%.
SIZES["8b"].update(
    vocab_size=151_936, d_ff=11_008, context_length=32_768, batch_size=2, precision="bf16", parallel="fsdp",
    compile=True, attention="triton", update="triton", moments="bf16", recompute_hidden=3, modes=["step"], warmup=2,
    repeats=4)

def keep_products(model: torch.nn.Module, recompute_hidden: int, compile: Callable) -> None:
    """Has every block keep for backward only what is dear to make: what attention and matrix products gave. Norms,
    rotations and gates are made again, in the first `recompute_hidden` blocks the feed-forward's products (T, F) too.
    Bytes kept per token and block in bf16: 12 D + 4 H, and 4 F. compile: torch.compile, or what does nothing."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(hidden_too: bool, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = "attention" in str(op) or "flash_attn" in str(op)
        if op is torch.ops.aten.mm.default:               # nobody reads what the last one gives, from F back to D
            inner, outer, d_ff = *args[1].shape, model.config.d_ff
            keep = inner != d_ff and not (hidden_too and outer == d_ff)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(hidden_too: bool) -> Callable:
        contexts = partial(create_selective_checkpoint_contexts, partial(policy, hidden_too))
        return compile(lambda block, *args: checkpoint(type(block).forward, block, *args, use_reentrant=False,
                                                       context_fn=contexts))
    kinds = forward(False), forward(True)                 # blocks of a kind share one compilation
    for i, block in enumerate(model.layers):
        block.forward = partial(kinds[i < recompute_hidden], block)
    model.ln_final.forward = compile(model.ln_final.forward)

class Setup:
    """The siblings put together as the flags ask. They are imported here, when main() calls, and handed on."""

    def __init__(self, args: argparse.Namespace):
        import bpe
        import model
        import optim
        self.args, self.bpe, self.lm, self.optim, self.rank, self.ranks = args, bpe, model, optim, 0, 1
        given = {name: value for name, value in vars(args).items() if value is not None}
        self.model_config, self.config = (kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
                                          for kind in (model.ModelConfig, TrainConfig))
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(kind for kind in there if there[kind]) if args.device == "auto" else args.device
        if not there.get(name.split(":")[0]):
            raise ValueError(f"device {name!r} is not there; use --device cpu, or a torch build that sees it")
        self.device = torch.device(name)
        if args.action == "train" and args.parallel == "none" and (count := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(f"{count} processes would do the same work; add --parallel ddp, zero1 or fsdp")
        if args.parallel != "none":
            import ddp
            self.rank, self.ranks, self.device = ddp.init_distributed("nccl" if self.device.type == "cuda" else "gloo")
        self.say = partial(print, flush=True) if self.rank == 0 else lambda *text: None
        self.how = (f"{self.config.precision}, {args.attention} attention, {args.loss} loss, {args.optimizer} "
                    f"{args.update}, compile {args.compile}, parallel {args.parallel}")
        self.attention = model.plain_attention if args.attention == "plain" else model.sdpa_attention
        if args.attention == "triton":
            import flash_attn_triton
            self.attention = flash_attn_triton.flash_attention
        for other in ("flash", "mem_efficient", "math") if args.attention == "cudnn" else ():
            getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)          # of torch's own kernels this one only
        self.whole, c = lambda weight: weight, self.config            # whole: FSDP gathers the head for the fused loss
        head_loss, backend = model.linear_cross_entropy, "triton" if self.device.type == "cuda" else "torch"
        fused = lambda m, x, y: head_loss(m.hidden(x), self.whole(m.lm_head.weight), y, backend=backend)
        self.loss_fn = fused if args.loss == "fused" else lambda m, x, y: model.cross_entropy(m(x), y)
        if args.compile and args.parallel != "fsdp":      # FSDP's hooks stay out of what is compiled
            self.loss_fn = torch.compile(self.loss_fn)
        # steps count from 0, and the first one already moves
        self.schedule = lambda step: optim.cosine_lr(step + 1, c.max_lr, c.min_lr, c.warmup_steps, c.steps)
        self.clip = partial(optim.clip_grad_norm_, error_if_nonfinite=False)     # the loop finds it, a little later
        self.generate = partial(model.generate, max_new_tokens=args.sample_tokens, temperature=args.temperature,
                                top_p=args.top_p, seed=c.seed)
        self.tokenizer = lambda: bpe.Tokenizer.from_file(Path(args.tokens) / "tokenizer.json")

    def model(self) -> torch.nn.Module:
        """A new model, the same one for the same seed. Raises: ValueError for kernels that cannot run here."""
        kernels = "triton" in (self.args.attention, self.args.update) and not os.environ.get("TRITON_INTERPRET")
        if kernels and self.device.type != "cuda":
            raise ValueError("triton needs CUDA: choose another --attention and --update, or set TRITON_INTERPRET=1")
        torch.manual_seed(self.config.seed)
        with self.device if self.args.benchmark else contextlib.nullcontext():    # no run's weights: let the GPU draw
            model = self.lm.TransformerLM(self.model_config, self.attention, checkpoint_every=self.args.recompute)
        return model.to(self.device, torch.bfloat16 if self.config.precision == "bf16" else torch.float32)

    def join(self, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        """The optimizer, and what carries gradients between ranks: None, ddp.DDP or sharded_optim.FSDP.
        AdamW decays the matrices alone; in FSDP's shards they are flat, so they are told apart before it wraps them."""
        c, args, wrapper, adamw = self.config, self.args, None, self.optim.AdamW
        groups = [{"params": [p for p in model.parameters() if p.dim() >= 2]},
                  {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        if args.parallel in ("ddp", "zero1"):
            import ddp
            wrapper = ddp.DDP(model)
        if args.parallel in ("zero1", "fsdp"):
            import sharded_optim
            if args.optimizer == "muon":
                raise ValueError("muon needs whole matrices; use --parallel ddp, or --optimizer adamw")
            if args.parallel == "zero1":
                adamw = partial(sharded_optim.ShardedOptimizer, optimizer_cls=adamw)
            else:                                         # dtypes of gathered weights (None: as they are) and of sums
                dtypes = {"fp32": (), "autocast": (torch.bfloat16,), "bf16": (None, torch.bfloat16)}[c.precision]
                wrapper = sharded_optim.FSDP(model, *dtypes)
                self.whole = wrapper.gathered
                if args.compile or args.recompute_hidden:                      # blocks, within FSDP's hooks
                    keep_products(model, args.recompute_hidden, torch.compile if args.compile else lambda f: f)
        options = dict(lr=c.max_lr, weight_decay=c.weight_decay, betas=(c.beta1, c.beta2))
        if args.optimizer == "muon":
            optimizer = self.optim.Muon(model.named_parameters(), **options)
        else:
            optimizer = adamw(groups, **options, fused=None if args.update == "loop" else args.update,
                              state_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.moments],
                              master_weights=True)
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(map(id, model.parameters())), "a parameter stands in no group, or in two"
        return optimizer, wrapper

    def data(self) -> tuple[np.ndarray, np.ndarray, Any]:
        """Training and validation tokens, and their tokenizer; what is missing of the embedded corpus is made now."""
        folder, c = Path(self.args.tokens), self.model_config
        if folder == Path("out/corpus") and not (folder / "valid.npy").exists():
            print(f"corpus: {gather_corpus(folder)} (documents, bytes) in {folder}")
            learned = self.bpe.train_bpe(folder / "train.txt", c.vocab_size, [END_OF_TEXT])
            self.bpe.Tokenizer(*learned, [END_OF_TEXT]).save(folder / "tokenizer.json")
            for split in ("train", "valid"):
                self.bpe.encode_file(self.tokenizer(), folder / f"{split}.txt", folder / f"{split}.npy")
        tokens = lambda split: open_tokens(folder / f"{split}.npy", c.context_length, c.vocab_size)
        return tokens("train"), tokens("valid"), self.tokenizer()

    def run(self) -> None:
        """Trains as the flags say; prints a sample and the RESULT line, which also goes to result.json."""
        args, config, run_dir, first = self.args, self.config, Path(self.args.run_dir), self.rank == 0
        train_tokens, valid_tokens, tokenizer = self.data()
        starts = evaluation_starts(valid_tokens, config.context_length, config.eval_windows)
        targets = windows_at(valid_tokens, starts, config.context_length, "cpu")[1]
        lengths = torch.tensor([len(tokenizer.vocab.get(i, b"")) for i in range(self.model_config.vocab_size)])
        if not lengths[targets].all():
            raise ValueError(f"{args.tokens}/valid.npy holds ids that its tokenizer.json has not; encode it anew")
        about = dict(model_config=asdict(self.model_config), train_config=asdict(config), command=sys.argv,
                     torch=torch.__version__, python=sys.version)
        optimizer, wrapper = self.join(model := self.model())
        self.schedule(0), self.generate(model, [])        # refuse wrong settings now, not after the training
        def begin() -> None:                              # a run keeps its tokenizer, and the source that made it
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "result.json").unlink(missing_ok=True)
            (run_dir / "about.json").write_text(json.dumps(about, indent=1))
            for path in (*map(Path(__file__).with_name, SOURCES), Path(args.tokens) / "tokenizer.json"):
                with contextlib.suppress(shutil.SameFileError):
                    shutil.copy(path, run_dir)
        self.say(f"{self.lm.count_parameters(self.model_config):,} parameters | {len(train_tokens):,} training tokens"
                 f" | {config.steps} steps of {config.batch_size} x {config.context_length} | {self.device}, {self.how}"
                 f" | seed {config.seed}")
        sample = None if args.parallel == "fsdp" else lambda: self.sample(model, tokenizer)
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0     # by torchrun --max-restarts
        try:
            result = train(model, optimizer, train_tokens, valid_tokens, config, loss_fn=self.loss_fn, clip=self.clip,
                           schedule=self.schedule, parallel=wrapper, run_dir=run_dir, resume=args.resume or restarted,
                           more_state={"model_config": about["model_config"]}, sample=sample, log=self.say,
                           bytes_per_token=lengths[targets].float().mean().item(), begin=begin)
        except Stop as stop:
            if first:
                (run_dir / "result.json").write_text(json.dumps({"stopped": str(stop)}))
            raise
        if first:
            (run_dir / "result.json").write_text(json.dumps(result))
            print(f"\n{sample()}\n" if sample else "")
            plot([run_dir])
            print("RESULT " + json.dumps(result), flush=True)

    def sample(self, model: torch.nn.Module, tokenizer: Any) -> str:
        """What the model writes after --prompt; of ids that the tokenizer has not it says nothing."""
        end = tokenizer.special_tokens.get(END_OF_TEXT, self.model_config.vocab_size)
        stop = [end] if end < self.model_config.vocab_size else []
        new = self.generate(model, [tokenizer.encode(self.args.prompt) or stop or [0]], stop_ids=stop)
        return self.args.prompt + tokenizer.decode([i for i in new[0].ids if i in tokenizer.vocab])

    def trained(self) -> tuple[torch.nn.Module, Any]:
        """The model of --checkpoint, in the shape that it states, and the tokenizer."""
        path = self.args.checkpoint or Path(self.args.run_dir) / "last.pt"
        state = read_checkpoint(path)
        try:
            self.model_config = self.lm.ModelConfig(**state["model_config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not state a configuration of model.py ({error}); use its own one") from None
        model = self.model()
        load_checkpoint(state, model)
        beside = Path(path).with_name("tokenizer.json")   # a run keeps its own
        return model.eval(), self.bpe.Tokenizer.from_file(beside) if beside.exists() else self.tokenizer()

def compare(run_dirs: list[Path]) -> None:
    """A row a run: its losses, and the tokens it took to get as low as the first one ended. Then their picture."""
    if missing := [run_dir for run_dir in run_dirs if not (run_dir / "result.json").exists()]:
        raise ValueError(f"{missing[0]} holds no run that came to an end; compare folders that were a --run-dir")
    results = [json.loads((run_dir / "result.json").read_text()) for run_dir in run_dirs]
    target = results[0].get("valid_loss", math.inf)
    print(f"run                     steps  batch   max lr   train   valid bits/byte  tokens to {target:.3f}")
    for run_dir, result in zip(run_dirs, results):
        config = json.loads((run_dir / "about.json").read_text())["train_config"]
        reached = [tokens for tokens, loss in read_curve(run_dir, "valid_loss") if loss <= target]
        print("{:22s} {steps:6d} {batch_size:6d} {max_lr:8.1e} ".format(run_dir.name, **config) + (
              result["stopped"][:60] if "stopped" in result else
              f"{result['train_loss']:7.3f} {result['valid_loss']:7.3f} {result['bits_per_byte'] or math.nan:9.3f} "
              f"{format(reached[0], ',') if reached else 'not reached':>16}"))
    plot(run_dirs)

def read_curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(tokens, value) of the lines of log.jsonl that have the key."""
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [(line["tokens"], line[key]) for line in lines if key in line]

def plot(run_dirs: list[Path]) -> None:
    """Loss against tokens, to loss.png in the first folder, if matplotlib is there; of several runs only validation."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no loss.png: pip install matplotlib draws one")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for run_dir in run_dirs:
        for key, style in (("loss", "-"), ("valid_loss", "o--"))[len(run_dirs) > 1:]:
            axes.plot(*[*zip(*read_curve(run_dir, key))] or ([], []), style, label=f"{run_dir.name} {key}", ms=4, lw=1)
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.legend(fontsize=7)
    figure.savefig(run_dirs[0] / "loss.png", dpi=130, bbox_inches="tight")

def explain(setup: Setup) -> None:
    """What one step of the run that the flags ask for does, in numbers."""
    c, m, count = setup.config, setup.model_config, setup.lm.count_parameters(setup.model_config)
    tokens, micro = c.batch_size * c.context_length, c.micro_batch_size or c.batch_size
    flops = setup.lm.count_flops(m, c.context_length)["total"]
    rates = ", ".join(f"{setup.schedule(step - 1):.1e}" for step in (1, c.warmup_steps, c.steps))
    print(f"""One step of `python train.py` with these flags:
  batch     {c.batch_size} windows of {c.context_length} tokens = {tokens:,} tokens, from anywhere in the token file, in
            {c.batch_size // micro} micro-batch(es) of {micro}; the targets are the same windows one token later
  forward   {m.num_layers} blocks of width {m.d_model}, {count:,} parameters; an untrained model is expected to lose
            ln {m.vocab_size} = {math.log(m.vocab_size):.2f} nats per token
  backward  {3 * c.batch_size * flops:.2e} FLOPs with the forward pass, which is a third of it
  update    the gradient's norm is cut to {c.clip_norm}; rates {rates} at steps 1, {c.warmup_steps}, {c.steps}
  memory    {16 * count / 1e6:.0f} MB for weights, gradients and AdamW's two moments in fp32; activations come on top
  run       {c.steps} steps = {c.steps * tokens:,} tokens, {c.steps * tokens / count:.1f} a parameter""")

# ------------------------------------------------------------------------------ 5. how fast, and why

def bench(setup: Setup) -> None:
    """Times forward, forward+backward and whole steps on random tokens, beside the matrix products measured here.
    Raises: ValueError for flags, and OSError for folders, that cannot be."""
    args, c, device, ranks, say = setup.args, setup.config, setup.device, setup.ranks, setup.say
    cuda, low, B, T = device.type == "cuda", c.precision == "autocast", c.batch_size // ranks, c.context_length
    if args.repeats < 1 or args.warmup < 0:
        raise ValueError(f"--repeats must be at least 1 and --warmup at least 0, got {args.repeats} and {args.warmup}")
    if args.memory_snapshot and not cuda:
        raise ValueError(f"--memory-snapshot is of CUDA's memory, and this is {device}; leave it out")
    for folder in filter(None, (args.profile, args.memory_snapshot)):
        folder.mkdir(parents=True, exist_ok=True)
    n, dtype = 8192 if cuda else 1024, torch.bfloat16 if cuda or c.precision != "fp32" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    ceiling = ranks * 2 * n ** 3 / np.median(measure(lambda: a @ b, cuda, 5, 15))
    flops = setup.lm.count_flops(setup.model_config, T)
    causal = ranks * B * (flops["total"] - flops["attention scores and sums"] / 2)  # half of the scores are not seen
    say(f"{setup.lm.count_parameters(setup.model_config) / 1e6:.1f}M, {ranks * B} x {T} tokens, {setup.how}, recompute "
        f"{args.recompute} | {ranks} x {torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__} | "
        f"ceiling {ceiling / 1e12:.2f} TFLOP/s ({dtype} product of {n})\n"
        "mode                mean ms     std    median    tokens/s  TFLOP/s of ceiling  peak GB")
    tokens = np.random.default_rng(c.seed).integers(0, setup.model_config.vocab_size, 1 << 22, dtype=np.uint32)
    generator = torch.Generator().manual_seed(c.seed + setup.rank)
    for mode in args.modes:
        optimizer, wrapper = setup.join(model := setup.model())

        def one() -> Tensor | None:
            x, y = get_batch(tokens, B, T, device, generator)
            if mode == "step":
                return training_step(model, optimizer, [(x, y)], setup.loss_fn, setup.clip, c, wrapper)
            with torch.set_grad_enabled(mode != "forward"), torch.autocast(device.type, torch.bfloat16, low):
                loss = setup.loss_fn(model, x, y)
            if mode == "forward+backward":
                loss.backward()
                if wrapper is not None:
                    wrapper.finish_gradient_synchronization()
                optimizer.zero_grad(set_to_none=True)

        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.memory._record_memory_history("all" if args.memory_snapshot else None)
        times = measure(one, cuda, args.warmup, args.repeats)
        seconds, memory = np.median(times), memory_in_use(device)
        rate = causal * (1 if mode == "forward" else 3) / seconds
        say(f"{mode:17s} {np.mean(times) * 1e3:9.2f} {np.std(times) * 1e3:7.2f} {seconds * 1e3:9.2f} "
            f"{ranks * B * T / seconds:11,.0f} {rate / 1e12:8.2f} {rate / ceiling:10.1%} {memory / 1e9:8.2f}")
        if args.profile:
            with torch.profiler.profile() as profile:
                measure(one, cuda, 0, 1)
            say(profile.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=25))
            profile.export_chrome_trace(str(args.profile / f"trace-{mode}-{setup.rank}.json"))
        if args.memory_snapshot:
            torch.cuda.memory._dump_snapshot(str(args.memory_snapshot / f"memory-{mode}-{setup.rank}.pickle"))

def measure(f: Callable[[], Any], cuda: bool, warmup: int, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` ones; on a GPU without waits between them, as in a real run."""
    event = lambda: torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    mark = event if cuda else time.perf_counter
    marks = [mark()]
    for _ in range(warmup + repeats):
        f()
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in zip(marks[warmup:], marks[warmup + 1:])]

def main() -> int:
    """Reads the flags and does what they ask. Returns the exit status: 2 for a caller's mistake."""
    try:
        import model
    except ImportError as error:
        return print(f"train.py: {error}; the command line takes model.py, optim.py and bpe.py", file=sys.stderr) or 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", nargs="?", default="train", choices=["train", "corpus", "generate", "export", "compare"])
    add("folders", nargs="*", type=Path, help="compare: runs (default RUN_DIR); corpus, export: the folder to write")
    add("--preset", choices=list(PRESETS), default="corpus", help="sets other defaults than those below, the corpus's")
    add("--tokens", help="folder with tokenizer.json, train.npy and valid.npy (default out/PRESET)")
    add("--run-dir", help="for checkpoints and logs (default out/train, or out/PRESET-train)")
    add("--resume", action="store_true", help="go on from RUN_DIR/last.pt")
    add("--checkpoint", help="generate, export: default RUN_DIR/last.pt")
    add("--optimizer", choices=["adamw", "muon"], default="adamw")
    add("--update", choices=["loop", "foreach", "triton"], default="foreach", help="AdamW's way over the parameters")
    add("--moments", choices=["fp32", "bf16"], default="fp32", help="AdamW's; triton computes in fp32 all the same")
    add("--parallel", choices=["none", "ddp", "zero1", "fsdp"], default="none", help="under torchrun")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    add("--attention", choices=["plain", "sdpa", "cudnn", "triton"], default="sdpa")
    add("--loss", choices=["full", "fused"], default="fused", help="fused: the (B * T, V) logits never exist")
    add("--compile", action=argparse.BooleanOptionalAction, default=False)
    add("--recompute", type=int, default=0, metavar="K", help="keep activations only at every K-th block")
    add("--recompute-hidden", type=int, default=0, metavar="N", help="fsdp: keep no feed-forward products of N blocks")
    add("--benchmark", choices=list(SIZES), help="time a model of this size instead of training")
    add("--modes", nargs="+", choices=(modes := ["forward", "forward+backward", "step"]), default=modes)
    add("--profile", metavar="DIR", type=Path, help="with --benchmark: print torch.profiler's table, write its trace")
    add("--memory-snapshot", metavar="DIR", type=Path, help="with --benchmark: write CUDA's memory history")
    add("--explain", action="store_true", help="say what a step does, and stop")
    for name, default in dict(prompt="def get(self", sample_tokens=200, temperature=0.7, top_p=0.95, warmup=5,
                              repeats=10).items():
        add("--" + name.replace("_", "-"), type=type(default), default=default, help=f"default {default}")
    kinds = {kind: {"type": kind} for kind in (int, float, str)} | {int | None: {"type": int}}
    kinds[bool] = {"action": argparse.BooleanOptionalAction}
    words = dict(norm="pre|post|none:", positions="rope|none:", ffn="swiglu|silu:", precision="fp32|autocast|bf16:")
    defaults = {**vars(model.ModelConfig), **vars(TrainConfig), **PRESETS["corpus"]}
    for name, hint in {**get_type_hints(model.ModelConfig), **get_type_hints(TrainConfig)}.items():
        if hint in kinds:
            add("--" + name.replace("_", "-"), help=f"{words.get(name, '')} default {defaults[name]}", **kinds[hint])
    given = parser.parse_args()
    parser.set_defaults(tokens=f"out/{given.preset}", **{**PRESETS[given.preset], **SIZES.get(given.benchmark, {})},
                        run_dir="out/train" if given.preset == "corpus" else f"out/{given.preset}-train")
    args = parser.parse_args()
    if given.warmup_steps is None:                        # a shorter run warms up for a shorter time
        args.warmup_steps = min(args.warmup_steps, args.steps // 10)
    if args.parallel == "none":
        return act(args)
    import ddp
    ddp.run_rank(act, args)

def act(args: argparse.Namespace) -> int:
    """Does what the flags ask and returns the exit status: 2 for a caller's mistake, that of the signal for a stop."""
    try:
        folder = args.folders[0] if args.folders else Path("out", args.action)
        if args.action == "corpus":
            print(f"{folder}: {gather_corpus(folder)} (documents, bytes)")
        elif args.action == "compare":
            compare(args.folders or [Path(args.run_dir)])
        elif args.explain:
            explain(Setup(args))
        elif args.benchmark:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")     # fewer gaps in memory
            bench(Setup(args))
        elif args.action == "train":
            Setup(args).run()
        else:
            model, tokenizer = (setup := Setup(args)).trained()
            if args.action == "generate":
                print(setup.sample(model, tokenizer))
            else:
                setup.lm.save_hf(model, folder, tokenizer)
                print(f"{folder}: config.json, model.safetensors and tokenizer.json for transformers and vLLM")
    except (Stop, ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        remedy = "\ntrain.py: lower --micro-batch-size, or raise --recompute" if full else ""
        print(f"train.py: {error}{remedy}", file=sys.stderr)
        return getattr(error, "code", 1 if full else 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
