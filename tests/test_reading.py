"""How picture files become 8-bit RGB squares: util/images/reading.py."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_data import folder, save
from util.images.datasets import build_dataset
from util.images.reading import MARS_WAY, Reading, center_crop, extensions, read_rgb, stored_reading

RNG = np.random.default_rng(0)


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 0), (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("P", 0, (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 0x8000, (128, 128, 128)),
        ("I;16B", 0xFFFF, (255, 255, 255)),
        ("I", 0x8000, (128, 128, 128)),
        ("F", 0.2, (51, 51, 51)),
        ("F", 200.0, (200, 200, 200)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, color, rgb):
    image = Image.new(mode, (9, 12), color)
    if mode == "P":
        image.putpalette([9, 8, 7] * 256)
    path = tmp_path / ("0.tif" if mode in ("CMYK", "I", "I;16B", "F") else "0.png")
    image.save(path, **({"transparency": bytes([0] * 256)} if mode == "P" else {}))
    with Image.open(path) as stored:
        assert stored.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = folder(tmp_path)[0][0]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8)
    assert torch.equal(pixels, torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 8, 8))


def test_float_out_of_range_and_huge_images_are_broken(tmp_path, monkeypatch):
    for value in (-1.0, 300.0, float("nan")):
        save(tmp_path / "0.tif", color=value, mode="F")
        with pytest.raises(ValueError, match="float image"):
            read_rgb(tmp_path / "0.tif")
    save(tmp_path / "1.png", size=(8, 8))
    save(tmp_path / "2.png", size=(100, 100))
    (tmp_path / "0.tif").unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(UserWarning, match="2.png.*decompression bomb"):
        ds = folder(tmp_path)
        assert ds[1][2] == 1 and ds.num_broken == 1


# ---------------------------------------------------------------- more than 8 bits


def write(path, values, **options):
    """A grey file of these values, int32 as TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path, **options)


def write_png16(path, values):
    """A PNG of uint16 (H, W, 2 to 4), which Pillow cannot write."""
    height, width, channels = values.shape

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def ramp(low, high, dtype):
    """64 values from low to high, (8, 8)."""
    return np.linspace(low, high, 64).astype(dtype).reshape(8, 8)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "range"),
    [
        (0, 255, np.uint16, (0, 255)),
        (3, 1000, np.uint16, (0, 1023)),
        (0, 4095, np.uint16, (0, 4095)),
        (0, 65535, np.uint16, None),  # the mode's own, which needs no word
        (0, 255, np.int32, (0, 255)),
        (0, 65535, np.int32, None),
        (0, 1_000_000, np.int32, (0, 1_000_000)),
        (-1000, 3000, np.int32, (-1000, 3000)),
    ],
)
def test_values_that_do_not_fill_the_range_are_neither_black_nor_white(tmp_path, low, high, dtype, range):
    values = ramp(low, high, dtype)
    path = tmp_path / ("0.png" if dtype == np.uint16 else "0.tif")
    write(path, values)
    first, last = range or (0, 65535)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = folder(tmp_path)[0][0]
    texts = [str(w.message) for w in caught]
    assert len(texts) == (range is not None) and all("--value_range" in t and f"{last:g}" in t for t in texts)
    expected = np.floor((values.astype(float) - first) * 256 / (last - first + 1))
    assert np.array_equal(pixels[0], expected) and pixels.min() <= 1 and pixels.max() >= 249


def test_the_range_is_that_of_all_pictures_of_a_folder(tmp_path):
    """A dark one stays dark."""
    write(tmp_path / "a" / "dark.png", np.full((8, 8), 100, np.uint16))
    write(tmp_path / "b" / "bright.png", np.full((8, 8), 4000, np.uint16))
    save(tmp_path / "b" / "eight bits.png", color=(90, 90, 90))
    with pytest.warns(UserWarning, match="100 to 4000 are read with 0 as black and 4095 as white") as caught:
        ds = folder(tmp_path)
        assert [int(image.max()) for image, *_ in ds] == [100 // 16, 4000 // 16, 90]
    assert len(caught) == 1
    pinned = folder(tmp_path, reading=Reading(value_range="100,355"))
    assert [int(image.max()) for image, *_ in pinned] == [0, 255, 90]


@pytest.mark.filterwarnings("ignore:pictures of more than 8 bits")
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours(tmp_path, channels):
    values = RNG.integers(0, 4096, (8, 8, channels)).astype(np.uint16)
    values[0, 0] = 4095
    values[..., 3 if channels == 4 else 1 if channels == 2 else slice(0)] = 65535
    write_png16(tmp_path / "0.png", values)
    colours = values[..., :3] if channels > 2 else values[..., :1].repeat(3, -1)
    assert np.array_equal(folder(tmp_path)[0][0].permute(1, 2, 0), colours // 16)
    write_png16(tmp_path / "0.png", values * 16 if channels == 3 else values)
    full = Reading(value_range="0,65535")
    expected = (values * 16 if channels == 3 else colours) // 256
    assert np.array_equal(folder(tmp_path, reading=full)[0][0].permute(1, 2, 0), expected)


def test_float_pictures_out_of_range_take_a_given_range(tmp_path):
    write(tmp_path / "0.tif", ramp(-1, 1, np.float32))
    with pytest.warns(UserWarning, match="--value_range"), pytest.raises(ValueError, match="no readable"):
        folder(tmp_path)
    pixels = folder(tmp_path, reading=Reading(value_range="-1,1"))[0][0]
    assert (pixels.min(), pixels.max()) == (0, 255) and abs(int(pixels[0].float().mean()) - 127) <= 1


BAD = {
    "value_range": ("5", "1,x", "3,1", "2,2", "nan,1", "0,inf"),
    "background": ("blueish", "1,2", "1,2,256", "-1,0,0", ""),
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_bad_setting_is_one_line(name, text):
    with pytest.raises(ValueError, match=f"^--{name} must be .*") as error:
        Reading(**{name: text})
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- orientation, transparency, formats


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, ending, orientation):
    """As Pillow's own function does it, which also turns each TIFF when it is loaded."""
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4, :4], pixels[4:, :4] = 255, 120
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    image.save(tmp_path / f"0.{ending}", exif=exif, **options)
    undo = {1: 0, 3: 2, 6: 3, 8: 1}  # quarter turns to the left
    turned = {k: np.rot90(pixels, n) for k, n in undo.items()}
    turned |= {2: pixels[:, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1), 7: np.rot90(pixels, 2).swapaxes(0, 1)}
    found = folder(tmp_path)[0][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - turned[orientation]).max() <= 3
    if ending != "tif":
        as_stored = folder(tmp_path, reading=Reading(exif=False))[0][0].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(as_stored - pixels).max() <= 3


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_damaged_picture(tmp_path):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "0.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="broken image", category=UserWarning)
        assert folder(tmp_path)[0][0][:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("background", "colour"),
    [("white", (128, 129, 129)), ("0,0,0", (0, 1, 1)), ("#ff0000", (128, 1, 1)), ("none", (1, 2, 3))],
)
def test_what_shows_through_transparency(tmp_path, background, colour):
    Image.new("RGBA", (8, 8), (1, 2, 3, 128)).save(tmp_path / "0.png")
    found = folder(tmp_path, reading=Reading(background=background))[0][0][:, 0, 0]
    assert (found - torch.tensor(colour)).abs().max() <= 1


@pytest.mark.parametrize("mode, key, colour", [("L", 7, 7), ("RGB", (7, 7, 7), (7, 7, 7)), ("1", 0, 0), ("P", 0, 0)])
def test_a_transparent_colour_is_transparent(tmp_path, mode, key, colour):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([7, 7, 7] * 256)
    image.save(tmp_path / "0.png", transparency=key)
    assert folder(tmp_path)[0][0].min() == 255
    assert folder(tmp_path, reading=MARS_WAY)[0][0].max() == (0 if mode == "1" else 7)


@pytest.mark.parametrize("ending", ["jfif", "gif", "webp", "avif", "bmp", "JPE", "jp2", "tga", "qoi", "ppm", "apng"])
def test_every_format_that_pillow_reads_counts(tmp_path, ending):
    Image.init()
    if f".{ending.lower()}" not in Image.registered_extensions():
        pytest.skip("this Pillow has it not")
    options = {"format": "PNG"} if ending == "apng" else {}
    for name in ("a", "b"):
        save(tmp_path / name / "0.png")
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "b" / f"1.{ending}", **options)
    ds = folder(tmp_path)
    assert len(ds) == 3 and ds[2][1] == 1 and abs(int(ds[2][0][0, 0, 0]) - 200) < 5


def test_programs_and_containers_are_no_pictures():
    assert not extensions() & {".eps", ".ps", ".h5", ".mpg", ".pdf", ".txt", ".npz"}


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "apng"])
def test_the_first_frame_of_several(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"format": "PNG"} if ending == "apng" else {}
    frames[0].save(tmp_path / f"0.{ending}", save_all=True, append_images=frames[1:], **options)
    red, green, _ = folder(tmp_path)[0][0][:, 0, 0].tolist()
    assert red > 200 and green < 50


def test_old_checkpoints_and_caches_were_read_as_mar_reads():
    assert stored_reading(None) == stored_reading({}) == MARS_WAY
    assert stored_reading({"exif": True}) == Reading(background="none")
    assert not build_dataset("digits", reading=Reading()).flip


def test_mirroring_can_be_switched_off(tmp_path):
    save(tmp_path / "0.png")
    assert folder(tmp_path).flip and not folder(tmp_path, reading=Reading(flip=False)).flip


# ---------------------------------------------------------------- cropping


@pytest.mark.parametrize("shape", [(8, 8), (8, 13), (14, 8)])
def test_crop_at_native_size_is_a_slice(shape):
    pixels = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels[top : top + 8, left : left + 8])


def test_crop_at_twice_the_size_is_a_box_mean():
    pixels = RNG.integers(0, 64, (16, 24, 3), dtype=np.uint8) * 4  # multiples of 4: the mean of 4 is whole
    mean = pixels.reshape(8, 2, 12, 2, 3).mean((1, 3))
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), mean[:, 2:10])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (13, 9), (31, 17), (20, 45), (100, 33)])
def test_crop_equals_scaling_the_whole_image(size):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    whole = image
    while min(whole.size) >= 16:
        whole = whole.resize(tuple(side // 2 for side in whole.size), Image.BOX)
    whole = whole.resize(tuple(round(side * 8 / min(whole.size)) for side in whole.size), Image.BICUBIC)
    rows, columns = ((side - 8) // 2 for side in (whole.height, whole.width))
    expected = np.asarray(whole, dtype=int)[rows : rows + 8, columns : columns + 8]
    assert np.abs(np.asarray(center_crop(image, 8), dtype=int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (5, 5), (37, 90), (64, 64)])
def test_crop_keeps_constant_images(size):
    image = center_crop(Image.new("RGB", size, (3, 141, 250)), 16)
    assert image.size == (16, 16) and image.getcolors() == [(256, (3, 141, 250))]


def test_pictures_of_fewer_bits_among_deeper_ones_are_spoken_of(tmp_path):
    """8-bit values in 16-bit files beside files of the whole range; alone, or pinned, nothing is said."""
    for name, top in (("few", 255), ("whole", 65535)):
        values = np.linspace(0, top, 64).reshape(8, 8).astype(np.uint16)
        (tmp_path / "both" / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "train" / "a").mkdir(parents=True)
        for place in ("both", name):
            Image.fromarray(values).save(tmp_path / place / "train" / "a" / f"{name}.png")
    with pytest.warns(UserWarning, match="turn black: others reach 65535"):
        mixed = build_dataset("imagefolder", data_path=tmp_path / "both", img_size=8)
        assert [int(mixed[i][0].max()) for i in range(2)] == [0, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = build_dataset("imagefolder", data_path=tmp_path / "whole", img_size=8)
        assert whole[0][0].max() == 255
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*turn black.*")
        assert build_dataset("imagefolder", data_path=tmp_path / "few", img_size=8)[0][0].max() == 255
