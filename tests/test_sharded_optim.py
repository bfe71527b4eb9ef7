"""sharded_optim.py against one process, against torch's own sharding (a fixture), and against callers' mistakes, on
gloo ranks, and NCCL ranks where there are GPUs. The pool of two processes, the fixture's model and its batches are
those of test_ddp.py."""
import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import sharded_optim
from sharded_optim import FSDP, ShardedOptimizer
from test_ddp import (FIXTURES, PATIENCE, Net, Ranks, batch, ended, one_process, perturb,  # noqa: F401
                      pretend_two_gpus, ranks)

ROOT = Path(sharded_optim.__file__).resolve().parent


# ---- a small transformer-like model of classes that FSDP has never seen ----

class Linear(nn.Module):
    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in ** 0.5)

    def forward(self, x):
        return x @ self.weight.T


class Embedding(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, width))

    def forward(self, ids):
        return self.weight[ids]


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width, checkpoint_inside):
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(width), Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)
        self.checkpoint_inside = checkpoint_inside

    def body(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpoint_inside else self.body(x)


class Model(nn.Module):
    def __init__(self, recompute=None, tied=False, frozen=False, every=1):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings, self.lm_head = Embedding(11, 5), Linear(5, 11)        # the head is registered out of order
        self.layers = nn.ModuleList(Block(5, recompute == "inside") for _ in range(3))
        self.norm = RMSNorm(5)
        self.register_buffer("scale", torch.tensor(2.0))
        self.recompute, self.every = recompute, every
        if tied:
            self.lm_head.weight = self.embeddings.weight
        if frozen:
            for p in (self.layers[1].up.weight, self.layers[0].down.weight, self.layers[2].norm.weight):
                p.requires_grad_(False)
            self.layers[1].down.weight.requires_grad_(False)                   # layer 1: all matrices are frozen

    def run(self, i, x):
        for layer in self.layers[i:i + self.every]:
            x = layer(x)
        return x

    def hidden(self, ids):
        x = self.embeddings(ids)
        for i in range(0, len(self.layers), self.every):
            if self.recompute in ("outside", "reentrant"):
                x = checkpoint(self.run, i, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = self.run(i, x)
        return self.norm(x)

    def loss(self, logits, ids):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def forward(self, ids):
        return self.loss(self.lm_head(self.hidden(ids)), ids)


def adamw(model):
    """With an eps that lets a gradient's size count, and roundings of those near zero stay roundings."""
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=1e-4)


def average(model):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def train_fsdp(rank, fsdp, optimizer, steps, first=0, micro_batches=1, outside=False):
    for step in range(first, first + steps):
        optimizer.zero_grad(set_to_none=True)
        for m in range(micro_batches):
            ids = batch(step * micro_batches + m, rank)
            if outside:                                                        # as a chunked loss does
                loss = fsdp.module.loss(fsdp.module.hidden(ids) @ fsdp.gathered(fsdp.module.lm_head.weight).T, ids)
            else:
                loss = fsdp(ids)
            (loss / micro_batches).backward()
        fsdp.finish_gradient_synchronization()
        optimizer.step()


def assert_close(ours, theirs, atol=1e-5):
    """1e-5: sums in another order, or by a GPU's kernels, put roundings on the gradients: random ones of their size
    move the weights by 7e-7 in four steps of adamw(). Gradients that nobody divided by the number of ranks: 3e-3."""
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name].cpu(), rtol=0, atol=atol,
                                   msg=lambda m: f"{name}: {m}")


# ---- ShardedOptimizer ----

def check_zero(rank, world_size, optimizer_cls, kwargs, grouped, round_bytes, frozen):
    ShardedOptimizer.ROUND_BYTES = round_bytes
    trained, gradients = [], []
    for sharded in (False, True):
        model = Model(tied=True, frozen=frozen)
        groups = list(model.parameters())
        if grouped:
            groups = [{"params": [p for p in groups if p.dim() > 1], "weight_decay": 0.1},
                      {"params": [p for p in groups if p.dim() < 2], "weight_decay": 0.0}]
        optimizer = ShardedOptimizer(groups, optimizer_cls, **kwargs) if sharded else optimizer_cls(groups, **kwargs)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(4):
            if step == 2 and optimizer_cls is not torch.optim.Adagrad:                 # torch 2.11's cannot grow
                model.extra = nn.Parameter(torch.ones(3, 3))
                optimizer.add_param_group({"params": [model.extra], "lr": 0.5})
                schedule.base_lrs.append(0.5)
                schedule.lr_lambdas.append(lambda step: 1 / (step + 1))
            optimizer.zero_grad()
            if sharded:                                                        # the same ones for both
                for p, gradient in zip(model.parameters(), gradients[step], strict=True):
                    p.grad = gradient
            else:
                (model(batch(step, rank)) + (model.extra.sum() * step if hasattr(model, "extra") else 0)).backward()
                average(model)
                gradients.append([p.grad for p in model.parameters()])
            optimizer.step()
            schedule.step()
        trained.append((model, optimizer))
    (plain_model, plain), (model, optimizer) = trained
    for (name, p), q in zip(model.named_parameters(), plain_model.named_parameters(), strict=True):
        # The same update of the same numbers, on one rank instead of on all: at most the last bit may differ.
        torch.testing.assert_close(p, q[1], rtol=1e-7, atol=0, msg=lambda m: f"{name}: {m}")
    ours, theirs = optimizer.state_dict(), plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i in theirs["state"]:
        for key, value in theirs["state"][i].items():
            torch.testing.assert_close(ours["state"][i][key], value.cpu(), rtol=1e-7, atol=0)
    owned = sum(len(inner.state) for _, _, inner in optimizer._rounds)
    everyone = [None] * world_size
    dist.all_gather_object(everyone, owned)
    assert sum(everyone) == len(theirs["state"]), f"{everyone} entries for {len(theirs['state'])} parameters"
    return [optimizer.owner[p] for p in model.parameters()]


@pytest.mark.parametrize("optimizer_cls, kwargs, grouped, round_bytes, frozen", [
    (torch.optim.AdamW, {"lr": 0.02}, False, 1 << 28, False),
    (torch.optim.AdamW, {"lr": 0.02}, True, 100, True),                        # many rounds
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, True, 1 << 28, False),
    (torch.optim.Adagrad, {"lr": 0.1}, False, 1, False),                       # makes its state in the constructor
])
def test_sharded_optimizer_equals_the_plain_one(ranks, optimizer_cls, kwargs, grouped, round_bytes, frozen):
    owners = ranks(check_zero, optimizer_cls, kwargs, grouped, round_bytes, frozen)
    assert owners[0] == owners[1] and set(owners[0]) == {0, 1}


def check_zero_fixture(rank, world_size):
    answer = json.loads((FIXTURES / "sharded_optim_torch.json").read_text())["zero1_adamw"]
    model = Net()
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05, weight_decay=0.1, eps=1e-4)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step, rank)).backward()
        average(model)
        optimizer.step()
    assert_close({n: p.detach().flatten() for n, p in model.named_parameters()},
                 {n: torch.tensor(v) for n, v in answer.items()})


def test_known_answer_of_torch_zero_redundancy_optimizer(ranks):
    ranks(check_zero_fixture)


def check_owners(rank, world_size):
    one = nn.Parameter(torch.zeros(4, 3))
    optimizer = ShardedOptimizer([one], torch.optim.AdamW, lr=0.1)             # rank 1 owns nothing
    one.grad = torch.ones(4, 3)
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.full((4, 3), -0.1), rtol=1e-5, atol=0)
    assert len(optimizer.state) == (1 if rank == 0 else 0)
    assert optimizer.state_dict()["state"][0]["exp_avg"].shape == (4, 3)
    assert bool(optimizer.state_dict(rank=1)["state"]) == (rank == 1)
    strided = nn.Parameter(torch.arange(6.).view(2, 3).T)
    optimizer = ShardedOptimizer([nn.Parameter(torch.zeros(9)), strided], torch.optim.SGD, lr=1.0)   # owned by rank 1
    optimizer.param_groups[0]["params"][0].grad, strided.grad = torch.ones(9), torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(strided.detach(), torch.arange(6.).view(2, 3).T - 1)
    sizes = [7, 50, 3, 20, 20, 1, 30]
    optimizer = ShardedOptimizer([nn.Parameter(torch.zeros(n)) for n in sizes], torch.optim.SGD, lr=1.0)
    assert optimizer._elements == [70, 61]                                     # 50 20 | 30 20 7 3 1, by hand
    with pytest.raises(ValueError, match="same parameters"):
        optimizer.load_state_dict(torch.optim.SGD([one], lr=1.0).state_dict())


def test_ranks_that_own_nothing_strides_balance_and_wrong_checkpoints(ranks):
    ranks(check_owners)


# ---- FSDP equals one process ----

def check_fsdp(rank, world_size, model_kwargs, options):
    micro_batches, outside = options.get("micro_batches", 1), options.get("outside", False)
    plain_kwargs = {k: v for k, v in model_kwargs.items() if k != "recompute"}
    plain = one_process(Model(**plain_kwargs), world_size, 4, micro_batches, adamw)
    module = perturb(Model(**model_kwargs), rank)
    before = dict(module.named_parameters())
    fsdp = FSDP(module)
    if options.get("compile"):
        for layer in module.layers:
            layer.forward = torch.compile(layer.forward, backend="aot_eager")  # the compiler without its code generator
    optimizer = adamw(fsdp)
    train_fsdp(rank, fsdp, optimizer, 4, micro_batches=micro_batches, outside=outside)
    assert all(p is before[name] for name, p in module.named_parameters()), "the Parameter objects have to stay"
    for p in module.parameters():
        shape = fsdp._shapes[p] if p in fsdp._shapes else p.shape
        assert p.numel() == (-(-shape.numel() // world_size) if len(shape) > 1 else shape.numel())
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.shape == p.shape)
    assert fsdp.gathered_bytes == 0, "something is still gathered"
    assert_close(fsdp.full_state_dict(), plain.state_dict())


@pytest.mark.parametrize("model_kwargs, options", [
    ({}, {}), ({"tied": True}, {}), ({"frozen": True}, {}), ({"frozen": True, "recompute": "outside"}, {}),
    ({"recompute": "inside"}, {}), ({"recompute": "outside"}, {}), ({"recompute": "reentrant"}, {}),
    ({"recompute": "outside", "every": 2}, {}), ({}, {"micro_batches": 2}), ({}, {"outside": True}),
    ({"tied": True}, {"outside": True, "micro_batches": 3}), ({"recompute": "inside"}, {"compile": True}),
    ({"recompute": "outside"}, {"compile": True}),
], ids=str)
def test_fsdp_equals_one_process(ranks, model_kwargs, options):
    ranks(check_fsdp, model_kwargs, options)


def check_fsdp_fixture(rank, world_size):
    answer = json.loads((FIXTURES / "sharded_optim_torch.json").read_text())["fsdp_adamw"]
    fsdp = FSDP(perturb(Net(), rank))
    optimizer = torch.optim.AdamW(fsdp.parameters(), lr=0.05, weight_decay=0.1, eps=1e-4)
    train_fsdp(rank, fsdp, optimizer, 3)
    state = fsdp.full_state_dict()
    assert state["head.weight"].data_ptr() == state["embeddings.weight"].data_ptr()
    assert_close({n: state[n].flatten() for n in answer}, {n: torch.tensor(v) for n, v in answer.items()})


def test_known_answer_of_torch_fully_shard(ranks):
    ranks(check_fsdp_fixture)


def check_low_precision(rank, world_size, dtype):
    """One step's gradients, beside those of a plain model whose matrices and biases are rounded to dtype."""
    plain = Model()
    for layer in plain.layers:
        layer.down.to(dtype), layer.up.to(dtype)
    plain.embeddings.to(dtype), plain.lm_head.to(dtype)
    for r in range(world_size):
        plain(batch(0, r)).backward()
    fsdp = FSDP(Model(), dtype)
    fsdp(batch(0, rank)).backward()
    fsdp.finish_gradient_synchronization()
    for (name, p), q in zip(fsdp.module.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32, name
        want = q.grad.float() / world_size
        want = fsdp._cut(want) if p in fsdp._shapes else want
        # Each rank's gradient is rounded to dtype (eps/2 of it), and activations on the way; the plain model rounds the
        # sum as well. A gradient that was not divided, or is one rank's alone, is off by more than 20%.
        torch.testing.assert_close(p.grad, want, rtol=0.02, atol=4 * torch.finfo(dtype).eps * want.abs().max().item())
    assert fsdp.peak_gathered_bytes > 0 and all(b.dtype == dtype for u in fsdp._units for b in u.buffers.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype(ranks, dtype):
    ranks(check_low_precision, dtype)


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.several = nn.ParameterList([torch.randn(5, 7), torch.randn(7, 9)])
        self.inner = nn.Sequential(nn.Linear(9, 9), nn.Tanh())                 # a unit of its own, within this one
        self.named = nn.ParameterDict({"last": torch.randn(9, 9)})

    def forward(self, x):
        return self.inner(x @ self.several[0] @ self.several[1]) @ self.named["last"]


def run_lists(model, x):
    return model(x).square().mean()


def torchs_layers():
    """Attention reads out_proj.weight without calling it, convolutions have four dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(2), nn.LayerNorm(9),
                         nn.TransformerEncoderLayer(9, 3, 7, 0.0), nn.MultiheadAttention(9, 3))


def run_layers(modules, x):
    *most, attention = modules
    for m in most:
        x = m(x)
    return attention(x, x, x, need_weights=False)[0].square().mean()


def check_other_modules(rank, world_size, build, run):
    x = torch.sin(torch.arange(2 * 2 * 2 * 25.)).view(world_size, 2, 2, 5, 5)
    plain = build()
    for r in range(world_size):
        (run(plain, x[r]) / world_size).backward()
    fsdp = FSDP(build())
    run(fsdp.module, x[rank]).backward()
    fsdp.finish_gradient_synchronization()
    for (name, p), q in zip(fsdp.module.named_parameters(), plain.parameters(), strict=True):
        want = fsdp._cut(q.grad) if p in fsdp._shapes else q.grad
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_modules_of_torch(ranks):
    ranks(check_other_modules, torchs_layers, run_layers)


def test_lists_of_parameters_which_nobody_calls(ranks):
    ranks(check_other_modules, Lists, run_lists)


# ---- memory, order ----

def check_events(rank, world_size):
    fsdp = FSDP(Model())
    optimizer = adamw(fsdp)
    train_fsdp(rank, fsdp, optimizer, 1)                                       # learns the order
    events = []
    fsdp.peak_gathered_bytes = 0
    fsdp.log = lambda event, unit: events.append((event, unit))
    train_fsdp(rank, fsdp, optimizer, 1, first=1)
    fsdp.log = lambda event, unit: None
    pairs = [a.bytes + b.bytes for a, b in zip(fsdp._order, fsdp._order[1:])]
    assert fsdp.peak_gathered_bytes == max(pairs), "more than two units were whole at once"
    gathers = [unit for event, unit in events if event == "gather"]
    assert gathers == ["embeddings", "layers.0", "layers.1", "layers.2", "lm_head", "layers.2", "layers.1", "layers.0"]
    # One layer ahead: each is gathered before the one before it is freed.
    for earlier, later in (("layers.0", "layers.1"), ("layers.1", "layers.2"), ("layers.2", "lm_head")):
        assert events.index(("gather", later)) < events.index(("free", earlier))
    backward = events[events.index(("gather", "lm_head")) + 2:]
    for later, earlier in (("lm_head", "layers.2"), ("layers.2", "layers.1"), ("layers.1", "layers.0")):
        assert backward.index(("gather", earlier)) < backward.index(("free", later))
    for unit in fsdp._units:
        assert all(buffer.untyped_storage().nbytes() == 0 for buffer in unit.buffers.values())
    assert fsdp.module.lm_head.weight.dim() == 1 and "weight" not in fsdp.module.lm_head.__dict__


def test_two_units_at_a_time_gathered_one_ahead(ranks):
    ranks(check_events)


def check_evaluation(rank, world_size):
    """Weights gathered ahead in evaluation and then not used must not be taken for the new ones after a step."""
    fsdp = FSDP(Model())
    optimizer = adamw(fsdp)
    train_fsdp(rank, fsdp, optimizer, 2)
    with torch.no_grad():
        fsdp.module.hidden(batch(0, rank))                                     # gathers the head, does not use it
        for p in fsdp.parameters():
            p.mul_(0.5)
        plain = Model()
        plain.load_state_dict(fsdp.full_state_dict())
        torch.testing.assert_close(fsdp(batch(1, rank)), plain(batch(1, rank)), rtol=1e-6, atol=0)
        torch.testing.assert_close(fsdp.gathered(fsdp.module.lm_head.weight), plain.lm_head.weight, rtol=0, atol=0)
        assert fsdp.gathered(fsdp.module.norm.weight) is fsdp.module.norm.weight


def test_evaluation_between_steps(ranks):
    ranks(check_evaluation)


def check_clip(rank, world_size):
    plain = Model(frozen=True)
    for r in range(world_size):
        (plain(batch(0, r)) / world_size).backward()
    fsdp = FSDP(Model(frozen=True))
    fsdp(batch(0, rank)).backward()
    fsdp.finish_gradient_synchronization()
    for max_norm in (1e9, 0.1):
        want = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        torch.testing.assert_close(fsdp.clip_grad_norm_(max_norm), want, rtol=1e-5, atol=0)
        for (name, p), q in zip(fsdp.module.named_parameters(), plain.parameters()):
            if q.grad is not None:
                want_grad = fsdp._cut(q.grad) if p in fsdp._shapes else q.grad
                torch.testing.assert_close(p.grad, want_grad, rtol=1e-4, atol=1e-7)


def test_clipping_is_of_the_whole_models_norm(ranks):
    ranks(check_clip)


def check_norm(rank, world_size):
    """5 million squares a rank: in one go torch's sum on a CPU is 1.4e-4 too small, in slices 1e-6."""
    torch.manual_seed(rank)
    fsdp = FSDP(nn.Linear(2 ** 11, 5 * 2 ** 11, bias=False))
    fsdp.module.weight.grad = torch.randn(fsdp.module.weight.shape)
    total = fsdp.module.weight.grad.double().square().sum()
    dist.all_reduce(total)
    assert abs(fsdp.clip_grad_norm_(1.0).item() / total.sqrt().item() - 1) < 1e-5


def test_the_norm_of_millions(ranks):
    ranks(check_norm)


class SomeUse(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.never = nn.Linear(3, 2), nn.Linear(3, 2)
        self.by_one = nn.Parameter(torch.ones(2))

    def forward(self, x, rank):
        y = self.used(x)
        return (y * self.by_one if rank == 0 else y).sum()


def check_unused(rank, world_size):
    fsdp = FSDP(SomeUse())
    fsdp(torch.ones(1, 3), rank).backward()
    fsdp.finish_gradient_synchronization()
    assert fsdp.module.never.weight.grad is None and fsdp.module.never.bias.grad.abs().sum() == 0
    plain = SomeUse()
    want = plain.used(torch.ones(1, 3)).detach()[0] / world_size
    torch.testing.assert_close(fsdp.module.by_one.grad, want)                  # zero from rank 1


def test_unused_parameters(ranks):
    ranks(check_unused)


# ---- checkpoints across world sizes and kinds of sharding ----

def save(rank, world_size, path):
    fsdp = FSDP(Model(tied=True))
    optimizer = adamw(fsdp)
    train_fsdp(rank, fsdp, optimizer, 2)
    whole = {"model": fsdp.full_state_dict(rank=0), "optimizer": fsdp.full_optimizer_state_dict(optimizer, rank=0)}
    if rank == 0:
        torch.save(whole, path)
    else:
        assert whole["model"] == {} and whole["optimizer"]["state"] == {}
    train_fsdp(rank, fsdp, optimizer, 2, first=2)                              # saving must not have harmed anything
    return fsdp.full_state_dict()


def resume(rank, world_size, path, data_ranks):
    """Two more steps on other ranks than it was saved with: the global batch stays that of `data_ranks` ranks."""
    saved = torch.load(path, weights_only=True)
    fsdp = FSDP(perturb(Model(tied=True), 1))
    optimizer = adamw(fsdp)
    fsdp.load_full_state_dict(saved["model"])
    fsdp.load_full_optimizer_state_dict(optimizer, saved["optimizer"])
    mine = range(rank, data_ranks, world_size)
    for step in (2, 3):
        optimizer.zero_grad(set_to_none=True)
        for r in mine:
            (fsdp(batch(step, r)) / len(mine)).backward()
        fsdp.finish_gradient_synchronization()
        optimizer.step()
    return fsdp.full_state_dict()


def plain_and_zero_resume(rank, world_size, path, data_ranks):
    saved = torch.load(path, weights_only=True)
    states = []
    for sharded in (False, True):
        model = Model(tied=True)
        model.load_state_dict(saved["model"])
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=9.0) if sharded else adamw(model)
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))           # brings lr and weight_decay too
        assert optimizer.param_groups[0]["lr"] == 0.02
        for step in (2, 3):
            optimizer.zero_grad()
            for r in range(data_ranks):
                (model(batch(step, r)) / data_ranks).backward()
            optimizer.step()
        states.append({name: value.cpu() for name, value in model.state_dict().items()})
    return states


def test_checkpoints_load_on_other_world_sizes_and_other_kinds_of_sharding(ranks, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    want = ranks(save, path)[0]
    assert_close(ranks(resume, path, 2)[0], want)
    for state in ranks(plain_and_zero_resume, path, 2)[0]:
        assert_close(state, want)
    alone = Ranks(1, ranks.backend)
    try:
        assert_close(alone(resume, path, 2)[0], want)                          # world size 1, two micro-batches
    finally:
        alone.stop()


def check_three(rank, world_size):
    """Three ranks: nothing divides evenly, and some shards are padding alone."""
    tiny = FSDP(nn.Linear(1, 2, bias=False))                                   # two elements for three ranks
    tiny(torch.ones(1, 1)).sum().backward()
    tiny.finish_gradient_synchronization()
    torch.testing.assert_close(tiny.module.weight.grad, torch.tensor([float(rank < 2)]))
    fsdp = FSDP(Model())
    optimizer = adamw(fsdp)
    train_fsdp(rank, fsdp, optimizer, 2)
    assert_close(fsdp.full_state_dict(), one_process(Model(), world_size, 2, optimizer=adamw).state_dict())
    assert fsdp.full_optimizer_state_dict(optimizer)["state"][0]["exp_avg"].shape == (11, 5)


def test_three_ranks():
    pool = Ranks(3)
    try:
        pool(check_three)
    finally:
        pool.stop()


# ---- mistakes ----

def check_mistakes(rank, world_size):
    fsdp = FSDP(Model())
    before = fsdp.full_state_dict()
    missing = {k: v for k, v in before.items() if k != "norm.weight"}
    with pytest.raises(ValueError, match="norm.weight"):
        fsdp.load_full_state_dict(missing)
    with pytest.raises(ValueError, match="extra"):
        fsdp.load_full_state_dict({**before, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=r"lm_head.weight is \(2, 2\)"):
        fsdp.load_full_state_dict({**{k: v + 1 for k, v in before.items()}, "lm_head.weight": torch.ones(2, 2)})
    assert_close(fsdp.full_state_dict(), before, atol=0)                       # nothing was half loaded
    with pytest.raises(ValueError, match="same parameters"):
        fsdp.load_full_optimizer_state_dict(adamw(fsdp), torch.optim.AdamW([nn.Parameter(torch.ones(1))]).state_dict())
    with pytest.raises(ValueError, match="meta"):
        FSDP(nn.Linear(2, 2, device="meta"))


def test_mistakes_are_named(ranks):
    ranks(check_mistakes)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="torchrun"):
        FSDP(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="torchrun"):
        ShardedOptimizer([nn.Parameter(torch.ones(1))], torch.optim.SGD)


def test_bytes_held():
    P = 8_130_000_000
    assert [sharded_optim.bytes_held(P, 2, stage) / P for stage in (0, 1, 3)] == [16, 12, 8]


def test_command_line_explains_itself():
    done = subprocess.run([sys.executable, str(ROOT / "sharded_optim.py")], capture_output=True, text=True,
                          timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "check: FSDP = plain" in done.stdout and "gather" in done.stdout


def test_more_ranks_than_gpus_is_one_line(monkeypatch, capsys):
    pretend_two_gpus(monkeypatch)
    code, lines = ended(monkeypatch, capsys, sharded_optim, "--bench")
    assert code == 2 and len(lines) == 1
    assert "rank 2 has no GPU (2 here); lower --nproc-per-node" in lines[0]


def test_sizes_that_cannot_be_are_refused(monkeypatch, capsys):
    code, lines = ended(monkeypatch, capsys, sharded_optim, "--bench", "--width", "0", "--repeats", "-3")
    assert code == 2 and "must be at least 1: --width 0, --repeats -3" in lines[-1]
    assert sharded_optim._model(400, 1, 11)[1].self_attn.num_heads == 1        # 3 heads would not divide it


def test_imports_no_sibling():
    tree = ast.parse((ROOT / "sharded_optim.py").read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names) | {"torch"}
