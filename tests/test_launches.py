"""What a batch asks a GPU for once its passes and draws are captured: operations beside replays, counted."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heads.policy import LEARNABLE, PolicyHeads, build_rules
from models.low_precision import prepare
from sampling.loop import generate
from tests.helpers import named_weights, tiny_mar
from tests.helpers_device import DEVICE, launches_nothing, pretended
from tests.helpers_graphs import PlainCalls
from util import dist, graphs

CPU = torch.device("cpu")
LABELS, STEPS = torch.tensor([0, 2, -1]), 4


class Operations(TorchDispatchMode):
    """Counts the operations inside that compute something, each a kernel on a GPU or more."""

    launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.launches += not launches_nothing(function)
        return function(*args, **(kwargs or {}))


def launched(monkeypatch, mode: str, num_steps: int, **options) -> Counter:
    """The launches of a batch of 4 steps; "replay" counts those of captures, whatever they hold."""
    with pretended(monkeypatch, launches=True) as launches:

        class Replays(PlainCalls):
            def replay(self):
                before = launches.copy()
                result = super().replay()
                launches.clear()
                launches.update(before + Counter(replay=1))
                return result

        monkeypatch.setitem(graphs.CAPTURES, DEVICE.type, Replays)
        model = tiny_mar(img_size=8).to(DEVICE)
        heads = named_weights(PolicyHeads(16, LEARNABLE, form="knots"), scale=0.1).to(DEVICE)
        rules = build_rules(mode, heads, cfg=2.0)
        for _ in range(3):  # the passes of the second are captured, of the third replays
            launches.clear()
            generate(model, LABELS, rules, STEPS, num_steps, seeds=[1, 2, 3], clip=(-2.0, 2.0), **options)
        return launches


@pytest.mark.parametrize("mode, most, refresh_every", [("baseline", 80, 1), ("both", 230, 1), ("both", 230, 3)])
def test_a_step_launches_a_few_operations(mode, most, refresh_every, monkeypatch):
    """A whole pass with label, one without and a draw are one replay each; a partial pass is one for both."""
    launches = launched(monkeypatch, mode, 2, refresh_every=refresh_every)
    assert launches["replay"] == (3 * STEPS if refresh_every == 1 else 3 * 2 + 2 * 2)
    assert launches.total() - launches["replay"] <= most * STEPS


def test_however_many_diffusion_steps_it_takes(monkeypatch):
    few, many = (launched(monkeypatch, "both", n, refresh_every=3) for n in (2, 5))
    assert few == many


@pytest.mark.parametrize("dtype, most", [(torch.float32, 81), (torch.bfloat16, 57)])
def test_a_diffusion_step_is_few_operations(dtype, most):
    """Of a head as deep as MAR-B's, guided, ancestral; products and all else."""
    model = tiny_mar(diffloss_d=6)
    prepare(model, dtype)
    sampler, z = model.token_head.sampler, torch.randn(3, 16)

    def operations(num_steps: int) -> int:
        noise, w = torch.randn(num_steps + 1, 3, model.token_head.channels), torch.full((3,), 2.0)
        with torch.no_grad(), dist.autocast(CPU, dtype), Operations() as operations:
            sampler(num_steps=num_steps).draw(z, z, w, torch.ones(3), noise, num_steps)
        return operations.launches

    for _ in range(2):  # the first time tables are made
        few, many = operations(3), operations(4)
    assert many - few == most
