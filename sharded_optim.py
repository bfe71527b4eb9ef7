"""sharded_optim.py - ZeRO: data parallelism in which no rank keeps what another rank could keep for it.

What:       per parameter, fp32 training with Adam holds 4 bytes of weight, 4 of gradient, 8 of moments. On N ranks:
              plain data parallelism     4   + 4   + 8     every rank keeps everything
              ShardedOptimizer, stage 1  4   + 4   + 8/N   each rank updates its own parameters and broadcasts them
              FSDP, stage 3              4/N + 4/N + 8/N   weights and gradients are whole two layers at a time
            The walk-through prints these sums beside what a run really holds.
Source:     Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054, sections 3 and 5; Zhao et al. 2023, "PyTorch FSDP",
            arXiv:2304.11277, sections 3.2 and 3.3 (communication order, prefetch, freeing).
Deviations: 1. Stage 1 gives whole parameters to ranks, balanced greedily by size, instead of cutting one flat vector:
               so it fits any optimizer class that updates one parameter at a time.
            2. FSDP cuts each parameter by itself, not a layer's flattened together: the gather writes each weight where
               it is used, the reduce-scatter reads each gradient where it was made, with no copy between.
            3. One-dimensional parameters (norms, biases) stay whole on every rank: a thousandth of the bytes.
Copy:       this file alone; needs torch. MIT.
Run:        python sharded_optim.py                                         two ranks on this CPU, explained; the end:
              check: FSDP = plain data parallelism after 3 steps, to 0.0e+00  OK
            python sharded_optim.py --bench                                 two ranks on this CPU, timed
            torchrun --nproc-per-node 2 sharded_optim.py --bench            one rank a GPU, beside torch's own; on two
              H200s, 2568 M parameters: ZeRO-1 93.3 ms a step, torch's 96.3; FSDP 103.6 ms, torch's fully_shard 151.1
"""
import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
import traceback
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Dims: N ranks, P parameters (elements), s elements of one rank's shard = ceil(numel / N)
# all-gather: each rank gets all ranks' shards in a row. reduce-scatter: rank r gets shard r of the sum over the ranks.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor      # renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

def run_rank(work, *args) -> None:  # twin: ddp.py
    """Calls work(*args) and ends this process with the code that it returns (None: 0, error: 1), not through the
    interpreter, which gloo's threads may abort. A rank that failed waits: the launcher has to name its dead peer."""
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

def spawn(worker, world_size: int, *args) -> None:  # twin: ddp.py
    """Runs worker(rank, world_size, *args) in gloo processes of this machine. The exception names a rank that died."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (worker, world_size, os.path.join(folder, "meet"), args), world_size)

def _enter(rank: int, worker, world_size: int, path: str, args: tuple) -> None:  # twin: ddp.py
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")   # all ranks are here
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    run_rank(worker, rank, world_size, *args)

def _broadcast(t: Tensor, source: int, async_op: bool = False) -> dist.Work | None:
    """Any dtype and stride: collectives want contiguous tensors and know few dtypes, so what they get are bytes."""
    data = t.detach()
    raw = data.reshape(-1).view(torch.uint8)                                   # a copy, if data is not contiguous
    work = dist.broadcast(raw, src=source, async_op=async_op and data.is_contiguous()) if data.numel() else None
    if not data.is_contiguous():
        data.copy_(raw.view(data.dtype).view(data.shape))
    return work

def _average(parameters: list[nn.Parameter]) -> None:
    """Averages the gradients over the ranks, one message a dtype; one that is not there counts as zero."""
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        same = [p for p in parameters if p.dtype == dtype]
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for p, mean in zip(same, flat.split([p.numel() for p in same])):
            p.grad = mean.view(p.shape)

# -------------------------------------------------------------------------- Stage 1: the optimizer's state is divided

class ShardedOptimizer(torch.optim.Optimizer):
    """Any optimizer, with each parameter's state and update on one rank only.

    Args: params and kwargs as for optimizer_cls. Gradients are averaged before step() (by DDP, say).
    A step runs optimizer_cls on what this rank owns and broadcasts the results, in rounds: one round's broadcast runs
    beside the next one's update. Every rank ends with the same parameters, those of the plain optimizer.
    `param_groups` is the whole: a learning rate set there counts from the next step on. `state` is what this rank owns.
    Raises: ValueError if torch.distributed is not running.
    Example: ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    """
    ROUND_BYTES = 256 * 2 ** 20

    def __init__(self, params, optimizer_cls: type[torch.optim.Optimizer], **kwargs):
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not running; start with torchrun and call init_process_group first")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._optimizer_cls, self._kwargs = optimizer_cls, kwargs
        self._elements = [0] * self._world_size                                # owned so far, by rank
        self.owner: dict[Tensor, int] = {}                                     # the same on every rank
        self._rounds: list[tuple[int, list[Tensor], torch.optim.Optimizer]] = []    # group, parameters, inner
        super().__init__(params, kwargs)                                       # calls add_param_group

    state = property(lambda self: {p: s for _, _, inner in self._rounds for p, s in inner.state.items()},
                     lambda self, value: None)                                 # torch's constructor sets an empty one

    def add_param_group(self, param_group: dict) -> None:
        """Shares the group out: largest first, each to the rank that owns least. All ranks come to the same result."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted(group["params"], key=lambda p: -p.numel()):            # stable: ties keep their order
            owner = self._elements.index(min(self._elements))
            self.owner[p] = owner
            self._elements[owner] += p.numel()
        rounds, filled = {0: []}, 0
        for p in group["params"]:
            rounds.setdefault(int(filled // (self.ROUND_BYTES * self._world_size)), []).append(p)
            filled += p.numel() * p.element_size()
        for parameters in rounds.values():
            mine = [p for p in parameters if self.owner[p] == self._rank]      # may be none: torch allows empty groups
            inner = self._optimizer_cls([{**_options(group), "params": mine}], **self._kwargs)
            for key, value in inner.param_groups[0].items():
                group.setdefault(key, value)                                   # the class's defaults: lr, betas, ...
            self._rounds.append((len(self.param_groups) - 1, parameters, inner))

    def step(self) -> None:
        """Updates what this rank owns, then sends it to all."""
        for g, _, inner in self._rounds:                                       # a schedule changes the outer group
            inner.param_groups[0].update(_options(self.param_groups[g]))
        in_flight = []
        for _, parameters, inner in self._rounds:
            inner.step()
            in_flight += [_broadcast(p, self.owner[p], async_op=True) for p in parameters if p.requires_grad]
        for work in filter(None, in_flight):
            work.wait()
        for g, _, inner in self._rounds:                                       # some optimizers count in the group
            self.param_groups[g].update(_options(inner.param_groups[0]))

    def state_dict(self, rank: int | None = None) -> dict:
        """The plain optimizer's state_dict(), gathered on the CPU: loads on any number of ranks, or without sharding.
        All ranks must call it. Args: rank: only this one keeps the tensors, the others an empty "state"; None: all."""
        mine, whole = _map_state(self, super().state_dict(), lambda p, value: value.cpu()), {}
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            entry = [mine["state"].get(i)]                                     # one at a time: needs little memory
            dist.broadcast_object_list(entry, self.owner[p])
            if entry[0] is not None and rank in (None, self._rank):
                whole[i] = entry[0]
        return {**mine, "state": whole}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what state_dict() gave, on any number of ranks, or a plain optimizer's: all ranks load the same whole.
        Raises: ValueError if it was made for other groups of parameters."""
        state = _map_state(self, state_dict)["state"]
        for g, _, inner in self._rounds:
            group, mine = state_dict["param_groups"][g], inner.param_groups[0]["params"]
            number = dict(zip(self.param_groups[g]["params"], group["params"]))
            inner.load_state_dict({"state": {j: state[number[p]] for j, p in enumerate(mine) if number[p] in state},
                                   "param_groups": [{**group, "params": list(range(len(mine)))}]})
            self.param_groups[g].update(_options(group))

def _options(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}

def _map_state(optimizer: torch.optim.Optimizer, state_dict: dict, f=lambda p, value: value) -> dict:
    """A copy of an optimizer's state dict in which f(parameter, tensor) stands for each tensor of its "state".
    Raises: ValueError if its groups are not this optimizer's."""
    ours, theirs = [g["params"] for g in optimizer.param_groups], [g["params"] for g in state_dict["param_groups"]]
    if [len(g) for g in ours] != [len(g) for g in theirs]:
        raise ValueError(f"the checkpoint's groups hold {[len(g) for g in theirs]} parameters, this optimizer's "
                         f"{[len(g) for g in ours]}; build the optimizer with the same parameters, in the same order")
    parameter = {i: p for g, h in zip(ours, theirs) for p, i in zip(g, h)}
    return {**state_dict, "state": {
        i: {key: f(parameter[i], value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for i, entry in state_dict["state"].items()}}

# ---------------------------------------------------------------------------- Stage 3: the parameters are divided too

class _Call:
    """One forward of a unit. missing: what of its backward is still to come; begun: some of it has come."""

    def __init__(self, missing: set, begun: bool = False):
        self.missing, self.begun = missing, begun

class _Gathered(torch.autograd.Function):
    """Forward: the shard is an input, the whole weight the output. Backward: the whole gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx, p: nn.Parameter, unit: "_Unit", call: _Call) -> Tensor:
        ctx.of = unit, p, call
        return unit.whole(p)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        unit, p, call = ctx.of
        unit.fsdp._reduce(unit, p, call, gradient)
        return None, None, None                                                # .grad is set once the sum has arrived

class _Unit:
    """The weights that are gathered and freed together: a block, or a module that owns weights by itself."""

    def __init__(self, fsdp: "FSDP", name: str, module: nn.Module, members: list[nn.Module]):
        self.fsdp, self.name, self.module = fsdp, name, module
        self.places: list[tuple[nn.Module, str, nn.Parameter]] = []            # where a weight stands
        self.casts: list[tuple[nn.Module, str, nn.Parameter]] = []             # a bias takes its weight's dtype
        self.buffers: dict[nn.Parameter, Tensor] = {}                          # (N s) each; storage comes and goes
        for member in members:
            own = {k: p for k, p in member._parameters.items() if p is not None}
            for attribute, p in own.items():
                if p in fsdp._shapes:
                    self.places.append((member, attribute, p))
                    self.buffers[p] = torch.empty(fsdp._cut(p).numel() * fsdp.world_size,
                                                  dtype=fsdp.compute_dtype or p.dtype, device=p.device)
                    self.buffers[p].untyped_storage().resize_(0)
                elif fsdp.compute_dtype and p.is_floating_point() and (isinstance(member, (nn.LayerNorm, nn.GroupNorm))
                                                                       or any(q in fsdp._shapes for q in own.values())):
                    self.casts.append((member, attribute, p))
        self.bytes = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())
        self.works: list[dist.Work] = []                                       # gathers under way
        self.versions: list[int] | None = None                                 # of the parameters gathered; None: freed
        self.calls: set[_Call] = set()                                         # whose backward will come, or has begun
        self.call: _Call | None = None                                         # the latest

    @torch.no_grad()
    def gather(self) -> None:
        """Starts the all-gathers, unless they are done or under way. NCCL runs them on a stream of its own, which waits
        for what this stream was given before: so memory freed on this stream can be written without a race."""
        versions = [p._version for p in self.buffers]
        if self.versions not in (None, versions):
            self.free()                           # was gathered for a forward that did not come before optimizer.step()
        if self.versions is not None:
            return
        self.versions = versions
        for p, buffer in self.buffers.items():
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
            mine = buffer[self.fsdp.rank * p.numel():(self.fsdp.rank + 1) * p.numel()]
            mine.copy_(p)                                                      # the cast; the gather is in place
            self.works.append(_all_gather(buffer, mine, async_op=True))
        self.fsdp._record("gather", self, self.bytes)

    def wait(self) -> None:
        for work in self.works:
            work.wait()                                                        # on a GPU the stream waits, not the host
        self.works.clear()

    def free(self) -> None:
        """Gives the memory back, unless a backward has begun that still needs it."""
        if any(call.begun for call in self.calls):
            return
        self.hide()
        if self.versions is not None:
            self.wait()
            for buffer in self.buffers.values():
                buffer.untyped_storage().resize_(0)
            self.versions = None
            self.fsdp._record("free", self, -self.bytes)

    def whole(self, p: nn.Parameter) -> Tensor:
        """A tensor over the buffer with its own version counter: autograd keeps it while the storage comes and goes."""
        buffer = self.buffers[p]
        return buffer.new_empty(0).set_(buffer.untyped_storage(), 0, self.fsdp._shapes[p])

    def expose(self, call: _Call) -> None:
        """While the unit works, module.weight is the whole weight: an attribute that hides the Parameter behind it."""
        whole = {p: _Gathered.apply(p, self, call) if p.requires_grad else self.whole(p) for p in self.buffers}
        for member, attribute, p in self.places:
            member.__dict__[attribute] = whole[p]
        for member, attribute, p in self.casts:
            member.__dict__[attribute] = p.to(self.fsdp.compute_dtype)

    def hide(self) -> None:
        for member, attribute, _ in [*self.places, *self.casts]:
            member.__dict__.pop(attribute, None)

    def finished(self, call: _Call, what) -> None:
        """Notes that a piece of the call's backward is done; when it was the last, frees the weights."""
        call.missing.discard(what)
        if not call.missing:
            self.calls.discard(call)
            self.free()

class FSDP(nn.Module):
    """Fully sharded data parallelism: a rank keeps 1/N of every weight matrix, of its gradient and its optimizer state.

    Args: module, on this rank's device; its values become rank 0's. compute_dtype: in which weights are gathered and
    used (torch.bfloat16, say), and float inputs cast; None: the one that they have. reduce_dtype: in which gradients
    are summed; what arrives in .grad is float32 either way.
    Parameters of two or more dimensions become flat float32 shards, padded to one size on all ranks. The Parameter
    objects and names stay: build the optimizer afterwards, but sort parameters into groups by p.dim() before.
    A step:  loss_fn(fsdp(x), y).backward(); fsdp.finish_gradient_synchronization(); optimizer.step()

    What is gathered together is an entry of an nn.ModuleList or nn.Sequential, or else a module that owns a weight; the
    next one's gather runs beside this one's computation, forward and backward. Call them as modules, in one order on
    all ranks, evaluation too; gathered() gives a weight that is used outside its module.
    Compile with `block.forward = torch.compile(block.forward)`; checkpoint with use_reentrant=False.
    Raises: ValueError if torch.distributed is not running, or a parameter is on a device the backend cannot reach.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None,
                 reduce_dtype: torch.dtype = torch.float32):
        super().__init__()
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not running; start with torchrun and call init_process_group first")
        self.module, self.compute_dtype, self.reduce_dtype = module, compute_dtype, reduce_dtype
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        nccl = dist.get_backend() == "nccl"
        self._op = dist.ReduceOp.AVG if nccl else dist.ReduceOp.SUM            # gloo has no average
        self.gathered_bytes = self.peak_gathered_bytes = 0
        self.log = lambda event, unit: None                                    # called with ("gather" | ..., unit name)
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.device.type != ("cuda" if nccl else "cpu"):
                raise ValueError(f"{name} is on {t.device}, out of {dist.get_backend()}'s reach; move the module first")
            _broadcast(t, 0)
        self._shapes = {p: p.shape for p in module.parameters()                # of what is sharded, when whole
                        if p.dim() >= 2 and p.numel() and p.is_floating_point()}
        self._pending: list[tuple[_Call, nn.Parameter, Tensor, Tensor, dist.Work]] = []           # sums under way
        self._units = [_Unit(self, *found) for found in _find_units(module, set())]
        self._order: list[_Unit] = []                                          # as forward used them, in the first step
        self._order_known = False
        for p in self._shapes:
            p.data, p.grad = self._cut(p.detach()).float().clone(), None
        for unit in self._units:
            unit.module.register_forward_pre_hook(
                lambda m, args, kwargs, unit=unit: self._before_forward(unit, args, kwargs), with_kwargs=True)
            unit.module.register_forward_hook(lambda m, args, output, unit=unit: self._after_forward(unit, output))

    def _cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a whole tensor: flat, all of one size, the last ones padded with zeros."""
        size = -(-whole.numel() // self.world_size)
        piece = whole.reshape(-1)[self.rank * size:(self.rank + 1) * size]
        return torch.nn.functional.pad(piece, (0, size - piece.numel()))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        """As in DDP, for the same loop, but without effect: whole gradients are not kept, that is the point of it."""
        return contextlib.nullcontext()

    def _before_forward(self, unit: _Unit, args: tuple, kwargs: dict):
        self._use(unit, 1)
        unit.call = _Call({p for p in unit.buffers if p.requires_grad})
        if self.compute_dtype:
            cast = lambda x: x.to(self.compute_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            args, kwargs = tuple(cast(a) for a in args), {key: cast(a) for key, a in kwargs.items()}
        if len(unit.call.missing) < len(unit.buffers) and torch.is_grad_enabled():
            # A frozen weight tells nobody when it has been used: the gradient of the unit's input does.
            for j, x in enumerate(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor) and x.requires_grad):
                unit.call.missing.add(("input", j))
                x.register_hook(lambda _, call=unit.call, j=j: unit.finished(call, ("input", j)))
        unit.expose(unit.call)
        return args, kwargs

    def _after_forward(self, unit: _Unit, output) -> None:
        call, outputs = unit.call, [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if outputs and not _is_lookup(outputs):
            for t in outputs:
                t.register_hook(lambda _: self._before_backward(unit, call))
            if not _in_backward():
                unit.calls.add(call)
        if not _in_backward():
            unit.hide()
            if not (outputs and self._order_known and unit is self._order[-1]):   # the last one's backward is next
                unit.free()

    def _use(self, unit: _Unit, direction: int) -> None:
        """Has the unit's weights ready, and starts to gather those of the unit after (before) it in the first step."""
        if not self._order_known and unit not in self._order:
            self._order.append(unit)
        unit.gather()
        unit.wait()
        k = self._order.index(unit) + direction if unit in self._order else -1
        if 0 <= k < len(self._order) and not (_in_backward() and all(call.begun for call in self._order[k].calls)):
            self._order[k].gather()

    def _before_backward(self, unit: _Unit, call: _Call) -> None:
        if call.begun or not call.missing:                                     # one of several outputs was first
            return
        call.begun = True
        unit.calls.add(call)
        self._use(unit, -1)
        with torch.enable_grad():
            unit.expose(call)                                                  # for a checkpoint inside the unit

    @torch.no_grad()
    def _reduce(self, unit: _Unit, p: nn.Parameter, call: _Call, gradient: Tensor) -> None:
        whole = gradient.reshape(-1).to(self.reduce_dtype)                     # no copy where nothing has to change
        if padding := p.numel() * self.world_size - whole.numel():
            whole = torch.nn.functional.pad(whole, (0, padding))
        mine = whole.new_empty(p.numel())
        work = _reduce_scatter(mine, whole, op=self._op, async_op=True)
        # Both tensors are held until the sum is there: the communication stream reads one and writes the other.
        self._pending.append((call, p, mine, whole, work))
        unit.finished(call, p)
        if not call.missing:
            self._record("reduce-scatter", unit, 0)
            self._settle(keep=call)                    # the unit before this one had all of this backward to be summed

    @torch.no_grad()
    def _settle(self, keep: _Call | None = None) -> None:
        """Waits for sums and hands them to the parameters' .grad; all of them, or all but those of one call."""
        arrived = [entry for entry in self._pending if entry[0] is not keep]
        for _, p, mine, _, work in arrived:
            work.wait()
            if self._op == dist.ReduceOp.SUM:
                mine /= self.world_size
            p.grad = mine.float() if p.grad is None else p.grad.add_(mine)
        self._pending = [entry for entry in self._pending if entry[0] is keep]

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Waits for the last sums, averages the gradients of whole parameters (unused: zero), frees what is left."""
        self._settle()
        self._order_known = bool(self._order)
        for unit in self._units:
            unit.calls.clear()
            unit.free()
        _average([p for p in self.module.parameters() if p.requires_grad and p not in self._shapes])

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that the norm of the whole model's is at most max_norm. Returns the norm before it.
        Call on all ranks, after finish_gradient_synchronization(). Does not wait for the device."""
        sharded = [p.grad for p in self._shapes if p.grad is not None]
        others = [p.grad for p in self.module.parameters() if p.grad is not None and p not in self._shapes]
        zero = next(self.module.parameters()).new_zeros((), dtype=torch.float32)
        size = 1 << (15 if zero.is_cpu else 62)            # a CPU's sum of millions of squares is up to 1e-3 too small
        pieces = ([piece for g in gradients for piece in g.reshape(-1).split(size)] for gradients in (sharded, others))
        total, rest = (torch.stack([zero, *torch._foreach_norm(x, 2, dtype=torch.float32)]).square().sum()
                       if x else zero for x in pieces)
        dist.all_reduce(total)
        norm = (total + rest).sqrt()
        torch._foreach_mul_(sharded + others, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def gathered(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter, for use outside its module (lm_head.weight in a chunked loss, say). Its gradient
        finds the way back; the memory goes free then, or with finish_gradient_synchronization()."""
        if parameter not in self._shapes:
            return parameter
        unit = [u for u in self._units if parameter in u.buffers][-1]
        self._use(unit, 1)
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return unit.whole(parameter)
        call = _Call({parameter}, begun=True)
        unit.calls.add(call)
        return _Gathered.apply(parameter, unit, call)

    def _whole(self, p: Tensor, value: Tensor, keep: bool) -> Tensor | None:
        """The parameter, or what an optimizer holds for it, in one piece on the CPU. A collective if it is sharded."""
        if p not in self._shapes or value.shape != p.shape:                    # replicated, or a step count
            return value.detach().cpu().clone()
        whole, shape = value.new_empty(value.numel() * self.world_size), self._shapes[p]
        _all_gather(whole, value.detach().contiguous())
        return whole[:shape.numel()].view(shape).cpu().clone() if keep else None

    def _mine(self, p: Tensor, value: Tensor) -> Tensor:
        """The way back: what this rank keeps of it."""
        return self._cut(value) if value.shape == self._shapes.get(p) else value

    def full_state_dict(self, rank: int | None = None) -> dict[str, Tensor]:
        """The module's state dict with whole tensors, on the CPU, under the module's own names. All ranks must call it.
        Args: rank: only this one keeps it, the others get {}; None: all do."""
        keep, own = rank in (None, self.rank), self.module.state_dict(keep_vars=True)
        whole = {t: self._whole(t, t, keep) for t in dict.fromkeys(own.values())}         # tied names share a tensor
        return {name: whole[t] for name, t in own.items()} if keep else {}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Takes a whole state dict, the same on all ranks, whatever number of ranks it was made with.
        Raises: ValueError, before anything is changed, if a name is missing or too many or a shape differs."""
        own = self.module.state_dict(keep_vars=True)
        there = {name: tuple(t.shape) for name, t in state_dict.items()}
        here = {name: tuple(self._shapes.get(t, t.shape)) for name, t in own.items()}
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise ValueError(f"the state dict is of another model: {name} is {there.get(name, 'absent')} there and "
                                 f"{here.get(name, 'absent')} here")
        for name, t in own.items():
            t.data.copy_(self._mine(t, state_dict[name]))
        for unit in self._units:
            unit.free()

    def full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, rank: int | None = None) -> dict:
        """What optimizer.state_dict() would be without sharding, on the CPU. All ranks must call it; rank: as above."""
        keep = rank in (None, self.rank)
        whole = _map_state(optimizer, optimizer.state_dict(), lambda p, value: self._whole(p, value, keep))
        return whole if keep else {**whole, "state": {}}

    def load_full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        """Loads what full_optimizer_state_dict() gave, or a plain optimizer's state_dict() of the same model.
        Raises: ValueError if it was made for other groups of parameters."""
        optimizer.load_state_dict(_map_state(optimizer, state_dict, self._mine))

    def _record(self, event: str, unit: _Unit, bytes_more: int) -> None:
        self.gathered_bytes += bytes_more
        self.peak_gathered_bytes = max(self.peak_gathered_bytes, self.gathered_bytes)
        self.log(event, unit.name)

def _find_units(m: nn.Module, seen: set[nn.Module], name: str = "", block: bool = False):
    """Yields (name, module that is called, modules whose weights it gathers), in registration order."""
    if m in seen:
        return
    lists = [child for child in m.children() if isinstance(child, (nn.ParameterList, nn.ParameterDict))]
    seen.update([m, *lists])
    # MultiheadAttention reads out_proj.weight without calling out_proj; nobody calls a list of parameters.
    entire = block or isinstance(m, nn.MultiheadAttention)
    members = list(m.modules()) if entire else [m, *lists]
    if any(p is not None and p.dim() >= 2 for member in members for p in member._parameters.values()):
        yield name, m, members
    for child_name, child in m.named_children() if not entire else ():
        entry = isinstance(m, nn.ModuleList) or isinstance(m, nn.Sequential) and not isinstance(child, nn.Sequential)
        yield from _find_units(child, seen, f"{name}.{child_name}".lstrip("."),
                               entry and not isinstance(child, (nn.ModuleList, nn.ModuleDict)))

def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1                             # in a forward: a checkpoint recomputes

def _is_lookup(outputs: list[Tensor]) -> bool:
    """An embedding's backward needs no weight, so gathering it again would be for nothing."""
    node = outputs[0].grad_fn
    return len(outputs) == 1 and node.name() in ("EmbeddingBackward0", "IndexBackward0") and \
        any(next_node is not None and "_Gathered" in next_node.name() for next_node, _ in node.next_functions)

# ------------------------------------------------------------------------------------------------------------- Checks

def bytes_held(parameters: int, world_size: int, stage: int, weight=4, gradient=4, state=8) -> float:
    """Bytes that a rank holds between steps. Source: arXiv:1910.02054, section 3.1 and figure 1.
    Example: bytes_held(8_130_000_000, 2, stage=3) / 1e9 -> 65.04"""
    return parameters * {0: weight + gradient + state, 1: weight + gradient + state / world_size,
                         3: (weight + gradient + state) / world_size}[stage]

def _model(width: int, layers: int, vocab_size: int) -> nn.Sequential:
    heads = 1 if width % 128 else width // 128
    blocks = {f"layer {i}": nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True,
                                                       norm_first=True, bias=False) for i in range(layers)}
    return nn.Sequential(OrderedDict(embedding=nn.Embedding(vocab_size, width), **blocks,
                                     head=nn.Linear(width, vocab_size, bias=False)))

def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(-1, 1).flatten()).backward()
    if isinstance(model, FSDP):
        model.finish_gradient_synchronization()
    elif type(model) is nn.Sequential:                                         # torch's own wrappers have done it
        _average([*model.parameters()])
    optimizer.step()

def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters, gradients and optimizer state that this rank keeps between steps."""
    state = getattr(optimizer, "optim", optimizer).state                       # torch's ZeRO has it one level deeper
    held = [getattr(t, "_local_tensor", t) for p in model.parameters()
            for t in (p, p.grad, *state.get(p, {}).values()) if t is not None and t.dim()]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}.values())

def _explain(rank: int, world_size: int) -> None:
    say = print if rank == 0 else lambda *_, **__: None
    batches = torch.randint(50, (3, world_size, 2, 9), generator=torch.Generator().manual_seed(0))

    def train(wrap=lambda m: m, make=torch.optim.AdamW):
        """Three steps. Returns the wrapped model, the optimizer, and the bytes that this rank holds then."""
        torch.manual_seed(0)
        model = wrap(_model(16, 2, 50))
        optimizer = make(model.parameters())
        for i, batch in enumerate(batches):
            model.log = (lambda event, unit: say(f"   {event:15s}{unit}")) if i == 1 else lambda *_: None
            _step(model, optimizer, batch[rank])
        return model, optimizer, _held(model, optimizer)
    plain, _, plain_bytes = train()
    say("1. Stage 1: who keeps whose moments, balanced by size")
    zero, optimizer, zero_bytes = train(make=lambda ps: ShardedOptimizer(ps, torch.optim.AdamW))
    for r in range(world_size):
        owned = [name for name, p in zero.named_parameters() if optimizer.owner[p] == r and p.dim() > 1]
        say(f"   rank {r}, {optimizer._elements[r]:,} elements: norms, {', '.join(owned)}")
    say("2. Stage 3: a step on rank 0. The next unit is gathered before this one computes; the head, last in forward\n"
        "   and first in backward, is kept; an embedding's backward needs no weight")
    fsdp, _, fsdp_bytes = train(FSDP)
    P, units = sum(p.numel() for p in plain.parameters()), fsdp._order
    say("3. Bytes held between steps by rank 0 (AdamW, fp32)     predicted  measured")
    for name, predicted, measured in [("plain data parallelism", bytes_held(P, world_size, 0), plain_bytes),
                                      ("ZeRO-1", bytes_held(P, world_size, 1), zero_bytes),
                                      ("FSDP", bytes_held(P, world_size, 3), fsdp_bytes),
                                      ("FSDP, at most beside it: two units' weights",
                                       max(a.bytes + b.bytes for a, b in zip(units, units[1:])),
                                       fsdp.peak_gathered_bytes)]:
        say(f"   {name:50s} {predicted:11,.0f} {measured:9,d}")
    for name, state, bound in [("ZeRO-1", zero.state_dict(), 0.0), ("FSDP", fsdp.full_state_dict(), 1e-6)]:
        worst = max((state[key] - value).abs().max().item() for key, value in plain.state_dict().items())
        if worst > bound:
            raise AssertionError(f"{name} differs from plain data parallelism by {worst:.1e}, more than {bound:.0e}")
        say(f"check: {name} = plain data parallelism after 3 steps, to {worst:.1e}  OK")

def self_check() -> None:
    """Two gloo ranks: ZeRO-1 is plain data parallelism bit for bit, FSDP to 1e-6 (if nobody divided by N: 1e-3)."""
    spawn(_explain, 2)

# -------------------------------------------------------------------------------------------------------------- Bench

def _median_seconds(f, device: torch.device, repeats: int) -> tuple[float, float]:  # twin: ddp.py
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

def bench(rank: int, world_size: int, args: argparse.Namespace) -> None:
    """One step with each kind of sharding and with torch's own: time, and memory beside the sum. On a GPU stages 0 and
    1 hold bf16 weights, gradients and moments (2 + 2 + 4 bytes), stage 3 fp32 ones and computes in bf16; on a CPU all
    is fp32. Memory is what model and optimizer hold, and on a GPU how far a step of few tokens rises above that."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    cuda = dist.get_backend() == "nccl"
    device, low = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else None
    options, policy = dict(lr=1e-4, fused=cuda), MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low)

    def fully_sharded(model: nn.Module) -> nn.Module:
        for m in [*model, model]:
            fully_shard(m, mp_policy=policy)
        return model

    def rest() -> int:                   # NCCL's watchdog holds what was sent until it looks, every tenth of a second
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
            time.sleep(0.3)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if cuda else 0
    replicated = lambda m: nn.parallel.DistributedDataParallel(m.to(low or torch.float32), gradient_as_bucket_view=True)
    adamw = lambda ps: torch.optim.AdamW(ps, **options)
    sharded = lambda cls: lambda ps: cls(ps, torch.optim.AdamW, **options)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in m.parameters()) for m in _model(args.width, args.layers, args.vocab)]
    say = print if rank == 0 else lambda *_, **__: None
    say(f"{dist.get_backend()} | N = {world_size} | {sum(sizes) / 1e6:.0f} M parameters, width {args.width}, "
        f"{args.layers} layers, {args.batch} x {args.length} tokens a rank\n"
        f"{'':26s} {'step ms':>9s} {'spread':>8s} {'peak GB':>9s} {'predicted':>9s}")
    for name, stage, wrap, make in [("torch DDP, AdamW", 0, replicated, adamw),
                                    ("  ZeroRedundancyOptimizer", 1, replicated, sharded(ZeroRedundancyOptimizer)),
                                    ("  ShardedOptimizer", 1, replicated, sharded(ShardedOptimizer)),
                                    ("torch fully_shard, AdamW", 3, fully_sharded, adamw),
                                    ("FSDP, AdamW", 3, lambda m: FSDP(m, low, low or torch.float32), adamw)]:
        with torch.device(device):
            model = _model(args.width, args.layers, args.vocab)
        model = wrap(model)
        optimizer = make(model.parameters())
        for _ in range(3):                           # the first makes the moments, torch DDP its buckets in the second
            measured, before = _held(model, optimizer), rest()
            _step(model, optimizer, torch.randint(args.vocab, (1, 64), device=device))
        measured += torch.cuda.max_memory_allocated() - before if cuda else 0  # how far the step rises above that
        # Stage 3 at the end of backward: two units gathered, and the gradients of two units whole.
        held = bytes_held(sum(sizes), world_size, stage, *((2, 2, 4) if cuda and stage < 3 else (4, 4, 8)))
        predicted = held + (sum(sizes[:2]) * 4 if stage == 3 and cuda else 0)
        ids = torch.randint(args.vocab, (args.batch, args.length), device=device)
        seconds, spread = _median_seconds(lambda: _step(model, optimizer, ids), device, args.repeats)
        say(f"{name:26s} {seconds * 1e3:9.1f} {spread * 1e3:8.1f} {measured / 1e9:9.3f} {predicted / 1e9:9.3f}")
        del model, optimizer
        rest()

def main() -> int:
    """Explains and checks, or times. Under torchrun: one rank a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", action="store_true", help="time and measure each stage beside torch's own")
    ranked, cuda = "RANK" in os.environ, torch.cuda.is_available()             # ranked: by torchrun
    for name, *sizes in [("width", 128, 2560), ("layers", 4, 32), ("batch", 2, 4), ("length", 64, 512),
                         ("vocab", 10_000, 10_000), ("repeats", 10, 10)]:
        parser.add_argument(f"--{name}", type=int, default=sizes[ranked and cuda], help="of --bench (of a rank)")
    args = parser.parse_args()
    if wrong := [f"--{name} {value}" for name, value in vars(args).items() if name != "bench" and value < 1]:
        parser.error(f"must be at least 1: {', '.join(wrong)}")
    if not args.bench:
        self_check()
    elif not ranked:
        spawn(bench, 2, args)
    else:
        if cuda:
            if (local := int(os.environ["LOCAL_RANK"])) >= (gpus := torch.cuda.device_count()):
                parser.exit(2, f"{parser.prog}: local rank {local} has no GPU ({gpus} here); lower --nproc-per-node\n")
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if cuda else "gloo")
        run_rank(bench, dist.get_rank(), dist.get_world_size(), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
