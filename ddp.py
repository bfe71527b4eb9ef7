"""ddp.py - data parallelism: every rank holds the whole model, works on its own part of the batch, averages gradients.

What:       four ways of averaging the gradients, each removing one cost of the one before:
              naive       one all-reduce a parameter, after backward       pays a latency for every parameter
              flat        one all-reduce of everything, after backward     pays one latency and two copies
              overlapped  one all-reduce a parameter, during backward      hides the transfer behind the computation
              bucketed    (DDP) the same, some megabytes at a time         hides it and pays few latencies
            and the collectives themselves: a ring all-reduce over send and receive, and a benchmark of all of them.
Source:     Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, sections 3.2 (buckets, overlap, unused parameters);
            Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 3 (the ring and its lower bound).
Deviations: 1. The buckets stay in reverse registration order; torch's DDP reorders them after the first step.
            2. A parameter no rank used ends with grad None, as in one process. The flags that tell ride in the bucket
               itself, so it costs no extra message, and a host sync only on a rank that did not use the parameter.
            3. Buffers are broadcast once, at the start, not before each forward.
Copy:       this file alone; needs torch. MIT.
Run:        python ddp.py                                    two ranks on this CPU, explained; of what it prints:
              rank 0 reduce-scatter sends chunk 0, gets chunk 1: [1.0, 2.0, 33.0, 44.0]
              rank 1 reduce-scatter sends chunk 1, gets chunk 0: [11.0, 22.0, 30.0, 40.0]
              5.weight arrives
              4.bias arrives
              2.bias arrives
                 bucket 0 leaves
            python ddp.py --bench                            two ranks on this CPU, timed
            torchrun --nproc-per-node 2 ddp.py --bench       one rank a GPU: the collectives, then a training step; on
              two H200s, 2568 M parameters in bf16: 278.1 and 276.6 ms a step, torch's DDP 277.3, nothing sent 263.8
"""
import argparse
import contextlib
import datetime
import gc
import hashlib
import os
import sys
import tempfile
import time
import traceback
import uuid

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

# Dims: N ranks, S bytes of one message, W bytes a second that a rank can send
# A collective is a call that all ranks make together. all-reduce: each gets the sum of the ranks' tensors. broadcast:
# each gets one rank's. all-gather: each gets all ranks' parts in a row. reduce-scatter: rank r gets part r of the sum.

# ---------------------------------------------------------------------------- Ranks: processes that know their number

def init_distributed(backend: str | None = None, timeout_seconds: float = 600.0) -> tuple[int, int, torch.device]:
    """Joins the job that torchrun started and returns (rank, N, device).

    Args: backend "nccl" (one GPU a rank; the default where there is a GPU) or "gloo" (CPU). timeout_seconds: how long
    a collective may wait for a rank that lives but does not answer; a dead one ends the job at once under torchrun.
    Raises: ValueError outside torchrun, or when a host has more ranks than GPUs.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"{', '.join(missing)} not set; start with: torchrun --nproc-per-node N {sys.argv[0]} ...")
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if backend == "nccl":
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}; "
                             "lower --nproc-per-node, or compute on the CPU, over gloo")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:         # all ranks are here: no name to look up
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(_meet(store, rank, world_size, timeout_seconds), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout,
                            device_id=device if backend == "nccl" else None)
    return rank, world_size, device

def _meet(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that the ranks of this start have in common, and no earlier start had: torchrun keeps its store over a
    restart, with the addresses of the dead in it, and over several hosts its agents' restart counts may differ.

    Rank 0 answers every greeting that it finds. One from the dead it answers in vain; then the living one replaces it.
    """
    me = uuid.uuid4().hex
    if rank:
        store.set(f"greeting {rank}", me)
        name = store.get(f"answer to {me}").decode()                           # waits
        store.set(f"{name} met {rank}", "")
        return name
    absent, deadline = set(range(1, world_size)), time.monotonic() + timeout_seconds
    while absent:
        for r in absent:
            if store.check([f"greeting {r}"]):
                store.set("answer to " + store.get(f"greeting {r}").decode(), me)
        time.sleep(0.01)
        absent = {r for r in absent if not store.check([f"{me} met {r}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(absent)} did not come within {timeout_seconds:.0f} s")
    return me

def run_rank(work, *args) -> None:  # twin: sharded_optim.py
    """Calls work(*args) and ends this process with the exit code that it returns (None: 0), or with 1 after an error.

    It does not end through the interpreter. There a gloo thread that still has a tensor to let go of asks for the
    interpreter's lock, gets none and aborts the process; and destroy_process_group() need not have ended those threads:
    torch.optim imports torch._dynamo, which keeps the group. A rank that failed waits before it goes: most often it
    lost a peer, and the launcher names the rank that it sees ending first, so that has to be the peer.
    """
    code = 1
    try:
        code = work(*args) or 0
        if code == 0 and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        time.sleep(5)
    finally:
        with contextlib.suppress(OSError):                                     # nobody may be reading any more
            sys.stdout.flush()
        os._exit(code)

def spawn(worker, world_size: int, *args) -> None:  # twin: sharded_optim.py
    """Runs worker(rank, world_size, *args) in `world_size` gloo processes of this machine. They meet through a file,
    so that no port is taken. If one dies, the others are stopped and the exception names its rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (worker, world_size, os.path.join(folder, "meet"), args), world_size)

def _enter(rank: int, worker, world_size: int, path: str, args: tuple) -> None:  # twin: sharded_optim.py
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")   # all ranks are here
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    run_rank(worker, rank, world_size, *args)

def ring_all_reduce(tensor: Tensor, log=None) -> int:
    """Sums `tensor` over all ranks, in place, talking to the two neighbours only. Returns the bytes this rank sent.

    The tensor is cut into N chunks. N-1 times each rank passes a chunk on, and adds the one it gets to its own: then
    each holds one finished chunk (a reduce-scatter). N-1 times more it passes finished chunks on (an all-gather). So
    it sends 2 (N-1)/N S bytes, and none can do with less: the time is at least 2 (N-1)/N S/W.
    Source: Patarasuk & Yuan 2009, section 3. Example: ranks hold [1, 2] and [10, 20]; both end with [11, 22].
    """
    N, rank = dist.get_world_size(), dist.get_rank()
    padded = torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % N))
    chunks = list(padded.chunk(N)) if padded.numel() else []
    sent = 0
    for phase, offset in (("reduce-scatter", 0), ("all-gather", 1)):
        for step in range(N - 1 if chunks else 0):
            outgoing, incoming = (rank + offset - step) % N, (rank + offset - step - 1) % N
            received = torch.empty_like(chunks[incoming])
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, chunks[outgoing], (rank + 1) % N),
                                                dist.P2POp(dist.irecv, received, (rank - 1) % N)]):
                work.wait()                                # in a batch: else NCCL's sends could wait in a circle
            chunks[incoming].copy_(chunks[incoming] + received if phase == "reduce-scatter" else received)
            sent += received.numel() * received.element_size()
            if log:
                log(phase, step, outgoing, incoming, padded)
    tensor.copy_(padded[:tensor.numel()].view(tensor.shape))
    return sent

# ------------------------------------------------------------------------------------------------- The plain versions

def broadcast_from_rank0(module: nn.Module) -> None:
    """Gives every rank rank 0's parameters and buffers: frozen ones too, tied ones once, any dtype and stride.

    Raises: ValueError on every rank if the modules differ in names, shapes or dtypes (which would otherwise hang
    later), or if a tensor is not where the backend can reach it.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not running; call init_distributed() under torchrun first")
    tensors = [*module.named_parameters(), *module.named_buffers()]            # both list a shared tensor once
    wanted = {"nccl": "cuda", "gloo": "cpu"}.get(dist.get_backend())
    for name, t in tensors:
        if wanted and t.device.type != wanted:
            raise ValueError(f"{name} is on {t.device}, the {dist.get_backend()} backend needs it on {wanted}; "
                             f"move the module there before wrapping it")
    if not tensors:
        return
    text = repr([(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors])
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    extremes = torch.tensor([digest, -digest], device=tensors[0][1].device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)                            # the largest and minus the smallest
    if extremes[0] != -extremes[1]:
        raise ValueError("the ranks' modules differ in names, shapes, dtypes or requires_grad; build the same on all")
    for _, t in tensors:
        data = t.detach()
        raw = data.reshape(-1).view(torch.uint8)                               # bytes: collectives know few dtypes
        dist.broadcast(raw, src=0)
        if not data.is_contiguous():                                           # then reshape made a copy
            data.copy_(raw.view(data.dtype).view(data.shape))

def _all_reduce_mean(tensor: Tensor) -> None:
    dist.all_reduce(tensor)
    tensor.div_(dist.get_world_size())

def all_reduce_naive(module: nn.Module) -> None:
    """Averages the gradients over the ranks: one all-reduce a parameter. Call after backward, before the step.
    A parameter without a gradient counts as zero, since every rank has to take part in every all-reduce.
    Example: loss_fn(model(x), y).backward(); all_reduce_naive(model); optimizer.step()"""
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            _all_reduce_mean(p.grad)

def all_reduce_flat(module: nn.Module) -> None:
    """The same in one message a dtype: copy all gradients into one buffer, average it, copy them back.
    Example: gradients [1, 2] and [3] on one rank, [5, 2] and [5] on the other: both end with [3, 2] and [4]"""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_dtype.setdefault(p.grad.dtype, []).append(p)
    for parameters in by_dtype.values():
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        _all_reduce_mean(flat)
        for p, averaged in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(averaged.view(p.shape))

class OverlappedDDP(nn.Module):
    """The gradient of the last layer is finished while backward still works on the ones before it: so send it at once.

    A hook on each parameter starts its all-reduce, which runs beside the rest of backward, and
    finish_gradient_synchronization() waits for all of them. Every parameter has to get a gradient on every rank, in
    the same order; DDP, below, lifts that.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        broadcast_from_rank0(module)
        self.module = module
        self._in_flight: list[tuple[dist.Work, Tensor]] = []
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._send)

    def _send(self, p: nn.Parameter) -> None:
        p.grad = p.grad.contiguous()
        self._in_flight.append((dist.all_reduce(p.grad, async_op=True), p.grad))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def finish_gradient_synchronization(self) -> None:
        """Waits for the all-reduces of this backward. On a GPU the stream waits, not the host."""
        for work, grad in self._in_flight:
            work.wait()
            grad.div_(dist.get_world_size())
        self._in_flight.clear()

# --------------------------------------------------------------------------------------------------- The fast version

class _Bucket:
    """One buffer for the gradients of several parameters, which are views into it, and behind them a flag for each."""

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        first, total = self.parameters[0], sum(p.numel() for p in self.parameters)
        self.buffer = torch.zeros(total + len(named), dtype=first.dtype, device=first.device)
        self.flags = self.buffer[total:]                                       # did any rank have this gradient?
        self.views, offset = [], 0
        for p in self.parameters:
            stride = torch.empty_like(p, device="meta").stride()               # p's own order of dimensions, dense
            self.views.append(self.buffer.as_strided(p.shape, stride, offset))
            offset += p.numel()
        self.arrived: set[int] = set()
        self.unused: list[int] = []
        self.work: dist.Work | None = None

    def adopt(self, i: int) -> None:
        """Moves parameter i's gradient into the buffer, unless it is there already (accumulated in place)."""
        grad, view = self.parameters[i].grad, self.views[i]
        if grad is not view:
            if grad.layout != torch.strided:
                raise ValueError(f"{self.names[i]} has a sparse gradient; build its embedding with sparse=False")
            view.copy_(grad)
            self.parameters[i].grad = view                                     # the fresh gradient's memory goes free

class DDP(nn.Module):
    """Averages gradients bucket by bucket while backward still runs. The fast version of the three above.

    Args:
        module: the same on every rank, on this rank's device; its values become rank 0's.
        bucket_mb: how many MiB of gradients travel together; 0 sends every parameter by itself.
    A step:  loss_fn(ddp(x), y).backward(); ddp.finish_gradient_synchronization(); optimizer.step()
    With a loss that is a mean over this rank's examples, and as many examples on each rank, the gradients are those of
    the mean over the whole batch. Accumulating: all micro-batches but the last inside `with ddp.no_sync():`.

    Gradients are views into the buckets and stay so (zero_grad may set them to None: the next are copied in).
    A parameter that some rank did not use counts as zero there; one that no rank used ends with grad None.
    `ddp.module` is the model itself: take its state_dict() for a checkpoint without a prefix.
    Raises: ValueError if torch.distributed is not running or the ranks' modules differ, for a negative bucket_mb, and
    for a second backward before finish_gradient_synchronization().
    Source: arXiv:2006.15704, section 3.2.
    """

    def __init__(self, module: nn.Module, bucket_mb: float = 25):
        super().__init__()
        if bucket_mb < 0:
            raise ValueError(f"bucket_mb must be at least 0, got {bucket_mb}")
        broadcast_from_rank0(module)
        self.module = module
        self._world_size = dist.get_world_size()
        # NCCL divides while it sums; gloo's average is younger than the torch versions this should run on.
        self._op = dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM
        self._synchronize = True
        self._next = 0                    # buckets leave in the same order on every rank, or NCCL would mispair them
        self._buckets = [_Bucket(named) for named in assign_buckets(module, bucket_mb * 2 ** 20)]
        for bucket in self._buckets:
            for i, p in enumerate(bucket.parameters):
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket, i=i: self._gradient_ready(bucket, i))

    def forward(self, *args, **kwargs):
        if self._next and torch.is_grad_enabled():
            raise ValueError("gradients of the last backward are still on their way; "
                             "call finish_gradient_synchronization() before optimizer.step()")
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self):
        """Backward inside only adds up this rank's gradients; the first one outside sends the sums."""
        before, self._synchronize = self._synchronize, False
        try:
            yield
        finally:
            self._synchronize = before

    def _gradient_ready(self, bucket: _Bucket, i: int) -> None:
        if bucket.work is not None:
            raise ValueError(f"{bucket.names[i]} got another gradient after its bucket had left: call "
                             "finish_gradient_synchronization() once after each backward, accumulate inside no_sync(), "
                             "and checkpoint activations with use_reentrant=False")
        bucket.adopt(i)
        if self._synchronize:
            bucket.arrived.add(i)
            while self._next < len(self._buckets) and \
                    len(self._buckets[self._next].arrived) == len(self._buckets[self._next].parameters):
                self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.flags.fill_(1)
        for i, p in enumerate(bucket.parameters):
            if p.grad is None:
                bucket.unused.append(i)
                bucket.views[i].zero_()
                bucket.flags[i] = 0
            else:
                bucket.adopt(i)                                                # a gradient that came without a hook
        bucket.work = dist.all_reduce(bucket.buffer, op=self._op, async_op=True)

    def finish_gradient_synchronization(self) -> None:
        """Sends what backward left over (buckets with unused parameters) and waits. On a GPU the stream waits, not the
        host. After it, every rank holds the same gradients."""
        while self._next < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            bucket.work.wait()
            if self._op == dist.ReduceOp.SUM:
                bucket.buffer.div_(self._world_size)
            for i in bucket.unused:                                            # reading a flag waits for the device
                bucket.parameters[i].grad = bucket.views[i] if bucket.flags[i] != 0 else None
            bucket.work, bucket.unused, bucket.arrived = None, [], set()
        self._next = 0

def assign_buckets(module: nn.Module, bucket_bytes: float) -> list[list[tuple[str, nn.Parameter]]]:
    """Parameters that want gradients, in reverse registration order, which is about the order in which backward
    finishes them; cut whenever the next would push a bucket over `bucket_bytes`. A bucket holds one dtype."""
    buckets: list[list[tuple[str, nn.Parameter]]] = []
    open_bucket: dict[torch.dtype, tuple[list, int]] = {}
    for name, p in reversed([(name, p) for name, p in module.named_parameters() if p.requires_grad]):
        size = p.numel() * p.element_size()
        bucket, filled = open_bucket.get(p.dtype, (None, 0))
        if bucket is None or filled + size > bucket_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append((name, p))
        open_bucket[p.dtype] = (bucket, filled + size)
    return buckets

# ------------------------------------------------------------------------------------------------------------- Checks

def _toy(seed: int = 0) -> nn.Module:
    """Tied weights, a frozen parameter, odd sizes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3))
    model[4].weight = model[2].weight
    model[5].bias.requires_grad_(False)
    return model

def _train_toy(model: nn.Module, batches: list[Tensor], after_backward) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        after_backward(model)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]

def _check_worker(rank: int, world_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(world_size, 4, 5, generator=generator) for _ in range(3)]
    one = _toy()                                             # one process, the ranks' parts as its micro-batches
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        for x in batch:
            one(x).square().mean().backward()
        for p in one.parameters():
            if p.grad is not None:
                p.grad /= world_size
        optimizer.step()
    mine = [batch[rank] for batch in batches]
    finish = lambda wrapped: wrapped.finish_gradient_synchronization()
    results = {"naive": _train_toy(_toy(), mine, all_reduce_naive), "flat": _train_toy(_toy(), mine, all_reduce_flat),
               "overlapped": _train_toy(OverlappedDDP(_toy(seed=rank)), mine, finish)}
    for bucket_mb in (0, 150 / 2 ** 20, 25):
        results[f"bucketed, {bucket_mb:.2g} MiB"] = _train_toy(DDP(_toy(seed=rank), bucket_mb), mine, finish)
    for name, parameters in results.items():                 # bit for bit: a sum of two terms has only one rounding
        for ours, theirs in zip(parameters, one.parameters(), strict=True):
            if not torch.equal(ours, theirs):
                raise AssertionError(f"{name}: differs from one process by {(ours - theirs).abs().max():.1e}")
    ring = torch.arange(5.) + rank
    sent = ring_all_reduce(ring)
    assert torch.equal(ring, 2 * torch.arange(5.) + 1) and sent == 2 * (world_size - 1) / world_size * 6 * 4
    if rank == 0:
        print("check:", "; ".join(results), "= one process, bit for bit, after 3 steps  OK")

def self_check() -> None:
    """Two gloo ranks against one process. Raises (in the parent) if any version's parameters differ in a single bit."""
    spawn(_check_worker, 2)

def _walk_worker(rank: int, world_size: int) -> None:
    def say(text: str) -> None:                              # one rank at a time, in order
        for r in range(world_size):
            if r == rank:
                print(text, flush=True)
            dist.barrier()

    def title(text: str) -> None:
        if rank == 0:
            print(text, flush=True)
        dist.barrier()
    title("1. A ring all-reduce of four numbers on two ranks, a chunk of two at a time")
    x = (torch.arange(4.) + 1) * 10 ** rank
    say(f"   rank {rank} starts with {x.tolist()}")
    sent = ring_all_reduce(x, lambda phase, step, out, into, state: say(
        f"   rank {rank} {phase:14s} sends chunk {out}, gets chunk {into}: {state.tolist()}"))
    say(f"   rank {rank} sent {sent} bytes = 2 (N-1)/N S = {2 * (world_size - 1) / world_size * 16:.0f}")
    title("2. A linear layer, one example a rank: each finds its own gradient, all keep the mean")
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    layer(torch.tensor([[1.0, 2.0], [3.0, 6.0]])[rank]).sum().backward()
    own = layer.weight.grad.tolist()
    all_reduce_naive(layer)
    say(f"   rank {rank} has {own}, after the all-reduce {layer.weight.grad.tolist()}")
    title("3. Buckets of at most 300 bytes, filled from the last parameter on (tied weights once, frozen ones never)")
    ddp = DDP(_toy(), bucket_mb=300 / 2 ** 20)
    for i, bucket in enumerate(ddp._buckets):
        title(f"   bucket {i}: {sum(p.numel() * p.element_size() for p in bucket.parameters):3d} bytes: "
              f"{', '.join(bucket.names)}")
    title("4. Backward on rank 0: a gradient arrives, a full bucket leaves at once")
    launch, ready = ddp._launch, ddp._gradient_ready
    events: list[str] = []

    def logged_launch() -> None:
        events.append(f"      bucket {ddp._next} leaves")
        launch()

    def logged_ready(bucket: _Bucket, i: int) -> None:
        events.append(f"   {bucket.names[i]} arrives")
        ready(bucket, i)
    ddp._launch, ddp._gradient_ready = logged_launch, logged_ready
    ddp(torch.ones(1, 5) * (rank + 1)).sum().backward()
    events.append("   backward is over")
    ddp.finish_gradient_synchronization()
    title("\n".join(events))
    _check_worker(rank, world_size)

# -------------------------------------------------------------------------------------------------------------- Bench

def _median_seconds(f, device: torch.device, repeats: int) -> tuple[float, float]:  # twin: sharded_optim.py
    """Median over the repeats (after two to warm up) of the slowest rank's time, and the spread (max - min)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = torch.zeros(repeats + 2, dtype=torch.float64, device=device)
    for i in range(repeats + 2):
        dist.barrier(), wait()
        start = time.perf_counter()
        f(), wait()
        times[i] = time.perf_counter() - start
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return times[2:].median().item(), (times[2:].max() - times[2:].min()).item()

def bench_collectives(device: torch.device, max_mb: int, link_gb_s: float | None) -> None:
    """All-reduce, all-gather, reduce-scatter, broadcast from 1 MB up by factors of 4. S is the whole message: what each
    rank ends with (all-reduce, all-gather, broadcast) or starts with (reduce-scatter). Bus bandwidth is the bytes a
    ring has to send per rank, over the time; the bound is those bytes over W, the link's speed, or if that is not
    given the best bus bandwidth of this table."""
    N, rank = dist.get_world_size(), dist.get_rank()
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor           # renamed in torch 2.13
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    rows, megabytes = [], 1
    while megabytes <= max_mb:
        count = megabytes * 1_000_000 // 4 // N * N
        whole, part = torch.ones(count, device=device), torch.ones(count // N, device=device)
        share = (N - 1) / N
        for name, factor, f in [("all-reduce", 2 * share, lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX)),
                                ("all-gather", share, lambda: gather(whole, part)),
                                ("reduce-scatter", share, lambda: scatter(part, whole, op=dist.ReduceOp.MAX)),
                                ("broadcast", 1 if N > 1 else 0, lambda: dist.broadcast(whole, src=0))]:
            seconds, spread = _median_seconds(f, device, repeats=10 if megabytes <= 256 else 5)
            rows.append((name, count * 4, seconds, spread, factor))
        megabytes = megabytes * 4 if megabytes < 256 else 1000 if megabytes < 1000 else max_mb + 1
    W = link_gb_s * 1e9 if link_gb_s else max(S * factor / seconds for _, S, seconds, _, factor in rows)
    if rank == 0:
        print(f"collectives | {dist.get_backend()} | N = {N} | float32 | W = {W / 1e9:.1f} GB/s "
              f"({'given' if link_gb_s else 'best bus bandwidth below'})")
        print(f"{'':15s} {'S [MB]':>8s} {'ms':>9s} {'spread':>8s} {'bus GB/s':>9s} {'bound ms':>9s} {'of bound':>9s}")
        for name, S, seconds, spread, factor in sorted(rows, key=lambda r: r[0]):
            bound = factor * S / W if W else 0.0
            print(f"{name:15s} {S / 1e6:8.0f} {seconds * 1e3:9.3f} {spread * 1e3:8.3f} "
                  f"{factor * S / seconds / 1e9:9.2f} {bound * 1e3:9.3f} {bound / seconds:9.0%}")

def _transformer(width: int, layers: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with torch.device(device):
        heads = 1 if width % 128 else width // 128
        blocks = [nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, nn.functional.gelu, batch_first=True,
                                             norm_first=True, bias=False) for _ in range(layers)]
        ends = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
        return nn.Sequential(ends[0], *blocks, ends[1]).to(dtype)

def bench_ddp(device: torch.device, width: int, layers: int, batch: int, length: int, repeats: int) -> None:
    """One training step (fused AdamW on a GPU) with each version and torch's own DDP, on the same weights' shapes.

    "no comm" is the same step with nothing sent: what one rank alone takes. Exposed = step - no comm, weak scaling =
    no comm / step. Comm is the same messages with nothing else running; hidden is what of it the step does not show.
    """
    rank, N, vocab_size = dist.get_rank(), dist.get_world_size(), 10_000
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ids = torch.randint(vocab_size, (batch, length), device=device)

    def measure(wrap, finish, context=contextlib.nullcontext):
        model = _transformer(width, layers, vocab_size, dtype, device)
        model = wrap(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

        def step():
            optimizer.zero_grad(set_to_none=True)
            with context(model):
                logits = model(ids)                                            # (batch, length, V)
                nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
            finish(model)
            optimizer.step()
        seconds, spread = _median_seconds(step, device, repeats)
        buckets = [b.buffer for b in model._buckets] if isinstance(model, DDP) else []
        alone = 0.0
        if buckets:
            def only_comm():
                for work in [dist.all_reduce(b, op=model._op, async_op=True) for b in buckets]:
                    work.wait()
            alone, _ = _median_seconds(only_comm, device, repeats)
        parameters = sum(p.numel() for p in model.parameters())
        del model, optimizer, step, buckets
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return seconds, spread, alone, parameters

    @contextlib.contextmanager
    def silent(model):
        with model.no_sync():
            yield
    ours = lambda model: model.finish_gradient_synchronization()
    nothing = lambda model: None
    base, spread, _, parameters = measure(lambda m: DDP(m), nothing, silent)
    torch_ddp = lambda m: nn.parallel.DistributedDataParallel(
        m, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    plain = lambda m: (broadcast_from_rank0(m), m)[1]
    if rank == 0:
        print(f"DDP step | {dist.get_backend()} | N = {N} | {parameters / 1e6:.0f} M parameters, width {width}, "
              f"{layers} layers, {str(dtype)[6:]}, {batch} x {length} tokens a rank")
        print(f"{'':22s} {'ms':>9s} {'spread':>8s} {'exposed':>9s} {'comm':>9s} {'hidden':>7s} {'weak scaling':>13s}")
        print(f"{'no comm':22s} {base * 1e3:9.1f} {spread * 1e3:8.1f}", flush=True)
    for name, wrap, finish in [
            ("naive", plain, all_reduce_naive), ("flat", plain, all_reduce_flat), ("overlapped", OverlappedDDP, ours),
            *[(f"bucketed, {mb} MiB", lambda m, mb=mb: DDP(m, mb), ours) for mb in (1, 10, 25, 100, 1000)],
            ("torch DDP", torch_ddp, nothing), ("bucketed, 25 MiB again", lambda m: DDP(m), ours)]:
        seconds, spread, alone, _ = measure(wrap, finish)
        if rank == 0:
            comm = f"{alone * 1e3:9.1f} {max(0.0, 1 - max(0.0, seconds - base) / alone):7.0%}" if alone else " " * 17
            print(f"{name:22s} {seconds * 1e3:9.1f} {spread * 1e3:8.1f} {(seconds - base) * 1e3:9.1f} {comm} "
                  f"{base / seconds:13.3f}", flush=True)

def bench(rank: int, world_size: int, args: argparse.Namespace, device: torch.device = torch.device("cpu")) -> None:
    """Both tables. Without torchrun: two gloo ranks on this CPU, with small sizes."""
    large = device.type == "cuda"
    if args.only != "ddp":
        bench_collectives(device, args.max_mb or (1000 if large else 64), args.link_gb_s)
    if args.only != "collectives":
        bench_ddp(device, args.width or (2560 if large else 128), args.layers or (32 if large else 4),
                  args.batch or (8 if large else 2), args.length or (1024 if large else 64), args.repeats)

def main() -> int:
    """Explains and checks, or times. Under torchrun: one rank a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", action="store_true", help="time the collectives and all versions beside torch's")
    parser.add_argument("--only", choices=["collectives", "ddp"], help="one table of the bench")
    parser.add_argument("--backend", choices=["nccl", "gloo"], help="under torchrun; default nccl where there is a GPU")
    parser.add_argument("--max-mb", type=int, help="largest message (default 1000 on GPUs, 64 on CPUs)")
    parser.add_argument("--link-gb-s", type=float, help="what a rank can send, GB/s (H100/H200 NVLink: 450)")
    parser.add_argument("--repeats", type=int, default=10, help="of a step, after two to warm up")
    for name in ("width", "layers", "batch", "length"):
        parser.add_argument(f"--{name}", type=int, help="of the model that --bench trains; batch, length: per rank")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and name != "bench" and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if "RANK" in os.environ:                                                   # torchrun started this process
        if not args.bench:
            parser.error("under torchrun use --bench; the walk-through starts its own two ranks")
        try:
            rank, world_size, device = init_distributed(args.backend)
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        run_rank(bench, rank, world_size, args, device)
    elif args.bench:
        spawn(bench, 2, args)
    else:
        spawn(_walk_worker, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
