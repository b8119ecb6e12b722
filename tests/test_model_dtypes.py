"""Labels of any whole type, and a model in another dtype than float32: both sample like the model that they are of."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from heads.policy import PolicyHeads, build_rules
from models.diffloss import SimpleMLPAdaLN, TimestepEmbedder
from sampling.loop import generate
from tests.helpers import randn, tiny_mar
from tests.helpers_causal import tiny_ar, tiny_gpt
from tests.helpers_generate import LABELS, SEEDS, SIDE, rules_of

OPTIONS = dict(num_iter=4, seeds=SEEDS, num_steps=5, clip=(-2.0, 2.0))
# dtype -> how far its latents may be from those of float32, on average; they are in [-2, 2]
DTYPES = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-5}


@pytest.fixture
def mar():
    return tiny_mar(img_size=SIDE)


# ------------------------------------------------------------------------------------------------------------ labels

NUMBERS = [0, 2, 1]
WHOLE = {
    str(dtype): torch.tensor(NUMBERS, dtype=dtype) for dtype in (torch.int8, torch.int16, torch.int32, torch.uint8)
}
WHOLE |= {str(dtype): torch.tensor(NUMBERS).to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)}
WHOLE |= {name: np.array(NUMBERS, dtype=name) for name in ("int8", "uint8", "int16", "uint16", "int32", "int64")}
WHOLE |= {"list": NUMBERS, "tuple": tuple(NUMBERS), "numpy numbers": list(np.array(NUMBERS, np.int16))}


@pytest.mark.parametrize("labels", WHOLE.values(), ids=WHOLE)
def test_whole_numbers_of_any_type_are_labels(labels, mar):
    expected = generate(mar, torch.tensor(NUMBERS), rules_of(cfg=2.0), **OPTIONS)
    assert torch.equal(generate(mar, labels, rules_of(cfg=2.0), **OPTIONS), expected)


BAD = {
    "float": (torch.tensor([0.0, 2.0, 1.0]), "whole numbers, got float32"),
    "half": (torch.tensor([0.0, 2.0, 1.0]).half(), "whole numbers, got float16"),
    "list of floats": ([0.0, 2.0, 1.0], "whole numbers, got float32"),
    "numpy floats": (np.array([0.5, 1.0, 2.0]), "whole numbers, got float64"),
    "bool": (torch.tensor([True, False, True]), "whole numbers, got bool"),
    "complex": (torch.tensor([1j, 0, 2]), "whole numbers, got complex64"),
    "number": (1, "one number for each image, at least one, got shape ()"),
    "0-dim": (torch.tensor(1), "one number for each image, at least one, got shape ()"),
    "float number": (1.5, "one number for each image, at least one, got shape ()"),
    "empty": ([], "one number for each image, at least one, got shape (0,)"),
    "table": ([[0, 1, 2]], "one number for each image, at least one, got shape (1, 3)"),
    "None": (None, "one whole number for each image, got None"),
    "text": ("012", "one whole number for each image, got 012"),
    "texts": (["0", "2"], "one whole number for each image, got ['0', '2']"),
    "ragged": ([[0], [1, 2]], "one whole number for each image, got [[0], [1, 2]]"),
    "large": (torch.tensor([0, 3, 1], dtype=torch.uint8), "between -1 and 2, got 3"),
    "below": (torch.tensor([0, -2, 1], dtype=torch.int8), "between -1 and 2, got -2"),
    "wrapping": (np.array([0, 2**64 - 1, 1], dtype=np.uint64), "between -1 and 2, got 3"),
}


@pytest.mark.parametrize("labels, words", BAD.values(), ids=BAD)
def test_other_labels_are_one_error(labels, words, mar):
    with pytest.raises(ValueError) as error:
        generate(mar, labels, rules_of(), **OPTIONS)
    assert str(error.value).startswith("labels must be ") and words in str(error.value)


# ------------------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_sde"])
@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_samples_in_its_own_dtype(dtype, cfg, refresh_every, solver, mar, monkeypatch):
    options = dict(OPTIONS, refresh_every=refresh_every, solver=solver)
    expected = generate(mar, LABELS, rules_of(cfg=cfg), **options)
    seen, timesteps, forward, embed = set(), set(), SimpleMLPAdaLN.forward, TimestepEmbedder.forward

    def watched(net, x, time, condition):
        out = forward(net, x, time, condition)
        seen.add((x.dtype, time.dtype, condition.dtype, out.dtype))
        return out

    monkeypatch.setattr(SimpleMLPAdaLN, "forward", watched)
    monkeypatch.setattr(TimestepEmbedder, "forward", lambda net, t: timesteps.add(t.dtype) or embed(net, t))
    made = generate(mar.to(dtype), LABELS, rules_of(cfg=cfg), **options)
    assert seen == {(torch.float32, dtype, dtype, dtype)} and timesteps == {torch.float32}  # x and t stay float32
    assert made.dtype == torch.float32 and made.isfinite().all()
    assert (made - expected).abs().mean() < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_rules_and_editing_work_in_any_dtype(dtype, mar):
    mar, heads = mar.to(dtype), PolicyHeads(16)
    assert generate(mar, LABELS, build_rules("both", heads, cfg=2.0), **OPTIONS).isfinite().all()
    known, mask = randn(3, SIDE**2, 1).to(dtype), torch.zeros(3, SIDE**2, dtype=torch.bool)
    mask[0, 2:], mask[1, 4:] = True, True
    made = mar.patchify(generate(mar, LABELS, rules_of(cfg=2.0), **OPTIONS, tokens=known, mask=mask))
    assert torch.equal(made[~mask], known[~mask].float())


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("z_dtype", [torch.float32, *DTYPES])
def test_the_token_head_takes_z_in_any_dtype(dtype, z_dtype, mar):
    z, free, noise = randn(4, 16), randn(4, 16, seed=1), randn(6, 4, 1, seed=2)
    options = dict(num_steps=5, noise=noise, clip=(-2.0, 2.0))
    expected = mar.diffloss.sample(z, free, cfg=2.0, **options)
    cfg = torch.full((4,), 2.0, dtype=torch.float64)
    made = mar.diffloss.to(dtype).sample(z.to(z_dtype), free.to(z_dtype), cfg=cfg, tau=cfg / 2, **options)
    assert made.dtype == torch.float32
    worst = max(DTYPES.get(d, 0) for d in (dtype, z_dtype))
    assert (made - expected).abs().mean() <= worst


@pytest.mark.parametrize("model", [tiny_ar("ce"), tiny_ar("diffusion"), tiny_gpt()], ids=["ids", "latents", "gpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_causal_model_keeps_its_cache_in_its_dtype_and_an_image_is_the_same_in_any_batch(dtype, model):
    """Guided, so that both caches are there."""
    model = deepcopy(model).to(dtype)
    rules, options = build_rules("baseline", **model.fixed_rules, cfg=2.0), dict(num_steps=3, clip=(-2.0, 2.0))
    conditions, original = [], model.conditions

    def noted(*args, **kwargs):
        conditions.append(original(*args, **kwargs))
        return conditions[-1]

    model.conditions = noted
    together = generate(model, LABELS, rules, seeds=SEEDS, **options)
    caches = conditions[0].caches
    assert {part.dtype for cache in caches for pair in cache.stores.values() for part in pair} == {dtype}
    assert len(caches) == 2 and all(cache.stores for cache in caches) and together.float().isfinite().all()
    alone = torch.cat(
        [generate(model, LABELS[i, None], rules, seeds=[SEEDS[i]], **options) for i in range(len(LABELS))]
    )
    if model.token_head.discrete:
        assert torch.equal(together, alone)
    else:
        assert (together - alone).abs().mean() < 0.1
