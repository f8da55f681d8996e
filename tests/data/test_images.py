"""Pictures of every kind come out as RGB of the asked size, and damage is an error."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from metalm.data.images import decode_image, fit_picture, pixels_of, read_picture, resize
from metalm.data.views import View, draw_view
from metalm.errors import DataError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def quadrants(size: int = 64) -> Image.Image:
    """Red, green over blue, white."""
    image = Image.new("RGB", (size, size))
    half = size // 2
    for place, color in {(0, 0): "red", (half, 0): "lime", (0, half): "blue", (half, half): "white"}.items():
        image.paste(Image.new("RGB", (half, half), color), place)
    return image


def corners(pixels: torch.Tensor) -> list[list[int]]:
    """The colours well inside the four quadrants, row by row."""
    n = pixels.shape[1]
    return [pixels[:, y, x].tolist() for y in (n // 4, 3 * n // 4) for x in (n // 4, 3 * n // 4)]


COLORS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


def test_the_exact_size_is_kept_to_the_pixel():
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    out = decode_image(encode(Image.fromarray(pixels)), 32)
    assert out.dtype == torch.uint8 and out.shape == (3, 32, 32) and out.is_contiguous()
    assert np.array_equal(out.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_sizes_and_interpolations(interpolation):
    for size in (8, 64, 100):
        for ours, theirs in zip(corners(decode_image(encode(quadrants()), size, interpolation)), COLORS):
            assert max(abs(a - b) for a, b in zip(ours, theirs)) <= 2


def natural(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise that is as rough as a photo: its amplitude falls with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((3, height, width))
    pixels = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width)).transpose(1, 2, 0)
    return Image.fromarray((pixels / pixels.std() * 50 + 120).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(500, 375), (640, 480), (225, 223), (150, 400), (90, 60), (224, 500), (2000, 30), (3, 2)])
def test_resized_photos_are_those_of_pillow(shape, interpolation):
    """To one level of 255; but for two pixels in a thousand where it is enlarged, next to saturated ones."""
    image = natural(*shape)
    expected = pixels_of(image.resize((224, 224), getattr(Image.Resampling, interpolation.upper()))).int()
    difference = (resize(pixels_of(image), 224, 224, interpolation).int() - expected).abs()
    assert difference.float().mean() < 0.3
    assert (difference > 1).float().mean() <= (0.002 if min(shape) < 224 else 0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(500, 375), (225, 223), (90, 60)])
def test_resized_noise_is_as_exact_as_pillows(shape, interpolation):
    """White noise overshoots everywhere and is clipped between the passes: both are as far from the exact values."""
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*shape[::-1], 3), dtype=np.uint8))
    exact = torch.nn.functional.interpolate(pixels_of(image).double()[None], (224, 224), mode=interpolation, antialias=True)[0]
    pillow = pixels_of(image.resize((224, 224), getattr(Image.Resampling, interpolation.upper())))
    ours, theirs = (
        (found - exact.clamp(0, 255)).abs() for found in (resize(pixels_of(image), 224, 224, interpolation), pillow)
    )
    assert ours.mean() <= 1.01 * theirs.mean() and ours.max() <= 1.01 * theirs.max() + 0.5


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_view_is_pillows_crop_of_whole_pixels(mirrored):
    image, view = natural(500, 375), View(0.101, 0.2, 0.899, 0.95, mirrored)
    expected = image.crop((50, 75, 450, 356)).resize((224, 224), Image.Resampling.BICUBIC)
    if mirrored:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = fit_picture(pixels_of(image), 224, 224, view=view)
    assert out.is_contiguous() and (out.int() - pixels_of(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("view", [View(0.999, 0, 1, 0.001), View(0, 0.5, 0.001, 0.5005)])
def test_a_view_holds_at_least_a_pixel(view):
    assert fit_picture(pixels_of(natural(20, 10)), 8, 8, view=view).unique(dim=1).shape[1] == 1


def test_jpegs_are_decoded_at_the_smallest_scale_that_suffices():
    encoded = encode(natural(1000, 800), "JPEG", quality=95)
    assert [tuple(read_picture(encoded, least).shape) for least in (801, 400, 224, 200, 100)] == [
        (3, 800, 1000), (3, 400, 500), (3, 400, 500), (3, 200, 250), (3, 100, 125),
    ]  # fmt: skip
    full = fit_picture(pixels_of(natural(1000, 800)), 224, 224).float()
    assert (decode_image(encoded, 224).float() - full).abs().mean() < 1.5


@pytest.mark.parametrize("shape", [(1, 1), (20_000, 20), (20, 20_000), (1, 300), (640, 480)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_any_shape_is_squashed(shape, kind):
    out = decode_image(encode(Image.new("RGB", shape, (200, 100, 50)), kind), 24)
    assert out.shape == (3, 24, 24)
    assert (out.flatten(1).float().mean(1) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 3


@pytest.mark.parametrize(
    "mode, kind", [("L", "PNG"), ("LA", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG")]
)
def test_colour_modes(mode, kind):
    image = quadrants()
    expected = COLORS
    if mode in ("L", "LA", "1"):
        image = image.convert("L").point(lambda value: 255 * (value > 100))
        expected = [[v] * 3 for v in (0, 255, 0, 255)]
    out = decode_image(encode(image.convert(mode), kind), 64)
    for ours, theirs in zip(corners(out), expected):
        assert max(abs(a - b) for a, b in zip(ours, theirs)) <= 3


def test_cmyk_jpegs_keep_their_colours():
    out = decode_image(encode(quadrants().convert("CMYK"), "JPEG", quality=95), 64)
    for ours, theirs in zip(corners(out), COLORS):
        assert max(abs(a - b) for a, b in zip(ours, theirs)) <= 8


def test_sixteen_bit_greys_are_scaled():
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    out = decode_image(encode(Image.fromarray(grey)), 64)
    assert np.array_equal(out[0].numpy(), (grey >> 8).astype(np.uint8))
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pictures_stand_upright(orientation, kind):
    """A camera stores what its sensor saw and marks how to turn it; here every such picture is the same one, upright."""
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    image = quadrants()
    for turn in stored[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for size in (64, 16):
        out = decode_image(encode(image, kind, exif=exif), size)
        assert all(abs(a - b) <= 3 for ours, theirs in zip(corners(out), COLORS) for a, b in zip(ours, theirs))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_mark_is_as_good_as_none():
    for exif in (b"Exif\0\0", b"Exif\0\0garbage that is no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"):
        out = decode_image(encode(quadrants(), "JPEG", exif=exif), 64)
        assert all(abs(a - b) <= 3 for ours, theirs in zip(corners(out), COLORS) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damage_is_a_data_error(kind):
    """Cut anywhere, or with bytes overwritten: a picture or a `DataError`, never anything else."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    whole, rng = encode(Image.fromarray(pixels), kind), random.Random(0)
    for cut in [0, 1, 10, *(rng.randrange(len(whole) * 3 // 4) for _ in range(30))]:
        with pytest.raises(DataError, match="not a complete picture"):
            decode_image(whole[:cut], 16)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decode_image(bytes(damaged), 16).shape == (3, 16, 16)
        except DataError as error:
            assert "not a complete picture" in str(error)


def test_a_decompression_bomb_is_a_data_error():
    whole = bytearray(encode(Image.new("L", (8, 8))))
    whole[16:24] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(DataError):
        decode_image(bytes(whole), 16)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [16, 64])
def test_a_view_is_a_part_of_the_upright_picture(orientation, size):
    image = quadrants(256)
    if orientation == 6:  # stored as the sensor saw it
        image = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation

    def shown(view: View) -> list[list[int]]:
        return corners(decode_image(encode(image, "JPEG", exif=exif, quality=95), size, view=view))

    red, green, blue, white = COLORS
    expected = {
        View(0, 0, 1, 1): [red, green, blue, white],
        View(0, 0, 1, 1, mirrored=True): [green, red, white, blue],
        View(0.5, 0, 1, 1): [green, green, white, white],
        View(0, 0.5, 1, 1, mirrored=True): [white, blue, white, blue],
        View(0, 0, 0.4, 0.4): [red] * 4,
    }
    for view, colors in expected.items():
        assert max(abs(a - b) for ours, theirs in zip(shown(view), colors) for a, b in zip(ours, theirs)) <= 8, view


def test_drawn_views_keep_their_share_and_stay_inside():
    rng = random.Random(0)
    views = [draw_view(0.6, True, rng) for _ in range(2000)]
    for view in views:
        assert view.left >= 0 and view.right <= 1 and view.right - view.left >= 0.6
        assert view.top >= 0 and view.bottom <= 1 and view.bottom - view.top >= 0.6
    assert 0.45 < sum(view.mirrored for view in views) / len(views) < 0.55
    assert min(v.right - v.left for v in views) < 0.62 and max(v.right - v.left for v in views) > 0.98
    assert not any(draw_view(0.6, False, rng).mirrored for _ in range(100))
