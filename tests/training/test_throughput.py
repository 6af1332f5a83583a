"""Tokens per second and memory, as a run logs them."""

import torch
from accelerate import Accelerator

from training.throughput import Throughput, peak_memory


def test_tokens_since_the_last_reading():
    times = iter([10.0, 12.0, 16.0])
    throughput = Throughput(Accelerator(cpu=True), clock=lambda: next(times))
    assert "tokens_per_second" not in throughput.read()
    throughput.count(torch.tensor([[1, 1, 1], [1, 0, 0]]))  # starts the clock
    throughput.count(torch.ones(2, 3))
    assert throughput.read()["tokens_per_second"] == 10 / 2
    throughput.count(torch.ones(1, 8))
    assert throughput.read()["tokens_per_second"] == 8 / 4


def test_the_peak_covers_what_was_freed():
    before = peak_memory()
    size = 2 * before
    block = torch.ones(size, dtype=torch.uint8)  # touched: resident
    del block
    assert peak_memory() >= size
