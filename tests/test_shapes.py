"""Images of several sizes: how sizes are said, buckets of images, their batches, grids of the model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from heads.policy import build_rules
from models.causal_gpt import CausalGPTConfig
from models.mar import MARConfig
from models.var_config import VARConfig
from sampling.editing import Edit, read_edit
from sampling.loop import generate
from sampling.settings import SampleConfig
from sampling.trace import over_pixels, token_grid
from tests.helpers_ids import ENTRIES, tiny_ids
from tests.helpers_maskgil import tiny_maskgil
from util.evaluation.features import check_features
from util.images.buckets import Buckets, build_buckets, nearest
from util.images.datasets import EpochSampler, build_dataset
from util.images.latent_files import image_names
from util.images.reading import Reading, center_crop, picture_sides
from util.sizes import bucket_sizes, grid_of, image_size, sides, sizes_of

RATIOS = "1:1,4:3,3:4,3:2,2:3,16:9,9:16"
SHAPES = (8, "8x16", "16x8")


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("text, size, pair", [("256", 256, (256, 256)), ("8x16", "8x16", (8, 16)), ("8x8", 8, (8, 8))])
def test_a_size_is_a_number_or_height_by_width(text, size, pair):
    assert image_size(text) == size and sides(size) == pair and image_size(str(size)) == size


def test_a_grid_fills_the_image_or_there_is_none():
    assert (grid_of("32x48", 16), grid_of(32, 16)) == ((2, 3), (2, 2))
    assert [grid_of(size, 16) for size in ("32x40", "40x32", 8, "8x16")] == [None] * 4


@pytest.mark.parametrize("img_size", [256, 320, 384, 512])
def test_buckets_of_ratios_have_nearly_equally_many_tokens(img_size):
    """None more than the square has, and at most 5 % fewer, at sides of whole cells of 16 pixels."""
    sizes, square = sizes_of(RATIOS, img_size), (img_size // 16) ** 2
    counts = [math.prod(grid_of(size, 16)) for size in sizes]
    assert sizes[0] == img_size and all(0.95 * square <= count <= square for count in counts)
    for text, size in zip(RATIOS.split(","), sizes):
        (width, height), (h, w) = map(int, text.split(":")), sides(size)
        assert w / h == pytest.approx(width / height, rel=0.08)
    assert all(sides(a) == sides(b)[::-1] for a, b in zip(sizes[1::2], sizes[2::2]))  # lying and upright


def test_sizes_and_ratios_may_be_mixed_but_not_repeated():
    assert sizes_of("256x384,1:1", 320) == ("256x384", 320)
    with pytest.raises(ValueError, match="--buckets 256,1:1 names a size twice: 256, 256"):
        sizes_of(bucket_sizes("256,1:1"), 256)


def test_families_of_square_images_refuse_others():
    for config in (MARConfig, CausalGPTConfig, VARConfig):
        with pytest.raises(ValueError, match="img_size 256x384 must be one number, .* are square"):
            config(img_size="256x384")


# ------------------------------------------------------------------------------------------------------------ images


def test_canvases_count_on():
    single, beside, above = (build_dataset("canvases", img_size=size) for size in SHAPES)
    assert [images.images.shape[2:] for images in (single, beside, above)] == [(8, 8), (8, 16), (16, 8)]
    assert beside.images[:, :, :, :8].equal(single.images) and above.images[:, :, :8].equal(single.images)
    assert beside.images[:, :, :, 8:].equal(above.images[:, :, 8:])
    label_of = {image.numpy().tobytes(): label for image, label in zip(single.images, single.labels.tolist())}
    second = [label_of[image.numpy().tobytes()] for image in beside.images[:, :, :, 8:].contiguous()]
    assert second == [(label + 1) % 10 for label in beside.labels.tolist()]
    assert len({image.numpy().tobytes() for image in beside.images}) == 1797


def test_buckets_are_one_data_set():
    both = build_buckets("canvases", SHAPES)
    assert (len(both), both.counts, both.sizes, both.classes) == (3 * 1797, (1797,) * 3, SHAPES, both.parts[0].classes)
    for i in (0, 1796, 1797, 3594, 5390):
        image, label, index = both[i]
        assert index == i and label == both.labels[i] and image.equal(both.parts[i // 1797].images[i % 1797])
    assert len(set(image_names(both))) == len(both)
    both.set_epoch(3, 5)
    assert all(part.when.tolist() == [3, 5] for part in both.parts)
    both.parts[1].broken[2] = 1
    assert both.broken.nonzero().tolist() == [[1799]]
    with pytest.raises(IndexError):
        both[5391]


def pictures(folder, **shapes):
    """A folder of one class with a picture of each (width, height)."""
    (folder / "a").mkdir(parents=True)
    for name, (width, height) in shapes.items():
        Image.new("RGB", (width, height), (width % 256, 9, 9)).save(folder / "a" / f"{name}.png")
    return folder


def test_a_picture_goes_to_the_nearest_ratio_and_is_cut_to_it(tmp_path):
    shapes = dict(lying=(90, 40), square=(50, 55), tall=(30, 80), strip=(400, 10), upright=(40, 64))
    folder = pictures(tmp_path / "images", **shapes)
    turned = Image.new("RGB", (60, 20))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(folder / "a" / "turned.jpg", exif=exif)
    assert picture_sides(folder / "a" / "turned.jpg") == (60, 20)
    assert picture_sides(folder / "a" / "turned.jpg", Reading(exif=False)) == (20, 60)
    both = build_buckets("imagefolder", SHAPES, data_path=str(folder))
    held = [sorted(name.rpartition("/")[2] for name in image_names(part)) for part in both.parts]
    assert held == [["square.png"], ["lying.png", "strip.png"], ["tall.png", "turned.jpg", "upright.png"]]
    assert [both[i][0].shape[1:] for i in range(6)] == [(8, 8)] + [(8, 16)] * 2 + [(16, 8)] * 3
    assert [name for part in both.parts for name in image_names(part)] == image_names(both)
    assert nearest(1.0, ("8x16", 8, 16)) == 1  # the first of equal ratios


def test_what_stands_in_for_a_broken_picture_has_its_size(tmp_path):
    folder = pictures(tmp_path / "images", a=(20, 20), b=(22, 22), d=(80, 40))
    whole = (folder / "a" / "d.png").read_bytes()
    (folder / "a" / "c.png").write_bytes(whole[:50])  # its header says how large it was
    both = build_buckets("imagefolder", (8, "8x16"), data_path=str(folder))
    with pytest.warns(UserWarning, match="c.png"):
        image, _, _ = both[2]
    assert image.equal(both[3][0]) and both.num_broken == 1


def test_a_picture_covers_its_size():
    values = np.zeros((40, 32), dtype=np.uint8)
    values[12:28] = 200  # what is left of 40 x 32 in the ratio 1:2
    assert (np.asarray(center_crop(Image.fromarray(values), "16x32")) == 200).all()
    values = np.zeros((20, 60), dtype=np.uint8)
    values[:, 24:36] = 200
    upright = np.asarray(center_crop(Image.fromarray(values), "10x5"))
    assert upright.shape == (10, 5) and upright.min() > 150


# ----------------------------------------------------------------------------------------------------------- batches


def batches(counts=(23, 9, 14), batch_size=4, seed=0, epoch=0, start_batch=0, **kwargs):
    sampler = EpochSampler(sum(counts), batch_size, seed, counts=counts, **kwargs)
    sampler.set_epoch(epoch, start_batch)
    return list(sampler)


def test_a_batch_holds_one_size_and_an_epoch_all():
    epoch = batches()
    assert len(epoch) == 5 + 2 + 3 == len(EpochSampler(46, 4, 0, counts=(23, 9, 14)))
    sizes = [{int(np.searchsorted([23, 32, 46], i, side="right")) for i in batch} for batch in epoch]
    assert all(len(size) == 1 for size in sizes)
    assert len({i for batch in epoch for i in batch}) == 40
    order = [size.pop() for size in sizes]
    assert order != sorted(order) and sorted(order) == [0] * 5 + [1] * 2 + [2] * 3
    assert epoch == batches() and epoch != batches(epoch=1) and epoch != batches(seed=1)


def test_processes_share_batches_of_one_size_and_epochs_go_on():
    one = batches(batch_size=6, epoch=2)
    ranks = [batches(batch_size=2, epoch=2, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one
    assert all(batches(batch_size=6, epoch=2, start_batch=k) == one[k:] for k in range(len(one) + 1))
    with pytest.raises(ValueError, match="9 images do not fill one global batch of 10"):
        batches(batch_size=10)


# -------------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_a_grid_in_a_call_is_the_grid_of_a_model_of_that_size():
    for rope in ("2d", "published"):
        square, lying = tiny_maskgil(rope=rope), tiny_maskgil(rope=rope, img_size="4x10")
        assert lying.config.shape == (2, 5) and lying.config.seq_len == 10
        ids, labels = torch.randint(ENTRIES, (3, 10)), torch.tensor([0, 1, -1])
        mask = torch.rand(3, 10) < 0.5
        assert square.logits(ids, mask, labels, grid=(2, 5)).equal(lying.logits(ids, mask, labels))
    upright = tiny_maskgil(img_size="10x4")
    assert not upright.logits(ids, mask, labels).allclose(tiny_maskgil(img_size="4x10").logits(ids, mask, labels))


def test_images_of_any_size_are_sampled_and_do_not_depend_on_their_batch():
    rules, labels, seeds = build_rules("maskgil", cfg=3.0), torch.tensor([0, 1, 2]), [5, 6, 7]
    for size, shape in (("4x10", (2, 5)), ("10x4", (5, 2)), (6, (3, 3))):
        model = tiny_maskgil(img_size=size)
        whole = generate(model, labels, rules, num_iter=4, seeds=seeds)
        assert whole.shape == (3, *shape)
        single = [generate(model, labels[i : i + 1], rules, num_iter=4, seeds=seeds[i : i + 1]) for i in range(3)]
        assert whole.equal(torch.cat(single))


def test_orders_of_square_images_are_refused_for_others():
    model, square = tiny_maskgil(img_size="4x10"), tiny_maskgil()
    for order in ("halton", "center", "multiscale", "checkerboard"):
        sampling = SampleConfig(order=order, num_iter=4)
        sampling.check(square)
        with pytest.raises(ValueError, match=f"--order {order} .* valid: random, raster, confidence"):
            sampling.check(model)
        with pytest.raises(ValueError, match=f"--order {order} is of square images"):
            generate(model, torch.tensor([0]), build_rules("baseline", order=order), num_iter=4)
    for order in ("random", "raster", "confidence"):
        SampleConfig(order=order, num_iter=4).check(model)
    tiny_mar = tiny_ids()
    SampleConfig(order="halton", num_iter=4).check(tiny_mar)
    learned = SampleConfig(order="learned", order_base="halton")
    with pytest.raises(ValueError, match="--order_base halton is of square images"):
        learned.check_shape()


# ---------------------------------------------------------------------------------------- pictures of what was drawn


def test_tokens_are_spread_over_the_pixels_of_any_grid():
    cells = np.arange(6).reshape(1, 6)
    shown = over_pixels(cells, (1, 4, 6, 3))
    assert shown.shape == (1, 4, 6, 1)
    assert shown[0, :, :, 0].tolist() == np.kron(np.arange(6).reshape(2, 3), np.ones((2, 2))).tolist()
    assert (token_grid(64, 8, 8), token_grid(6, 4, 6), token_grid(6, 6, 4)) == ((8, 8), (2, 3), (3, 2))
    assert token_grid(130, 8, 8) is None and token_grid(680, 256, 256) is None  # of several scales
    assert token_grid(0, 8, 8) is None and token_grid(4, 0, 8) is None  # of a damaged trace


def test_an_edit_of_an_image_that_is_not_square(tmp_path):
    source, mask = np.full((4, 10), 7, np.uint8), np.zeros((4, 10), np.uint8)
    mask[3, 9] = 255
    for name, array in (("source", source), ("mask", mask)):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("source", "mask")]
    edit = read_edit(*files, img_size="4x10", channels=1, cell=2)
    assert isinstance(edit, Edit) and edit.unknown.shape == (2, 5) and edit.unknown.nonzero() == ([1], [4])
    assert edit.pixels.sum() == 4
    with pytest.raises(ValueError, match="has 10x4 pixels .*, the model makes 4x10"):
        read_edit(*files, img_size="10x4", channels=1, cell=2)


def test_features_of_one_size_refuse_another():
    with pytest.raises(ValueError, match=r"digits features need uint8 images \(B, 3, 8, 8\), got .* \(1, 3, 8, 16\)"):
        check_features("digits", img_size="8x16")


def test_a_model_of_a_size_is_the_model_of_another_with_its_configuration():
    model = tiny_maskgil()
    wide = tiny_maskgil(img_size="8x16")
    assert replace(model.config, img_size="8x16") == wide.config
    assert all(value.equal(wide.state_dict()[name]) for name, value in model.state_dict().items())


def test_parts_of_different_classes_do_not_occur(tmp_path):
    """A class without pictures of one ratio keeps its number."""
    folder = tmp_path / "images"
    for name, size in (("a", (20, 20)), ("b", (40, 20))):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", size).save(folder / name / "0.png")
    both = build_buckets("imagefolder", (8, "8x16"), data_path=str(folder))
    assert isinstance(both, Buckets) and both.classes == ["a", "b"] and both.labels.tolist() == [0, 1]
    assert [both[i][1] for i in range(2)] == [0, 1]
