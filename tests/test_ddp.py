"""ddp.py against one process, against torch's own DDP (a fixture), and against callers' mistakes, on two gloo ranks;
where there are two GPUs the tests that take `ranks` run on two NCCL ranks too."""
import ast
import atexit
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

import ddp

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(ddp.__file__).resolve().parent
BACKENDS = ["gloo"] + ["nccl"] * (torch.cuda.device_count() >= 2 and dist.is_nccl_available())
PATIENCE = 600                      # seconds: only what hangs takes so long, on however busy a machine


# ---- two processes that stay for a whole file, so that torch is imported once a rank ----

def _serve(rank, world_size, backend, path, connection):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:                                             # the tests make their tensors with no device
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"              # the same sums in the same order every time
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = False                        # convolutions in whole float32
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=PATIENCE), device_id=device)
    while (job := connection.recv()) is not None:
        function, args = job
        try:
            connection.send((True, function(rank, world_size, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """ranks(f, *args) calls f(rank, world_size, *args) on every rank and returns the list of their results."""

    def __init__(self, world_size=2, backend="gloo"):
        self.world_size, self.backend, self.processes = world_size, backend, []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(self.world_size)]
        self.connections = [ours for ours, _ in pipes]
        meet = os.path.join(self.folder.name, "meet")
        self.processes = [context.Process(target=_serve, args=(r, self.world_size, self.backend, meet, theirs),
                                          daemon=True) for r, (_, theirs) in enumerate(pipes)]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()                                             # else a rank's death would not end our end

    def __call__(self, function, *args):
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results, deadline = [None] * self.world_size, time.monotonic() + PATIENCE
        waiting = set(range(self.world_size))
        while waiting:
            for r in list(waiting):
                if self.connections[r].poll(0.005):
                    try:
                        ok, results[r] = self.connections[r].recv()
                    except EOFError:
                        self.processes[r].join()
                        ok, results[r] = False, f"died, exit code {self.processes[r].exitcode}"
                    waiting.discard(r)
                    if not ok:
                        self.stop()                                    # the other rank may be waiting for this one
                        pytest.fail(f"rank {r}:\n{results[r]}")
            if time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"ranks {sorted(waiting)} gave no answer for {PATIENCE} s")
        return results

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request):
    pool = Ranks(backend=request.param)
    yield pool
    pool.stop()


# ---- models: a formula sets the weights, so that every process and every torch version starts from the same ----

class Net(nn.Module):
    """The model of make_ddp.py: a head tied to the embedding, biases, a frozen weight, odd sizes."""

    def __init__(self, vocab_size=11, width=5):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width))
                                    for _ in range(2))
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embeddings.weight
        self.layers[0][2].weight.requires_grad_(False)
        with torch.no_grad():
            for k, p in enumerate(self.parameters()):
                p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (k + 1.7)).view(p.shape) * 0.5)

    def forward(self, ids):
        x = self.embeddings(ids)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def batch(step, rank):
    i = torch.arange(18).view(3, 6)
    return (i * i * (step + 2) + i * (rank + 3) + step) % 11


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def one_process(model, world_size, steps=3, micro_batches=1, optimizer=sgd):
    """The ranks' batches one after the other, their gradients averaged."""
    optimizer = optimizer(model)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for m in range(micro_batches):
            for rank in range(world_size):
                (model(batch(step * micro_batches + m, rank)) / micro_batches).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= world_size
        optimizer.step()
    return model


def perturb(model, rank):
    """Ranks other than 0 start from something else: wrapping has to repair that, in frozen parameters too."""
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            t.copy_(t * (1 + rank))
    return model


def assert_same(ours, theirs):
    """Bit for bit on gloo: the mean of two terms is rounded once, whichever term comes first. NCCL halves them before
    it adds, and a GPU need not take one kernel for all addresses: there a few roundings of weights below 1."""
    limit = 0.0 if dist.get_backend() == "gloo" else 1e-6
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= limit, f"{name} differs by {(p - q).abs().max():.1e}"


def train_ddp(rank, world_size, bucket_mb, micro_batches=1, steps=3, set_to_none=True):
    wrapped = ddp.DDP(perturb(Net(), rank), bucket_mb)
    optimizer = sgd(wrapped)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        for m in range(micro_batches - 1):
            with wrapped.no_sync():
                (wrapped(batch(step * micro_batches + m, rank)) / micro_batches).backward()
        (wrapped(batch((step + 1) * micro_batches - 1, rank)) / micro_batches).backward()
        wrapped.finish_gradient_synchronization()
        optimizer.step()
    return wrapped.module


# ---- equality ----

def check_equal_one_process(rank, world_size, bucket_mb, set_to_none):
    assert_same(train_ddp(rank, world_size, bucket_mb, set_to_none=set_to_none), one_process(Net(), world_size))


@pytest.mark.parametrize("bucket_mb", [0, 100 / 2 ** 20, 25])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_ranks_equal_one_process_bit_for_bit(ranks, bucket_mb, set_to_none):
    ranks(check_equal_one_process, bucket_mb, set_to_none)


def check_functions(rank, world_size):
    for average in (ddp.all_reduce_naive, ddp.all_reduce_flat):
        model = Net()
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad(set_to_none=True)
            model(batch(step, rank)).backward()
            average(model)
            optimizer.step()
        assert_same(model, one_process(Net(), world_size))
    model = ddp.OverlappedDDP(perturb(Net(), rank))
    optimizer = sgd(model)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        model(batch(step, rank)).backward()
        model.finish_gradient_synchronization()
        optimizer.step()
    assert_same(model.module, one_process(Net(), world_size))


def test_naive_flat_and_overlapped_equal_one_process(ranks):
    ranks(check_functions)


def check_fixture(rank, world_size):
    answer = json.loads((FIXTURES / "ddp_torch.json").read_text())["ddp_sgd"]
    model = train_ddp(rank, world_size, 25)
    assert list(answer) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        # 1e-6: other CPUs and versions add the terms of a matrix product in another order. Forgetting to divide by the
        # number of ranks, or a rank's own gradient instead of the mean, is off by 1e-2.
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(answer[name]), rtol=0, atol=1e-6)


def test_known_answer_of_torch_distributed_data_parallel(ranks):
    ranks(check_fixture)


def check_accumulation(rank, world_size):
    ours = train_ddp(rank, world_size, 25, micro_batches=3)
    theirs = one_process(Net(), world_size, micro_batches=3)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)        # six terms, added in another order: some roundings


def test_accumulation_with_no_sync_equals_the_large_batch(ranks):
    ranks(check_accumulation)


# ---- parameters of every kind ----

class Branches(nn.Module):
    """Rank r uses branch r; `never` is used by nobody."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.shared, self.never = nn.Linear(3, 2), nn.Linear(3, 3)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x, i):
        return self.shared(self.branch[i](x)).sum()


def check_unused(rank, world_size, bucket_mb):
    x = torch.ones(1, 3) + rank
    wrapped = ddp.DDP(Branches(), bucket_mb)
    for _ in range(2):                                             # twice: the first must leave nothing behind
        wrapped.zero_grad(set_to_none=True)
        wrapped(x, rank).backward()
        wrapped.finish_gradient_synchronization()
    one = Branches()
    (sum(one(torch.ones(1, 3) + r, r) for r in range(world_size)) / world_size).backward()
    for (name, p), q in zip(wrapped.module.named_parameters(), one.parameters()):
        assert (p.grad is None) == (q.grad is None), f"{name}: {p.grad}, one process has {q.grad}"
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert wrapped.module.never.weight.grad is None


@pytest.mark.parametrize("bucket_mb", [0, 25])
def test_unused_parameters_count_as_zero_and_stay_none_when_nobody_used_them(ranks, bucket_mb):
    ranks(check_unused, bucket_mb)


def check_broadcast(rank, world_size):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
    model[0].weight = nn.Parameter(torch.arange(12.).view(4, 3).T)                  # not contiguous
    model[0].weight.requires_grad_(False)
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))
    want = {k: v.clone() for k, v in model.state_dict().items()}
    if rank:
        with torch.no_grad():
            for t in model.state_dict().values():
                t.logical_not_() if t.dtype == torch.bool else t.add_(rank)
    wrapped = ddp.DDP(model)
    got = [None] * world_size
    dist.all_gather_object(got, {key: value.cpu() for key, value in wrapped.module.state_dict().items()})
    for key in want:
        assert torch.equal(got[0][key], got[1][key]), key
    assert torch.equal(model[0].weight, torch.arange(12.).view(4, 3).T) and model.mask.tolist() == [True, False]
    assert model.scalar.item() == 3


def test_broadcast_covers_frozen_strided_buffers_and_every_dtype(ranks):
    ranks(check_broadcast)


def check_views(rank, world_size):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).to(torch.bfloat16))
    model[0].weight = nn.Parameter(torch.arange(12.).view(4, 3).T)                  # its strides are (1, 3)
    wrapped = ddp.DDP(model, 25)
    assert len(wrapped._buckets) == 2 and {b.buffer.dtype for b in wrapped._buckets} == {torch.float32, torch.bfloat16}
    buffers = [b.buffer.untyped_storage().data_ptr() for b in wrapped._buckets]
    for _ in range(2):
        wrapped.zero_grad(set_to_none=True)
        x = torch.ones(1, 4) * (rank + 1)
        wrapped.module[1](wrapped.module[0](x).bfloat16()).sum().float().backward()
        wrapped.finish_gradient_synchronization()
        for p in model.parameters():
            assert p.grad.untyped_storage().data_ptr() in buffers, "copied out of its bucket"
            assert p.grad.stride() == p.stride()
    # d/dW of sum(V (W x + b)) = (column sums of V) x^T, x = 1.5 on average
    columns = model[1].weight.detach().float().sum(0)
    want = (columns[:, None] * 1.5).expand(3, 4)
    torch.testing.assert_close(model[0].weight.grad, want, rtol=1e-2, atol=1e-2)   # bf16 keeps 8 bits
    assert model[1].weight.grad.dtype == torch.bfloat16


def test_gradients_are_views_into_buckets_of_their_own_dtype_and_strides(ranks):
    ranks(check_views)


def test_buckets_fill_in_reverse_order_and_respect_their_size():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(5)])         # 256 bytes each
    names = lambda size: [[name for name, _ in bucket] for bucket in ddp.assign_buckets(model, size)]
    assert names(0) == [["4.weight"], ["3.weight"], ["2.weight"], ["1.weight"], ["0.weight"]]
    assert names(512) == [["4.weight", "3.weight"], ["2.weight", "1.weight"], ["0.weight"]]
    assert names(511) == names(0)
    assert names(1e9) == [["4.weight", "3.weight", "2.weight", "1.weight", "0.weight"]]


def check_overlap(rank, world_size):
    wrapped = ddp.DDP(Net(), bucket_mb=0)
    launched = []
    launch = wrapped._launch
    wrapped._launch = lambda: (launched.append(wrapped._next), launch())[1]
    wrapped(batch(0, rank)).backward()
    during = len(launched)
    wrapped.finish_gradient_synchronization()
    assert during == len(launched) == len(wrapped._buckets), "an all-reduce waited for the end of backward"
    assert launched == sorted(launched)


def test_all_reduces_leave_during_backward_in_one_order(ranks):
    ranks(check_overlap)


def check_ring(rank, world_size):
    for count in (0, 1, 2, 5, 8):
        parts = [torch.arange(float(count)) * (r + 1) + r for r in range(world_size)]
        sent = ddp.ring_all_reduce(x := parts[rank].clone())
        assert torch.equal(x, sum(parts))
        padded = -(-count // world_size) * world_size
        assert sent == 2 * (world_size - 1) * padded * 4 // world_size
    return True


def test_ring_all_reduce_sums_and_sends_what_the_bound_says(ranks):
    ranks(check_ring)


# ---- mistakes ----

def check_mistakes(rank, world_size):
    wrapped = ddp.DDP(Net())
    wrapped(batch(0, rank)).backward()
    with pytest.raises(ValueError, match="finish_gradient_synchronization"):
        wrapped(batch(0, rank))
    wrapped.finish_gradient_synchronization()
    first, second = wrapped(batch(0, rank)), wrapped(batch(1, rank))
    first.backward()
    with pytest.raises(ValueError, match="no_sync"):
        second.backward()
    wrapped.finish_gradient_synchronization()
    with pytest.raises(ValueError, match="bucket_mb"):
        ddp.DDP(Net(), -1)
    with pytest.raises(ValueError, match="differ"):                # says so on both ranks, instead of hanging on one
        ddp.DDP(nn.Linear(3, 2 + rank))
    sparse = ddp.DDP(nn.Embedding(4, 2, sparse=True))
    with pytest.raises(ValueError, match="sparse"):
        sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="meta"):
        ddp.DDP(nn.Linear(2, 2, device="meta"))


def test_mistakes_are_named(ranks):
    ranks(check_mistakes)


def test_without_a_process_group():
    with pytest.raises(ValueError, match="torchrun"):
        ddp.DDP(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="RANK"):
        ddp.init_distributed()


def die_in_the_middle(rank, world_size):
    wrapped = ddp.DDP(Net())
    loss = wrapped(batch(0, rank))
    if rank == 1:
        os.kill(os.getpid(), 9)
    loss.backward()
    wrapped.finish_gradient_synchronization()


def test_a_killed_rank_ends_the_job_with_its_number():
    with pytest.raises(Exception, match="process 1 terminated with signal SIGKILL"):
        ddp.spawn(die_in_the_middle, 2)


def fail_on_one(rank, world_size):
    if rank == 1:
        raise AssertionError("of rank one")
    dist.barrier()                                                     # ends when the other rank's end has gone


def test_a_rank_that_fails_is_named_before_the_one_that_waits_for_it(capfd):
    with pytest.raises(Exception, match="process 1 terminated with exit code 1"):
        ddp.spawn(fail_on_one, 2)
    assert "AssertionError: of rank one" in capfd.readouterr().err


def leave_traces(rank, world_size, folder):
    atexit.register(Path(folder, f"interpreter {rank}").touch)         # what the interpreter does when it ends
    Path(folder, f"work {rank}").touch()


def test_a_rank_does_not_end_through_the_interpreter(tmp_path):
    """There gloo's threads, which torch._dynamo keeps alive, ask for a lock that is gone, and abort the process."""
    ddp.spawn(leave_traces, 2, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["work 0", "work 1"]


def test_a_process_without_a_group_ends_as_its_work_does():
    """`train.py compare --parallel ddp` joins no job; what was printed without a line's end arrives all the same."""
    for code, line in ((0, "import ddp as module"), (3, "import sharded_optim as module")):
        line += f"; module.run_rank(lambda: print('written', end='') or {code})"
        done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
        assert (done.returncode, done.stdout, done.stderr) == (code, "written", "")


def test_ranks_meet_in_a_store_full_of_the_dead():
    """Two starts that died at any stage have left greetings, answers and a name that was agreed on."""
    store = dist.HashStore()
    for r, greeting in ((1, "dead"), (2, "dead too")):
        store.set(f"greeting {r}", greeting)
    store.set("answer to dead", "old"), store.set("old met 1", ""), store.set("old met 2", "")
    with ThreadPoolExecutor(3) as pool:
        for start in range(3):
            names = [pool.submit(ddp._meet, store, rank, 3, PATIENCE) for rank in (0, 2, 1)]
            names = {name.result() for name in names}
            assert len(names) == 1 and not names & {"old", "dead", "dead too"}
    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not come"):
        ddp._meet(store, 0, 2, 0.0)


def test_command_line():
    run = lambda *args, **env: subprocess.run([sys.executable, str(ROOT / "ddp.py"), *args], capture_output=True,
                                              text=True, env={**os.environ, **env}, timeout=PATIENCE)
    explained = run()
    assert explained.returncode == 0, explained.stderr
    assert "bit for bit" in explained.stdout and "bucket 0 leaves" in explained.stdout
    wrong = run("--bench", RANK="0")
    assert wrong.returncode == 2 and "torchrun" in wrong.stderr and "Traceback" not in wrong.stderr


def ended(monkeypatch, capsys, module, *flags):
    """The exit code and the last line of what a file's main() says of a mistake, without a process of its own."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *flags])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("flags", [["--width", "0"], ["--batch", "-1"], ["--repeats", "0"], ["--max-mb", "0"],
                                   ["--link-gb-s", "nan"]], ids=" ".join)
def test_sizes_that_cannot_be_are_refused(monkeypatch, capsys, flags):
    code, lines = ended(monkeypatch, capsys, ddp, "--bench", *flags)
    assert code == 2 and f"{flags[0]} must be above 0, got {flags[1]}" in lines[-1]


def test_the_bench_takes_any_width():
    assert ddp._transformer(400, 1, 11, torch.float32, torch.device("cpu"))[1].self_attn.num_heads == 1
    assert ddp._transformer(384, 1, 11, torch.float32, torch.device("cpu"))[1].self_attn.num_heads == 3


def pretend_two_gpus(monkeypatch):
    """torchrun has started four ranks on this host, and this is one of the two that have no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in dict(RANK="6", LOCAL_RANK="2", WORLD_SIZE="8", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)


def test_more_ranks_than_gpus_is_one_line(monkeypatch, capsys):
    pretend_two_gpus(monkeypatch)
    code, lines = ended(monkeypatch, capsys, ddp, "--bench")
    assert code == 2 and len(lines) == 1
    assert "rank 2 has no GPU" in lines[0] and "this host has 2; lower --nproc-per-node" in lines[0]


def test_imports_no_sibling_and_does_nothing_when_imported():
    tree = ast.parse((ROOT / "ddp.py").read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names <= set(sys.stdlib_module_names) | {"torch"}
