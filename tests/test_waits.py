"""How often a step waits for the device, copies to it that do among it: once, in every mode, family and objective."""

from copy import deepcopy

import pytest
import torch

from heads.policy import HEADS, LEARNABLE, RULES, PolicyHeads, build_rules
from models.mar import MAR
from models.tokenizers.continuous import Tokenizer
from sampling.loop import generate
from scripts.bench_training import random_batch
from tests.helpers import named_weights, tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_device import DEVICE, pretended
from tests.helpers_maskgil import tiny_maskgil
from tests.helpers_var import tokenizer as scales_tokenizer
from tests.test_var import tiny as tiny_var
from training.build import new_state
from training.config import resolve
from training.objectives import OBJECTIVES
from training.step import foresee, training_step

SELECT = "sampling/canvas.py:select"
FAMILIES = {
    "mar": lambda: tiny_mar(img_size=8),
    "ids": lambda: tiny_mar(img_size=8, loss="ce", vocab_size=16),
    "mar_ar": lambda: tiny_ar("diffusion"),
    "causal_gpt": tiny_gpt,
    "maskgil": tiny_maskgil,
    "var": tiny_var,
}
# once a batch it is read how far raster order goes
ONCE = {"mar_ar": {"models/kv_cache.py:__init__": 1}, "causal_gpt": {"models/kv_cache.py:raster_only": 1}}
FLAGS = dict(order="order", group="group", tau="tau_schedule", cfg="cfg_schedule", profile="cfg_profile")


@pytest.fixture
def waits(monkeypatch):
    with pretended(monkeypatch) as counter:
        yield counter


def batch(waits, name: str, mode: str, form: str = "knots", refresh_every: int = 1, **overrides) -> tuple[dict, int]:
    """(The waits of a batch, its steps) of a family's model under rules with heads that say something."""
    model = FAMILIES[name]().to(DEVICE)
    learn = LEARNABLE if form == "knots" and not model.token_head.discrete else HEADS
    heads = PolicyHeads(model.width, learn, form=form, tau_mode="token", cfg_mode="token")
    heads = named_weights(heads, scale=0.1).to(DEVICE)
    rules = build_rules(mode, heads, cfg=2.0, **{**overrides, **model.fixed_rules})
    options = (
        {"tokenizer": deepcopy(scales_tokenizer()).to(DEVICE)} if name == "var" else {"refresh_every": refresh_every}
    )
    num_iter, steps = 4 if name in ("mar", "ids", "maskgil") else None, []
    options |= dict(callback=lambda step, *rest: steps.append(step))
    waits.clear()
    generate(model, torch.tensor([0, -1]), rules, num_iter, 2, seeds=[1, 2], **options)
    return dict(waits), len(steps)


@pytest.mark.parametrize(
    "name, mode",
    [
        *[(name, mode) for name in ("mar", "ids") for mode in ("baseline", "policy", "guidance", "both")],
        *[(name, mode) for name in ("maskgil", "var") for mode in ("baseline", "both")],
        *[("mar_ar", "guidance"), ("causal_gpt", "both")],
    ],
)
def test_sampling(name, mode, waits):
    counted, steps = batch(waits, name, mode)
    assert steps > 1 and counted == {SELECT: steps} | ONCE.get(name, {})


@pytest.mark.parametrize("form, refresh_every", [("bounded", 1), ("bounded", 3), ("knots", 3)])
def test_sampling_with_other_heads_and_between_whole_passes(form, refresh_every, waits):
    counted, steps = batch(waits, "mar", "both", form, refresh_every)
    assert counted == {SELECT: steps}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind, (rules, *_) in RULES.items() for name in rules if name not in ("schedule", "confidence")],
)
def test_hand_made_rules(kind, name, waits):
    """By themselves, and as what a learned rule moves."""
    counted, steps = batch(waits, "mar", "baseline", **{FLAGS[kind]: name})
    assert counted == {SELECT: steps}
    if kind == "cfg":
        counted, steps = batch(waits, "mar", "both", cfg_base=name)
        assert counted == {SELECT: steps}


def test_schedules_of_values(waits):
    """τ and w of each step, and where learned ones move them."""
    values = '{"group": [0.2, 0.5, 0.8, 1.0], "tau": [1.0, 0.9], "cfg": [1.0, 2.0], "profile": [0.5, 1.0]}'
    for mode in ("baseline", "both"):
        counted, steps = batch(waits, "mar", mode, schedule=values)
        assert counted == {SELECT: steps}


class Gaussian(Tokenizer):
    """Latents with a posterior; the moments are those of a cache."""

    def __init__(self):
        super().__init__("pixel", stride=1, channels=1, image_channels=1, gaussian=True)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(accum_iter=2),
        dict(learn="order,group,tau,cfg", train_num_iter="2,4"),
        dict(learn="tau,cfg", tau_mode="token", cfg_mode="token", train_num_iter="4,8", group_base="staged"),
        dict(train_masks="visited", order="halton", train_targets="next"),
    ],
    ids=["plain", "accumulated", "heads", "token heads", "visited masks"],
)
def test_a_training_step(flags, waits):
    """Of moments that have a posterior; without other flags of images too. Both may be mirrored."""
    for cached in (True, False) if not flags else (True,):
        train(waits, cached, flags)


def train(waits, cached: bool, flags: dict) -> None:
    small = dict(patch_size=2, diffloss_w=16, diffloss_d=1, buffer_size=2, diffusion_batch_mul=2)
    config = resolve(dict(preset="digits", batch_size=8) | small | flags)
    model = MAR(config.model.build()).to(DEVICE)
    heads = config.build_heads(model.width)
    objective = OBJECTIVES["token"].build(model, heads and heads.to(DEVICE), config.for_objective(flip=True))
    tokenizer = (Gaussian() if cached else Tokenizer("pixel", stride=1, channels=1, image_channels=1)).to(DEVICE)
    tokenizer._moments = lambda images: images
    state = new_state(objective, tokenizer, config.train, torch.float32)
    state.wrapped.train()
    images, labels, indices = random_batch(model.config, 8)
    if not cached:
        images = torch.zeros(8, 1, *images.shape[3:], dtype=torch.uint8)
    for step in range(3):
        if step == 1:
            waits.clear()
        foresee(state, images, indices, config.train.accum_iter)
        training_step(state, images, labels, indices, lr=1e-3, config=config.train)
    assert waits == {"training/step.py:training_step": 2}
