"""Numbers that are not finite, and pictures that show nothing: drawn again, counted, named."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import sample
from heads.policy import PolicyHeads, build_rules
from models.coding import render
from models.low_precision import prepare
from models.tokenizers import build_tokenizer
from sampling.guards import draw_finite, is_plain
from sampling.loop import generate
from sampling.run import sample_images
from sampling.settings import SampleConfig
from tests.helpers import named_weights, on_cpu, randn, tiny_mar, untrained
from tests.helpers_heads import OF_LATENTS
from tests.helpers_ids import GreyIds, tiny_ids
from tests.test_low_precision import FAMILIES, drawn
from training.objectives.decisions import ExpectedCost
from util.images.pictures import read_png
from util.rng import image_seeds

CPU = torch.device("cpu")


def draw(folder, monkeypatch, dtype=torch.bfloat16, explodes=(), in_float32=(), plain=(), batch_size=3, **options):
    """sample_images of 7 images, some of whose tokens become infinite in low precision, or in float32 too."""
    passes = []

    def exploding(mar, labels, rules, *args, seeds, **more):
        low = torch.is_autocast_enabled("cpu")
        latents = generate(mar, labels, rules, *args, seeds=seeds, **more)
        numbers = [(seed - first) % 2**32 for seed in seeds]
        passes.append((numbers, low))
        for row, i in enumerate(numbers):
            if i in (explodes if low else in_float32):
                latents[row, 0, 2, 3] = float("nan") if i % 2 else float("inf")
            if i in plain:
                latents[row] = -1
        return latents

    (first,) = image_seeds(5, [0])
    monkeypatch.setattr("sampling.run.generate", exploding)
    sampling = SampleConfig(num_iter=3, num_sampling_steps=2, cfg=2.0)
    labels = [i % 3 for i in range(7)]
    parts = on_cpu(tiny_mar(), build_tokenizer("pixel", channels=1), dtype=dtype)
    found = sample_images(parts, sampling, labels, 5, folder, batch_size=batch_size, **options)
    return found, [read_png(folder / f"{i}.png") for i in range(7)], passes


def test_what_explodes_in_low_precision_is_drawn_again_in_float32(tmp_path, monkeypatch, capsys):
    whole, low, passes = draw(tmp_path / "low", monkeypatch)
    assert (whole["redone_fp32"], whole["not_finite"], whole["one_colour"]) == (0, 0, 0)
    assert passes == [([0, 1, 2], True), ([3, 4, 5], True), ([6], True)]  # and nothing more
    _, full, _ = draw(tmp_path / "full", monkeypatch, torch.float32)
    found, images, passes = draw(tmp_path / "both", monkeypatch, explodes=(1, 4, 5))
    assert (found["redone_fp32"], found["not_finite"]) == (3, 0)
    assert passes == [([0, 1, 2], True), ([1], False), ([3, 4, 5], True), ([4, 5], False), ([6], True)]
    for i, image in enumerate(images):
        if i in (1, 4, 5):  # another batch: alike within rounding, DESIGN.md section 3
            assert (np.abs(image.astype(int) - full[i]) <= 1).mean() > 0.98
        else:
            assert np.array_equal(image, low[i])
    assert found["mar_evals"] > whole["mar_evals"]  # what it cost is counted
    assert "warning" not in capsys.readouterr().err


def test_what_explodes_in_float32_too_is_black_counted_and_named(tmp_path, monkeypatch, capsys):
    found, images, passes = draw(tmp_path / "a", monkeypatch, explodes=(0, 1, 6), in_float32=(1, 6))
    assert (found["redone_fp32"], found["not_finite"]) == (3, 2)
    assert not images[1].any() and not images[6].any() and images[0].any()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert line.startswith("warning: 2 of 7 images") and line.endswith(": 1, 6")
    found, images, passes = draw(tmp_path / "b", monkeypatch, torch.float32, in_float32=(4,))
    assert (found["redone_fp32"], found["not_finite"]) == (0, 1) and len(passes) == 3  # once is enough there
    assert not images[4].any() and capsys.readouterr().err.rstrip().endswith(": 4")


def test_images_of_one_colour_are_counted_and_named(tmp_path, monkeypatch, capsys):
    found, images, _ = draw(tmp_path, monkeypatch, plain=(2, 3))
    assert found["one_colour"] == 2 and not images[2].any()
    assert "warning: 2 of 7 images are of one colour" in (err := capsys.readouterr().err) and err.rstrip().endswith(
        "2, 3"
    )


def test_a_traced_image_that_is_drawn_again(tmp_path, monkeypatch):
    found, images, _ = draw(tmp_path, monkeypatch, explodes=(1,), num_traced=2)
    with np.load(tmp_path / "trace.npz") as file:
        assert found["redone_fp32"] == 1 and file["frames"].shape[:2] == (2, 3)
        assert all(np.array_equal(file["frames"][i, -1], images[i]) for i in range(2))


def test_draw_finite_asks_for_the_rows_that_are_not():
    asked = []

    def made(rows, dtype):
        asked.append((list(rows), dtype))
        latents = torch.zeros(len(rows), 1, 2, 2)
        latents[[row in (1, 3) and (dtype != torch.float32 or row == 3) for row in rows], 0, 1, 1] = -torch.inf
        return latents

    latents, twice, lost = draw_finite(made, 5, torch.float16)
    assert (twice, lost) == ([1, 3], [3]) and torch.isfinite(latents).flatten(1).all(1).tolist() == [1, 1, 1, 0, 1]
    assert asked == [([0, 1, 2, 3, 4], torch.float16), ([1, 3], torch.float32)]
    assert draw_finite(made, 5, torch.float32)[1:] == ([], [3])


@pytest.mark.parametrize("name", [name for name, (make, *_) in FAMILIES.items() if make().token_head.discrete])
def test_ids_that_cannot_be_drawn(name):
    """Of an image whose logits are not finite all ids are −1, and the other images are what they were."""
    make, options, num_iter = FAMILIES[name]
    model = make()
    expected = drawn(model, options, num_iter, torch.float32)
    rows = [model.get_parameter(parameter) for parameter in model.per_class] or [model.tok_emb.weight[-5:]]
    for of_class in rows:
        of_class.data[2] = torch.nan  # the label of image 1
    ids = drawn(model, options, num_iter, torch.float32)
    assert ids[1].eq(-1).all() and ids[[0, 2]].equal(expected[[0, 2]]) and (expected >= 0).all()
    assert draw_finite(lambda rows, dtype: ids[list(rows)].clone(), 3, torch.float32)[1:] == ([], [1])


def test_logits_that_are_not_finite_are_noticed_where_a_filter_leaves_them_out(monkeypatch):
    head = tiny_ids().celoss
    sampler = head.sampler(top_k=3)
    z, noise = randn(4, 16), torch.zeros(4, head.num_ids)
    logits = head.logits(z)
    logits[1, 5], logits[2, 0], logits[3, 1:] = torch.nan, torch.inf, -torch.inf
    monkeypatch.setattr(type(head), "logits", lambda self, z: logits)
    assert sampler.draw(z, None, 1.0, 1.0, noise, 1).tolist() == [int(logits[0].argmax()), -1, -1, 0]


def test_what_stands_at_unknown_tokens_may_be_no_id():
    model, mask = tiny_ids(), torch.ones(3, 16, dtype=torch.bool)
    mask[:, 3:6] = False
    given = torch.arange(48).reshape(3, 16) % 16
    options = dict(num_iter=3, seeds=[1, 2, 3], mask=mask)
    ids = generate(model, torch.tensor([0, 2, -1]), build_rules("baseline"), tokens=given, **options)
    blank = torch.where(mask, -1, given)
    assert generate(model, torch.tensor([0, 2, -1]), build_rules("baseline"), tokens=blank, **options).equal(ids)
    blank[1, 4] = -1  # one that is known
    broken = generate(model, torch.tensor([0, 2, -1]), build_rules("baseline"), tokens=blank, **options)
    assert broken[1].eq(-1).all() and broken[[0, 2]].equal(ids[[0, 2]])


def test_images_of_ids_that_are_none_are_not_finite():
    """So that a reward leaves them out; the others keep their gradient."""
    ids, expected = torch.randint(0, 16, (3, 4, 4)), ExpectedCost()
    ids[1] = -1
    for images in (render(GreyIds(), ids), expected.render(GreyIds(), ids)):
        assert images[1].isnan().all() and images[[0, 2]].isfinite().all()
    (slopes,) = torch.autograd.grad(images[[0, 2]].sum(), expected.vectors)
    assert slopes[[0, 2]].ne(0).all() and slopes[1].eq(0).all()


def test_what_overflows_with_held_weights_is_drawn_again_in_float32(tmp_path):
    """As `sample.py --dtype fp16` does it: the images are those of float32, of another batch."""
    mar = tiny_mar()
    mar.decoder_blocks[0].mlp.fc2.weight.data[0] *= 3e6  # too much for fp16 alone
    settings = dict(sampling=SampleConfig(num_iter=3, num_sampling_steps=2, cfg=2.0), labels=[0, 1, 2], seed=5)
    parts = on_cpu(mar, build_tokenizer("pixel", channels=1))
    sample_images(parts, **settings, folder=tmp_path / "fp32", batch_size=3)
    prepare(mar, torch.float16)
    found = sample_images(replace(parts, dtype=torch.float16), **settings, folder=tmp_path / "fp16", batch_size=3)
    assert (found["redone_fp32"], found["not_finite"]) == (3, 0)
    for i in range(3):
        assert (tmp_path / "fp16" / f"{i}.png").read_bytes() == (tmp_path / "fp32" / f"{i}.png").read_bytes()


def test_ids_that_cannot_be_drawn_in_low_precision_are_drawn_again_and_else_left_black(tmp_path, monkeypatch, capsys):
    def without(rows):
        def ids(model, labels, *args, **more):
            made = generate(model, labels, *args, **more)
            made[[i for i in rows if i < len(made)]] = -1
            return made

        return ids

    low, high = without([1, 2]), without([1])  # of the two that are asked for again the second
    monkeypatch.setattr(
        "sampling.run.generate",
        lambda *args, **more: (low if torch.is_autocast_enabled("cpu") else high)(*args, **more),
    )
    parts = on_cpu(tiny_ids(), GreyIds(), dtype=torch.bfloat16)
    found = sample_images(parts, SampleConfig(num_iter=2), [0, 1, 2], 5, tmp_path, batch_size=3)
    assert (found["redone_fp32"], found["not_finite"]) == (2, 1)
    images = [read_png(tmp_path / f"{i}.png") for i in range(3)]
    assert not images[2].any() and images[1].any() and "are left black: 2" in capsys.readouterr().err


@pytest.mark.parametrize("mode", OF_LATENTS)
def test_rules_survive_numbers_that_are_not_finite(mode):
    """An image whose tokens explode half-way still ends, and its neighbours are what they were."""
    mar = tiny_mar()
    heads = named_weights(PolicyHeads(mar.config.decoder_embed_dim), scale=1.0).eval()
    rules, labels = build_rules(mode, heads, cfg=2.0), torch.tensor([0, 1, 2])

    def explode(step, rows, plan, tokens):
        if step == 0:
            tokens[1] = float("nan")

    options = dict(num_iter=4, num_steps=2, seeds=[1, 2, 3])
    whole, found = generate(mar, labels, rules, **options), generate(mar, labels, rules, callback=explode, **options)
    assert not torch.isfinite(found[1]).all() and torch.isfinite(found[[0, 2]]).all()
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-4)


def test_one_pixel_is_not_of_one_colour():
    assert not is_plain(np.zeros((1, 1, 3), np.uint8)) and is_plain(np.zeros((2, 1, 3), np.uint8))
    assert is_plain(np.full((2, 2, 3), (1, 2, 3), np.uint8)) and not is_plain(
        np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    )


def test_the_result_line_has_the_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sampling.run.is_plain", lambda image: True)
    flags = "--num_images 4 --metrics none --num_sampling_steps 2 --dtype bf16".split()
    argv = ["--checkpoint", str(untrained(tmp_path / "in")), "--output_dir", str(tmp_path / "out"), *flags]
    assert sample.main(argv) == 0
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert (row["redone_fp32"], row["not_finite"], row["one_colour"]) == (0, 0, 4)
    printed = capsys.readouterr()
    assert "one_colour: 4 of the 4 images made" in printed.out and "are of one colour" in printed.err
