"""ddp.py against one process, against torch's own DDP (a fixture), and against callers' mistakes, on two gloo ranks."""
import ast
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

import ddp

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(ddp.__file__).resolve().parent


# ---- two processes that stay for a whole file, so that torch is imported once a rank ----

def _serve(rank, world_size, path, connection):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size,
                            timeout=timedelta(seconds=60))
    while (job := connection.recv()) is not None:
        function, args = job
        try:
            connection.send((True, function(rank, world_size, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """ranks(f, *args) calls f(rank, world_size, *args) on every rank and returns the list of their results."""

    def __init__(self, world_size=2):
        self.world_size, self.processes = world_size, []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(self.world_size)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [context.Process(target=_serve, daemon=True,
                                          args=(r, self.world_size, os.path.join(self.folder.name, "meet"), theirs))
                          for r, (_, theirs) in enumerate(pipes)]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args):
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results, deadline = [None] * self.world_size, time.monotonic() + 90
        waiting = set(range(self.world_size))
        while waiting:
            for r in list(waiting):
                if self.connections[r].poll(0.005):
                    ok, results[r] = self.connections[r].recv()
                    waiting.discard(r)
                    if not ok:
                        self.stop()                                    # the other rank may be waiting for this one
                        pytest.fail(f"rank {r}:\n{results[r]}")
            if time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"ranks {sorted(waiting)} gave no answer for 90 s")
        return results

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks()
    yield pool
    pool.stop()
