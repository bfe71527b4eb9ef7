"""sharded_optim.py - ZeRO: data parallelism in which no rank keeps a second copy of what another rank could keep.

What:       per parameter, training in fp32 with Adam holds 4 bytes of weight, 4 of gradient and 8 of moments. Over N ranks:
              plain data parallelism     4   + 4   + 8          every rank keeps everything
              ShardedOptimizer, stage 1  4   + 4   + 8/N        each rank updates its own parameters and broadcasts them
              FSDP, stage 3              4/N + 4/N + 8/N        weights are gathered a layer at a time, just when needed;
                                                                beside that: two layers' weights and gradients, whole
            `python sharded_optim.py` prints these sums beside what a run really holds.
Source:     Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054, sections 3 and 5; Zhao et al. 2023, "PyTorch FSDP",
            arXiv:2304.11277, sections 3.2 and 3.3 (communication order, prefetch, freeing).
Deviations: 1. Stage 1 gives whole parameters to ranks, by a greedy balance of their sizes, instead of cutting a flat vector:
               so any optimizer works whose update looks at one parameter at a time (Muon too).
            2. FSDP cuts every parameter by itself, not a layer's flattened together: then the gather writes each weight where
               it is used and the reduce-scatter reads each gradient where it was made, with no copy in between.
            3. One-dimensional parameters (norms, biases) stay whole on every rank: they are a thousandth of the bytes.
Copy:       this file alone; needs torch. MIT.
Run:        python sharded_optim.py                                           two ranks on this CPU, explained
            python sharded_optim.py --bench                                   two ranks on this CPU, timed
            torchrun --nproc-per-node 4 sharded_optim.py --bench              one rank a GPU, beside torch's own
"""
import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

# Dims: N ranks, P parameters (elements), s elements of one rank's shard = ceil(numel / N)


def spawn(worker, world_size: int, *args) -> None:  # twin: ddp.py
    """Runs worker(rank, world_size, *args) in `world_size` gloo processes of this machine. They meet through a file,
    so that no port is taken. If one dies, the others are stopped and the exception names its rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (worker, world_size, os.path.join(folder, "meet"), args), world_size)


def _enter(rank: int, worker, world_size: int, path: str, args: tuple) -> None:  # twin: ddp.py
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")   # all ranks are here
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    try:
        worker(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


def _broadcast(t: Tensor, source: int, async_op: bool = False) -> dist.Work | None:
    """Any dtype and stride: collectives want contiguous tensors and know few dtypes, so what they get are bytes."""
    data = t.detach()
    if data.is_contiguous():
        return dist.broadcast(data.view(-1).view(torch.uint8), src=source, async_op=async_op)
    raw = data.reshape(-1).view(torch.uint8)                                   # a copy
    dist.broadcast(raw, src=source)
    data.copy_(raw.view(data.dtype).view(data.shape))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the optimizer's state is divided

class ShardedOptimizer(torch.optim.Optimizer):
    """Any optimizer, with each parameter's state and update on one rank only.

    Args: params and kwargs as for optimizer_cls. Gradients have to be averaged already (by DDP, say): the same everywhere.
    A step:  every rank runs optimizer_cls on the parameters it owns and sends them to the others. The parameters are worked
    through in rounds, so that one round's broadcast runs beside the next round's update.

    `param_groups` is the whole, as in any optimizer: a learning rate set there reaches the inner optimizers with the next
    step. `state` holds what this rank owns. `state_dict()` has to be called on all ranks: it gathers what the plain optimizer
    would have, so a checkpoint loads with any number of ranks, or without sharding.
    Raises: ValueError if torch.distributed is not running.
    Example: ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    """
    ROUND_BYTES = 256 * 2 ** 20

    def __init__(self, params: Iterable, optimizer_cls: type[torch.optim.Optimizer], **kwargs):
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not running; start with torchrun and call init_process_group first")
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._optimizer_cls, self._kwargs = optimizer_cls, kwargs
        self._elements = [0] * self._world_size                                # owned so far, by rank
        self.owner: dict[Tensor, int] = {}                                     # the same on every rank
        self._rounds: list[tuple[int, list[Tensor], torch.optim.Optimizer]] = []   # group, its parameters, inner
        super().__init__(params, kwargs)                                       # calls add_param_group

    @property
    def state(self) -> dict:
        return {p: s for _, _, inner in self._rounds for p, s in inner.state.items()}

    @state.setter
    def state(self, value) -> None:                                            # torch's constructor sets an empty one
        pass

    def add_param_group(self, param_group: dict) -> None:
        """Shares the group out: largest first, each to the rank that owns least. Same input, same owners on all ranks."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted(group["params"], key=lambda p: -p.numel()):            # sorted() is stable: ties keep their order
            owner = min(range(self._world_size), key=lambda r: self._elements[r])
            self.owner[p] = owner
            self._elements[owner] += p.numel()
        options = {k: v for k, v in group.items() if k != "params"}
        for parameters in _split(group["params"], self.ROUND_BYTES * self._world_size):
            mine = [p for p in parameters if self.owner[p] == self._rank]      # may be empty: torch allows such groups
            inner = self._optimizer_cls([{**options, "params": mine}], **self._kwargs)
            for key, value in inner.param_groups[0].items():
                group.setdefault(key, value)                                   # the class's own defaults: lr, betas, ...
            self._rounds.append((len(self.param_groups) - 1, parameters, inner))

    def step(self, closure=None):
        """Updates what this rank owns, then everyone has everything. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, _, inner in self._rounds:                                   # a schedule changed the outer group
            inner.param_groups[0].update({k: v for k, v in self.param_groups[group].items() if k != "params"})
        in_flight = []
        for _, parameters, inner in self._rounds:
            inner.step()
            for p in parameters:
                if p.requires_grad:
                    in_flight.append(_broadcast(p, self.owner[p], async_op=True))
        for work in in_flight:
            if work is not None:
                work.wait()
        for group, _, inner in self._rounds:                                   # some optimizers count steps in the group
            self.param_groups[group].update({k: v for k, v in inner.param_groups[0].items() if k != "params"})
        return loss

    def state_dict(self, rank: int | None = None) -> dict:
        """The whole state, on the CPU, in the form of the plain optimizer's state_dict(). All ranks must call it.
        Args: rank: only this one keeps the tensors (the others get an empty "state"); None: all do."""
        everyone = [p for group in self.param_groups for p in group["params"]]
        state = self.state
        small, large = {}, {}                                                  # small: travels pickled
        for i, p in enumerate(everyone):
            if p in state:
                large[i] = {k: (v.shape, v.dtype) for k, v in state[p].items()
                            if isinstance(v, Tensor) and v.device == p.device and v.numel() > 1}
                small[i] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state[p].items() if k not in large[i]}
        gathered: list = [None] * self._world_size
        dist.all_gather_object(gathered, (small, large))
        whole: dict[int, dict] = {}
        for i, p in enumerate(everyone):
            small, large = gathered[self.owner[p]]
            if i not in small:
                continue
            entry = dict(small[i])
            for key, (shape, dtype) in large[i].items():
                value = state[p][key].contiguous() if p in state else torch.empty(shape, dtype=dtype, device=p.device)
                _broadcast(value, self.owner[p])
                entry[key] = value.cpu().clone() if rank in (None, self._rank) else None
            if rank in (None, self._rank):
                whole[i] = entry
        index = {p: i for i, p in enumerate(everyone)}
        groups = [{**{k: v for k, v in group.items() if k != "params"}, "params": [index[p] for p in group["params"]]}
                  for group in self.param_groups]
        return {"state": whole, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes what state_dict() gave, here or on another number of ranks, or a plain optimizer's. Every rank loads its own
        part of the same whole. Raises: ValueError if it was made for other groups of parameters."""
        saved = state_dict["param_groups"]
        have, want = [len(g["params"]) for g in saved], [len(g["params"]) for g in self.param_groups]
        if have != want:
            raise ValueError(f"the checkpoint's groups hold {have} parameters, this optimizer's {want}; "
                             "build the optimizer with the same parameters, in the same order")
        saved_index = {p: i for group, theirs in zip(self.param_groups, saved)
                       for p, i in zip(group["params"], theirs["params"])}
        for g, _, inner in self._rounds:
            mine = inner.param_groups[0]["params"]
            options = {k: v for k, v in saved[g].items() if k != "params"}
            part = {j: dict(state_dict["state"][saved_index[p]]) for j, p in enumerate(mine)
                    if saved_index[p] in state_dict["state"]}
            inner.load_state_dict({"state": part, "param_groups": [{**options, "params": list(range(len(mine)))}]})
            self.param_groups[g].update(options)


def _split(parameters: list[Tensor], round_bytes: float) -> list[list[Tensor]]:
    rounds, filled = [[]], 0
    for p in parameters:
        if rounds[-1] and filled > round_bytes:
            rounds.append([])
            filled = 0
        rounds[-1].append(p)
        filled += p.numel() * p.element_size()
    return rounds


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: the parameters are divided too

class _Shard:
    """What is needed to put one parameter together again."""

    def __init__(self, p: nn.Parameter, world_size: int):
        self.parameter, self.shape, self.numel, self.stored_dtype = p, p.shape, p.numel(), p.dtype
        self.size = -(-p.numel() // world_size)                                # elements a rank: the last ones are padding

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """This rank's piece of a whole tensor of the parameter's shape, flat, padded with zeros."""
        piece = whole.reshape(-1)[rank * self.size:(rank + 1) * self.size]
        return torch.nn.functional.pad(piece, (0, self.size - piece.numel()))


class _Call:
    """One forward of a unit: what of its backward is still to come."""

    def __init__(self, missing: set):
        self.missing = missing


class _Gathered(torch.autograd.Function):
    """Forward: the shard is an input, the whole weight the output. Backward: the whole gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx, shard: Tensor, unit: "_Unit", i: int, call: _Call) -> Tensor:
        ctx.unit, ctx.i, ctx.call = unit, i, call
        return unit.whole(i)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.unit.fsdp._reduce(ctx.unit, ctx.i, ctx.call, gradient)
        return None, None, None, None                                          # .grad is set once the sum has arrived


class _Unit:
    """The weights that are gathered and freed together: a block, or a module that owns weights by itself."""

    def __init__(self, fsdp: "FSDP", name: str, module: nn.Module, members: list[nn.Module]):
        self.fsdp, self.name, self.module = fsdp, name, module
        self.shards: list[_Shard] = []
        self.places: list[tuple[nn.Module, str, int]] = []                     # module.name is shards[i]
        self.casts: list[tuple[nn.Module, str, nn.Parameter]] = []             # a bias has to have its weight's dtype
        for member in members:
            own = {k: p for k, p in member._parameters.items() if p is not None}
            for attribute, p in own.items():
                if p in fsdp._shards:
                    shard = fsdp._shards[p]
                    if shard not in self.shards:
                        self.shards.append(shard)
                    self.places.append((member, attribute, self.shards.index(shard)))
                elif fsdp.compute_dtype and p.is_floating_point() and (
                        any(q in fsdp._shards for q in own.values()) or isinstance(member, (nn.LayerNorm, nn.GroupNorm))):
                    self.casts.append((member, attribute, p))
        self.buffers: list[Tensor] = []                                        # (N s), whose storage comes and goes
        self.works: list[dist.Work] = []                                       # gathers under way
        self.versions: list[int] | None = None                                 # of the parameters gathered; None: freed
        self.active: set[_Call] = set()                                        # backward has begun and is not over
        self.expected = 0                                                      # backwards that will come
        self.call: _Call | None = None

    def allocate(self) -> None:
        for shard in self.shards:
            dtype = self.fsdp.compute_dtype or shard.stored_dtype
            buffer = torch.empty(shard.size * self.fsdp.world_size, dtype=dtype, device=shard.parameter.device)
            buffer.untyped_storage().resize_(0)
            self.buffers.append(buffer)

    @torch.no_grad()
    def gather(self) -> None:
        """Starts the all-gathers, unless they are done or under way. NCCL runs them on a stream of its own, which waits for
        what this stream was given before: so memory freed earlier on this stream can be written without a race."""
        if self.versions is not None:
            return
        self.versions = [shard.parameter._version for shard in self.shards]
        for shard, buffer in zip(self.shards, self.buffers):
            buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())
            mine = buffer[self.fsdp.rank * shard.size:(self.fsdp.rank + 1) * shard.size]
            mine.copy_(shard.parameter)                                        # the cast; the gather is in place
            if self.fsdp.world_size > 1 and shard.size:
                self.works.append(_all_gather(buffer, mine))
        self.fsdp._count_bytes(sum(b.numel() * b.element_size() for b in self.buffers))
        self.fsdp._note("gather", self)

    def wait(self) -> None:
        for work in self.works:
            work.wait()                                                        # on a GPU the stream waits, not the host
        self.works.clear()

    def free(self) -> None:
        self.hide()
        if self.versions is not None:
            self.wait()
            for buffer in self.buffers:
                buffer.untyped_storage().resize_(0)
            self.versions = None
            self.fsdp._count_bytes(-sum(b.numel() * b.element_size() for b in self.buffers))
            self.fsdp._note("free", self)

    def stale(self) -> bool:
        """Gathered ahead for a forward that did not come, and the optimizer has stepped since."""
        return self.versions is not None and not self.active and \
            self.versions != [shard.parameter._version for shard in self.shards]

    def whole(self, i: int) -> Tensor:
        """A tensor over the buffer with a version counter of its own: autograd keeps it while the storage comes and goes."""
        buffer, shape = self.buffers[i], self.shards[i].shape
        alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        return alias.set_(buffer.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())

    def expose(self, call: _Call) -> None:
        """While the unit works, module.weight is the whole weight: an attribute that hides the Parameter of that name."""
        whole = [_Gathered.apply(shard.parameter, self, i, call) if shard.parameter.requires_grad else self.whole(i)
                 for i, shard in enumerate(self.shards)]
        for member, attribute, i in self.places:
            member.__dict__[attribute] = whole[i]
        for member, attribute, p in self.casts:
            member.__dict__[attribute] = p.to(self.fsdp.compute_dtype)

    def hide(self) -> None:
        for member, attribute, _ in [*self.places, *self.casts]:
            member.__dict__.pop(attribute, None)

    def finished(self, call: _Call, what) -> bool:
        """Notes that a piece of the call's backward is done; when it was the last, frees the weights."""
        call.missing.discard(what)
        if call.missing:
            return False
        self.active.discard(call)
        if not self.active:
            self.free()
        return True


def _all_gather(whole: Tensor, mine: Tensor, async_op: bool = True) -> dist.Work | None:
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor    # renamed in torch 2.13
    return function(whole, mine, async_op=async_op)


class FSDP(nn.Module):
    """Fully sharded data parallelism: a rank keeps 1/N of every weight matrix, of its gradient and of its optimizer state.

    Args:
        module: the same on every rank, on this rank's device; its values become rank 0's.
        compute_dtype: the dtype in which weights are gathered and used (torch.bfloat16, say); None: the one they have.
        reduce_dtype: the dtype in which gradients are summed over the ranks; the sum ends in float32 either way.
    Parameters of two or more dimensions become flat float32 shards (padded to the same size on all ranks); the Parameter
    objects and names stay, so build the optimizer afterwards on fsdp.parameters(). Sort parameters into groups by p.dim()
    before wrapping. Other parameters stay whole and keep their dtype.

    A step:  loss_fn(fsdp(x), y).backward(); fsdp.finish_gradient_synchronization(); fsdp.clip_grad_norm_(1.0); optimizer.step()
    Each entry of an nn.ModuleList or nn.Sequential is gathered as one unit, and every other module that owns a weight is
    one; the next unit's gather runs beside this one's computation, in forward and in backward. Units have to be called as
    modules, in the same order on all ranks, in evaluation too; a weight used outside its module is had by gathered().
    Compile with `block.forward = torch.compile(block.forward)`. Checkpoint with use_reentrant=False.
    Raises: ValueError if torch.distributed is not running.
    Source: arXiv:2304.11277, sections 3.2 and 3.3.
    """

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype | None = None,
                 reduce_dtype: torch.dtype = torch.float32):
        super().__init__()
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not running; start with torchrun and call init_process_group first")
        self.module, self.compute_dtype, self.reduce_dtype = module, compute_dtype, reduce_dtype
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._nccl = dist.get_backend() == "nccl"
        self.gathered_bytes = self.peak_gathered_bytes = 0
        self.log = None                                                        # called with ("gather" | ..., unit name)
        for t in [*module.parameters(), *module.buffers()]:
            _broadcast(t, 0)
        self._shards = {p: _Shard(p, self.world_size) for p in module.parameters()
                        if p.dim() >= 2 and p.is_floating_point()}
        self._pending: list[tuple[_Call, _Shard, Tensor, dist.Work | None]] = []
        self._units = [_Unit(self, *found) for found in _find_units(module)]   # in registration order
        for shard in self._shards.values():
            shard.parameter.data = shard.cut(shard.parameter.detach(), self.rank).float().clone()
            shard.parameter.grad = None
        for k, unit in enumerate(self._units):
            unit.allocate()
            unit.module.register_forward_pre_hook(
                lambda m, args, kwargs, k=k: self._before_forward(k, args, kwargs), with_kwargs=True)
            unit.module.register_forward_hook(lambda m, args, output, k=k: self._after_forward(k, output))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def no_sync(self):
        """For the same loop as with DDP. It changes nothing: every micro-batch's gradients are reduce-scattered at once,
        since to keep them whole would need the memory that sharding saves."""
        return contextlib.nullcontext()

    # -- forward: gather this unit, start the next, free it afterwards

    def _before_forward(self, k: int, args: tuple, kwargs: dict):
        unit = self._units[k]
        in_backward = torch._C._current_graph_task_id() != -1                  # a checkpoint recomputes
        if unit.stale():
            unit.free()
        unit.gather()
        unit.wait()
        self._prefetch(k + 1, only_if_expected=in_backward)
        unit.call = _Call({i for i, shard in enumerate(unit.shards) if shard.parameter.requires_grad})
        if self.compute_dtype:
            cast = lambda x: x.to(self.compute_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            args, kwargs = tuple(cast(a) for a in args), {key: cast(a) for key, a in kwargs.items()}
        if len(unit.call.missing) < len(unit.shards) and torch.is_grad_enabled():
            # A frozen weight tells nobody when it has been used: the gradient of the unit's input does.
            for j, x in enumerate(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor) and x.requires_grad):
                unit.call.missing.add(("input", j))
                x.register_hook(lambda _, call=unit.call, j=j: (unit.finished(call, ("input", j)), None)[1])
        unit.expose(unit.call)
        return args, kwargs

    def _after_forward(self, k: int, output) -> None:
        unit, call = self._units[k], self._units[k].call
        in_backward = torch._C._current_graph_task_id() != -1
        outputs = [t for t in _tensors(output) if t.requires_grad]
        if outputs and not _is_lookup(outputs):
            unit.expected += not in_backward
            for t in outputs:
                t.register_hook(lambda _, call=call: self._before_backward(k, call))
        if not in_backward:
            unit.hide()
            if not (outputs and k == len(self._units) - 1):                    # the last unit's backward comes at once
                unit.free()

    def _prefetch(self, k: int, only_if_expected: bool) -> None:
        if 0 <= k < len(self._units) and (self._units[k].expected or not only_if_expected):
            if self._units[k].stale():
                self._units[k].free()
            self._units[k].gather()

    # -- backward: gather again, reduce-scatter each gradient when it is there, free

    def _before_backward(self, k: int, call: _Call) -> None:
        unit = self._units[k]
        if call in unit.active or not call.missing:                            # one of several outputs was first
            return
        unit.active.add(call)
        unit.expected = max(0, unit.expected - 1)
        unit.gather()
        unit.wait()
        with torch.enable_grad():
            unit.expose(call)                                                  # for a checkpoint inside the unit
        self._prefetch(k - 1, only_if_expected=True)

    @torch.no_grad()
    def _reduce(self, unit: _Unit, i: int, call: _Call, gradient: Tensor) -> None:
        shard = unit.shards[i]
        whole = gradient.reshape(-1).to(self.reduce_dtype)                     # no copy where nothing has to change
        padding = shard.size * self.world_size - whole.numel()
        if padding:
            whole = torch.nn.functional.pad(whole, (0, padding))
        elif whole.data_ptr() == gradient.data_ptr() and not (self._nccl and self.world_size > 1):
            whole = whole.clone()                                              # it will be written, or become .grad
        work, mine = None, whole
        if self.world_size > 1 and shard.size:
            if self._nccl:
                scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
                mine = whole.new_empty(shard.size)
                work = scatter(mine, whole, op=dist.ReduceOp.AVG, async_op=True)
            else:                                                              # gloo has had no reduce-scatter for long
                work = dist.all_reduce(whole, async_op=True)
        # Both tensors are held until the sum is there: the communication stream reads one and writes the other.
        self._pending.append((call, shard, mine, whole, work))
        if unit.finished(call, i):
            self._note("reduce", unit)
            self._settle(keep=call)                    # the unit before this one had all of this backward to be summed

    @torch.no_grad()
    def _settle(self, keep: _Call | None = None) -> None:
        """Waits for sums and hands them to the parameters' .grad; all of them, or all but those of one call."""
        for call, shard, mine, whole, work in self._pending:
            if call is keep:
                continue
            if work is not None:
                work.wait()
            if not self._nccl and self.world_size > 1:
                mine = whole[self.rank * shard.size:(self.rank + 1) * shard.size] / self.world_size
            p = shard.parameter
            if p.grad is None:
                p.grad = mine.float()
            else:
                p.grad += mine
        self._pending = [entry for entry in self._pending if entry[0] is keep]

    @torch.no_grad()
    def finish_gradient_synchronization(self) -> None:
        """Waits for the last sums, averages the gradients of the parameters that are not sharded, frees what is left."""
        self._settle()
        for unit in self._units:
            unit.active.clear()
            unit.expected = 0
            unit.free()
        replicated = [p for p in self.module.parameters() if p.requires_grad and p not in self._shards]
        for dtype in dict.fromkeys(p.dtype for p in replicated):
            parameters = [p for p in replicated if p.dtype == dtype]
            used = parameters[0].new_ones(len(parameters))
            for i, p in enumerate(parameters):
                if p.grad is None:
                    used[i] = 0                                                # did any rank use it? zero if none did
            flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1)
                              for p in parameters] + [used])
            dist.all_reduce(flat)
            flat /= self.world_size
            for i, (p, mean) in enumerate(zip(parameters, flat.split([p.numel() for p in parameters] + [len(used)]))):
                if p.grad is not None:
                    p.grad.copy_(mean.view(p.shape))
                elif flat[i - len(used)] != 0:                                 # the only case that waits for the device
                    p.grad = mean.view(p.shape).clone()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that the norm of the whole model's is at most max_norm. Returns the norm before it.
        Call on all ranks, after finish_gradient_synchronization(). Does not wait for the device."""
        sharded = [p.grad for p in self._shards if p.grad is not None]
        others = [p.grad for p in self.module.parameters() if p.grad is not None and p not in self._shards]
        device = next(self.module.parameters()).device
        square = lambda gradients: sum((n.float() ** 2 for n in torch._foreach_norm(gradients)) if gradients else (),
                                       start=torch.zeros((), device=device))
        total = square(sharded)
        dist.all_reduce(total)
        norm = (total + square(others)).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in sharded + others:
            gradient *= scale.to(gradient.dtype)
        return norm

    def gathered(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a parameter, to be used outside its module (a chunked loss takes lm_head.weight, say). Its gradient
        finds the way back; the memory is freed then, or by finish_gradient_synchronization()."""
        if parameter not in self._shards:
            return parameter
        unit = [u for u in self._units if self._shards[parameter] in u.shards][-1]
        i = unit.shards.index(self._shards[parameter])
        if unit.stale():
            unit.free()
        unit.gather()
        unit.wait()
        if not (parameter.requires_grad and torch.is_grad_enabled()):
            return unit.whole(i)
        call = _Call({i})
        unit.active.add(call)
        return _Gathered.apply(parameter, unit, i, call)

    # -- checkpoints that know nothing of ranks

    @torch.no_grad()
    def _whole(self, shard: _Shard, mine: Tensor, keep: bool) -> Tensor | None:
        whole = mine.new_empty(shard.size * self.world_size)
        _all_gather(whole, mine.contiguous(), async_op=False)
        return whole[:shard.numel].view(shard.shape).cpu().clone() if keep else None

    def full_state_dict(self, rank: int | None = None) -> dict[str, Tensor]:
        """The module's state dict with whole tensors, on the CPU, under the module's own names. All ranks must call it.
        Args: rank: only this one keeps it, the others get {}; None: all do."""
        keep = rank in (None, self.rank)
        done: dict[Tensor, Tensor] = {}                                        # tied names get the same tensor
        for t in self.module.state_dict(keep_vars=True).values():
            if t not in done:
                done[t] = self._whole(self._shards[t], t.detach(), keep) if t in self._shards else t.detach().cpu().clone()
        return {name: done[t] for name, t in self.module.state_dict(keep_vars=True).items()} if keep else {}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Takes a whole state dict, the same on all ranks, whatever number of ranks it was made with.
        Raises: ValueError, before anything is changed, if a name is missing or too many or a shape differs."""
        own = self.module.state_dict(keep_vars=True)
        missing, extra = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys())
        if missing or extra:
            raise ValueError(f"the state dict is of another model: missing {missing[:3]}, not expected {extra[:3]}")
        for name, t in own.items():
            shape = self._shards[t].shape if t in self._shards else t.shape
            if state_dict[name].shape != shape:
                raise ValueError(f"{name} is {tuple(state_dict[name].shape)} in the state dict, {tuple(shape)} in the model")
        for name, t in own.items():
            t.data.copy_(self._shards[t].cut(state_dict[name], self.rank) if t in self._shards else state_dict[name])
        for unit in self._units:
            unit.free()

    def full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, rank: int | None = None) -> dict:
        """What optimizer.state_dict() would be without sharding, on the CPU. All ranks must call it; rank: as above."""
        keep = rank in (None, self.rank)
        local = optimizer.state_dict()
        for p, entry in _entries(optimizer, local):
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    entry[key] = self._whole(self._shards[p], value, keep) if p in self._shards and \
                        value.shape == p.shape else value.cpu().clone()
        return local if keep else {**local, "state": {}}

    def load_full_optimizer_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        """Loads what full_optimizer_state_dict() gave, or a plain optimizer's state_dict() of the same model."""
        state_dict = {**state_dict, "state": {i: dict(entry) for i, entry in state_dict["state"].items()}}
        for p, entry in _entries(optimizer, state_dict):
            for key, value in entry.items():
                if isinstance(value, Tensor) and p in self._shards and value.shape == self._shards[p].shape:
                    entry[key] = self._shards[p].cut(value, self.rank)
        optimizer.load_state_dict(state_dict)

    def _count_bytes(self, change: int) -> None:
        self.gathered_bytes += change
        self.peak_gathered_bytes = max(self.peak_gathered_bytes, self.gathered_bytes)

    def _note(self, event: str, unit: _Unit) -> None:
        if self.log:
            self.log(event, unit.name)


def _entries(optimizer: torch.optim.Optimizer, state_dict: dict) -> list[tuple[Tensor, dict]]:
    """Each parameter of the optimizer with its entry in a state dict. Raises: ValueError if the groups do not match."""
    ours, theirs = [g["params"] for g in optimizer.param_groups], [g["params"] for g in state_dict["param_groups"]]
    if [len(g) for g in ours] != [len(g) for g in theirs]:
        raise ValueError(f"the checkpoint's groups hold {[len(g) for g in theirs]} parameters, this optimizer's "
                         f"{[len(g) for g in ours]}; build the optimizer with the same parameters, in the same order")
    return [(p, state_dict["state"][i]) for g, h in zip(ours, theirs) for p, i in zip(g, h) if i in state_dict["state"]]


def _find_units(module: nn.Module) -> list[tuple[str, nn.Module, list[nn.Module]]]:
    """(name, module that is called, modules whose weights it gathers), in registration order."""
    units, seen = [], set()

    def walk(name: str, m: nn.Module, block: bool) -> None:
        if m in seen:
            return
        seen.add(m)
        # MultiheadAttention reads out_proj.weight without calling out_proj.
        members = list(m.modules()) if block or isinstance(m, nn.MultiheadAttention) else [m]
        if any(p is not None and p.dim() >= 2 for member in members for p in member._parameters.values()):
            units.append((name, m, members))
        if len(members) == 1:
            for child_name, child in m.named_children():
                container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
                walk(f"{name}.{child_name}".lstrip("."), child, not container and (
                    isinstance(m, nn.ModuleList) or isinstance(m, nn.Sequential) and not isinstance(child, nn.Sequential)))
    walk("", module, False)
    return units


def _tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


def _is_lookup(outputs: list[Tensor]) -> bool:
    """An embedding's backward needs no weight, so gathering it again would be for nothing."""
    node = outputs[0].grad_fn
    return len(outputs) == 1 and node.name() in ("EmbeddingBackward0", "IndexBackward0") and \
        any(next_node is not None and "_Gathered" in next_node.name() for next_node, _ in node.next_functions)
