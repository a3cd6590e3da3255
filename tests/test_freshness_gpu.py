"""The checksum is the same number on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch

from fluxfire.kernels import checksum
from fluxfire.runtime.freshness import Watch

pytestmark = pytest.mark.gpu

SHAPES = [
    (), (0,), (1,), (3,), (4096,), (32768,), (32769,), (40000,), (64, 64), (3072, 64), (300, 700),
    (20000, 8), (33000, 2), (40000, 6), (1, 40000), (2, 300, 500), (4, 4, 3, 3), (512, 256, 3, 3),
    (512, 512, 1, 1), (0, 5),
]  # fmt: skip
DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool,
    torch.int64, torch.uint8,
]  # fmt: skip


def numbers(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator) * 50
    return made.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_has_the_sum_of_the_cpu(dtype):
    tensors = [numbers(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    last = numbers((512, 256, 3, 3), dtype)
    tensors += [last.contiguous(memory_format=torch.channels_last), last[:, ::2], last[3:]]
    tensors += [numbers((300, 700), dtype).t(), numbers((301,), dtype)[1:]]
    on_gpu = []
    for tensor in tensors:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cuda")
        on_gpu.append(twin.copy_(tensor))
    expected = checksum.of(tensors)
    assert checksum.of(on_gpu) == expected
    assert [checksum.of([tensor])[0] for tensor in on_gpu] == expected
    assert len(set(expected)) > len(expected) // 2


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_view_that_begins_within_a_word(offset):
    whole = numbers((5000,), torch.bfloat16)
    for length in (4096, 4098):
        cpu, gpu = whole[offset:][:length], whole.cuda()[offset:][:length]
        assert checksum.of([gpu]) == checksum.of([cpu])


def test_one_number_on_the_gpu_is_seen():
    tensor = numbers((128, 256), torch.float32).cuda()
    before = checksum.of([tensor])
    for index in range(0, tensor.numel(), 997):
        tensor.view(-1)[index] += 1
        assert checksum.of([tensor]) != before
        tensor.view(-1).copy_(numbers((128, 256), torch.float32).view(-1))
    assert checksum.of([tensor]) == before


def test_pinned_tensors_are_read_by_the_gpu():
    torch.ones(1, device="cuda")
    tensor = numbers((3072, 1024), torch.bfloat16).pin_memory()
    before = checksum.of([tensor])
    assert checksum.of([tensor]) == before
    tensor.mul_(2)
    assert checksum.of([tensor]) != before


def test_weights_that_moved_are_the_same():
    net = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Conv2d(8, 8, 3))
    watch = Watch([net])
    assert not watch.changed()
    for device in ("cuda", "cpu", "cuda"):
        net.to(device)
        assert not watch.changed()
    net[0].weight.data[7] += 1
    assert watch.changed()
