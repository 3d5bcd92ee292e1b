"""Two processes under ``DistributedDataParallel`` whose samples enter different blocks: gradients are the average."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import e2pass
from tests.runtime.test_slu import config, residual_mlp

rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
t = e2pass.transform(residual_mlp(2), torch.randn(4, 12), config=config("learned", inject=False))
slu = t.model.e2_slu
parallel = DistributedDataParallel(t.model, broadcast_buffers=False)
found = []
for step, kind in enumerate(("learned", "open", "closed", "learned")):  # a missing gradient fails the step after it
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(4, 12, generator=generator)
    slu.price.fill_(4.0 if rank == 0 else -4.0)
    slu.kind = kind
    t.reset_stats()
    parallel.zero_grad()
    parallel(x).square().sum().backward()
    mean = {n: p.grad.clone() for n, p in t.model.named_parameters()}
    weight = t.unwrap()
    if t.stats()["slu"]["skip_ratio"] == 1.0:  # without the blocks
        out = weight[3](weight[0](x))
    else:
        assert t.stats()["slu"]["skip_ratio"] == 0.0
        out = weight(x)
    out.square().sum().backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in weight.parameters()]
    flat = torch.cat([g.flatten() for g in own])
    torch.distributed.all_reduce(flat)
    ours = torch.cat([mean[n].flatten() for n, _ in weight.named_parameters()])
    found.append([float((ours - flat / 2).abs().max() / flat.abs().max()), t.stats()["slu"]["skip_ratio"]])
torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


def test_blocks_that_one_process_enters_and_the_other_does_not() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port], cwd=root, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    skipped = []
    for output in outputs:
        results = json.loads(output.splitlines()[-1])
        assert all(difference < 1e-5 for difference, _ in results)
        skipped.append([ratio for _, ratio in results])
    assert skipped == [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
