"""Masters that two processes share take the steps of one process, to the bit where sums of two are the same in any order."""

import pytest

from qlora.data import dealt_out
from tests.training.test_processes import Started

SCRIPT = """
import torch
import torch.distributed as dist
from bitsandbytes.optim import AdamW8bit
from qlora.kernels import groups
from qlora.runs.checkpoints import optimizer_state
from qlora.system.errors import TrainingFailed
from qlora.training.master_weights import MasterWeights
from qlora.training.processes import Processes
from qlora.training.shared_masters import SharedMasters

dist.init_process_group("gloo")
ours = Processes(dist.get_rank(), dist.get_world_size(), sharded=True)
groups.SENT = 10_000  # several pieces
SHAPES = [(64, 128), (128, 64), (8, 5), (3,), (70, 60), (2, 2)]  # of the first and fifth 8-bit states, of others 32-bit ones
NOBODY, OF_ONE = 3, 4


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]


def gradients(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    made = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    made[NOBODY] = None
    if rank != 1:
        made[OF_ONE] = None
    return made


def step(masters, optimizer, number, ranks):
    for rank in ranks:
        for parameter, gradient in zip(masters.everything, gradients(number, rank), strict=True):
            parameter.grad = gradient
        masters.take_gradients()
        assert all(parameter.grad is None for parameter in masters.everything)
    ours.sum_gradients(masters) if isinstance(masters, SharedMasters) else None
    norm = masters.clip_gradients(1e9)
    optimizer.step()
    masters.give_weights()
    masters.clear_gradients()
    return norm


names = [f"tensor {at}" for at in range(len(SHAPES))]
alone, shared = MasterWeights(parameters()), SharedMasters(parameters(), [None] * len(SHAPES), ours)
assert 0 < len(shared.masters) < len(SHAPES)
optimizers = [AdamW8bit([{"params": one.masters}], lr=0.1, min_8bit_size=4096) for one in (alone, shared)]
for number in range(3):
    whole = step(alone, optimizers[0], number, range(ours.count))
    norm = step(shared, optimizers[1], number, [ours.rank])
    torch.testing.assert_close(norm, whole)
for one, other in zip(alone.everything, shared.everything, strict=True):
    assert torch.equal(one, other)
expected = optimizer_state(optimizers[0], names)
found = shared.collected(*optimizer_state(optimizers[1], [names[at] for at in shared.mine]))
if ours.is_first:
    assert found[0].keys() == expected[0].keys() and found[1] == expected[1]
    assert any(tensor.dtype == torch.uint8 for tensor in found[0].values())
    assert not any(name.startswith(names[NOBODY]) for name in found[0])
    assert all(torch.equal(found[0][name], tensor) for name, tensor in expected[0].items())

# a gradient that is not finite is in the norm of all, and scaled down it is the same in all
shared.everything[shared.owners.index(1)].grad = torch.full(SHAPES[shared.owners.index(1)], float("nan"), dtype=torch.bfloat16)
shared.take_gradients()
assert shared.clip_gradients(1.0).isnan()

# more processes than parameters: one has nothing, and all go on
few = SharedMasters(parameters()[:1], [None], ours)
assert len(few.masters) == (ours.rank == 0)
optimizer = AdamW8bit([{"params": few.masters}], lr=0.1, min_8bit_size=4096)
before = few.everything[0].clone()
few.everything[0].grad = gradients(0, ours.rank)[0]
few.take_gradients()
ours.sum_gradients(few)
assert few.clip_gradients(1.0) > 1
few.multiply_gradients(1.0)
optimizer.step()
few.give_weights()
assert not torch.equal(few.everything[0], before)
found, _ = few.collected(*optimizer_state(optimizer, ["the one"][: len(few.masters)]))
assert bool(found) == ours.is_first

# what one process alone finds wrong ends all
try:
    with ours.failing_together():
        if ours.rank == 1:
            raise TrainingFailed("it does not move")
except TrainingFailed as error:
    assert str(error) == "it does not move"
else:
    raise AssertionError
"""


@pytest.mark.parametrize("count", [2])
def test_shared_masters_take_the_steps_of_whole_ones(tmp_path, count):
    script = tmp_path / "steps.py"
    script.write_text(SCRIPT)
    ended = Started(script, count=count, before=()).finish()
    assert [code for code, *_ in ended] == [0] * count, ended


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parameters_are_dealt_out_evenly(count):
    sizes = [16 * width for width in (4096, 4096, 1024, 14336, 4096, 11008) for _ in range(16)] + [7]
    owners = dealt_out(sizes, count)
    held = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == one) for one in range(count)]
    assert sum(held) == sum(sizes)
    assert max(held) - min(held) <= max(sizes)
    assert dealt_out([5], count).tolist() == [0]  # one has all
