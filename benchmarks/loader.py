"""Samples/s of the data stream as the trainer reads it, against open_clip's pipeline on the same shards, and its limit.

    python -m benchmarks.loader [--rounds 5] [--samples 768] [--photos 128] [--flickr8k FOLDER]

All three decode the same JPEGs and squash them to 224 x 224, bicubic:

    metalm      shards -> task `captioning` -> packed batches of uint8 pictures; normalisation is the device's
    open_clip   its own `get_wds_dataset` for training: shards -> shuffle -> transform, float32 -> tokens -> batch
    limit       as many processes that decode and resize pictures in memory and do nothing else

Both loaders are read from shards of public layout (jpg + txt) by as many workers, begun anew each round (which gives the
time to the first batch); the clock starts when the workers are at work. Who goes first alternates. Photos are noise with
the spectrum of natural pictures (amplitude 1/f; 500 x 375, quality 90, about 120 kB, as those of Flickr8k before
anybody shrank them), or those of a folder with Flickr8k's images.zip.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import random
import tempfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from metalm.config import build
from metalm.connectors.base import ConnectorConfig
from metalm.data.prompts import Interface
from metalm.data.stream import DataConfig, Loader, PackedStream
from metalm.data.tokenizer import Tokenizer
from metalm.encoders.image import ImageProcessor

SIZE = 224
PATCHES = (SIZE // 16) ** 2
WORDS = ["a", "two", "dog", "man", "girl", "red", "small", "runs", "jumps", "in", "over", "the", "grass", "water", "with", "of"]
WORKERS, SHARDS, BATCH = 2, 8, 32


def photo(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of noise whose amplitude falls with the frequency, as that of natural pictures does; channels correlate."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    grey, *colors = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency) for _ in range(4))
    channels = [grey + 0.4 * color for color in colors]
    pixels = np.stack([channel / channel.std() * 50 + 120 for channel in channels], axis=-1)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def flickr8k_photos(folder: Path, count: int) -> list[bytes]:
    with zipfile.ZipFile(folder / "images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return [archive.read(name) for name in names[:count]]


def captions(count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(7, 15))) for _ in range(count)]


def write(photos: list[bytes], texts: list[str], folder: Path) -> None:
    """Shards of public layout, in which the photos take turns."""
    import webdataset as wds

    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard:06d}.tar")) as writer:
            for n in range(shard, len(texts), SHARDS):
                writer.write({"__key__": f"{n:06d}", "jpg": photos[n % len(photos)], "txt": texts[n]})


def metalm_batches(folder: Path, tokenizer: Tokenizer) -> Iterator[int]:
    """The number of samples of each batch of METALM's stream."""
    row = 2 * (PATCHES + 30)
    processors = {"image": ImageProcessor(SIZE, PATCHES, "bicubic")}
    interface = Interface(tokenizer, processors, {"image": ConnectorConfig("linear")}, max_length=row)
    source = {"shards": str(folder), "task": "captioning"}
    config = build(DataConfig, {"train": [source], "row_length": row, "rows": BATCH // 2, "workers": WORKERS}, "benchmark")
    for batch in Loader(PackedStream(config.train, interface, config)):
        yield len(batch.spans["image"].inputs["pixels_N3HW"])


def open_clip_batches(folder: Path, tokenizer: Callable) -> Iterator[int]:
    """The same of open_clip's: its training pipeline, with its transform for squashing a picture."""
    import webdataset as wds
    from open_clip import image_transform
    from open_clip_train import data

    arguments = Namespace(
        train_data=str(folder / f"{{{0:06d}..{SHARDS - 1:06d}}}.tar"),
        train_num_samples=1_000_000,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=BATCH,
        world_size=1,
        workers=WORKERS,
    )
    transform = image_transform(SIZE, is_train=False, resize_mode="squash", interpolation="bicubic")
    # Its own grouping stops at the records with which webdataset 1.0 marks the end of a shard; this is that of its evaluation.
    with patch.object(data, "tarfile_to_samples_nothrow", wds.tarfile_to_samples()):
        loader = data.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer).dataloader
    for images, _ in loader:
        yield len(images)


def timed(batches: Iterator[int], samples: int) -> tuple[float, float]:
    """Seconds to the first batch, and samples/s from then on, once both workers have given some."""
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter() - start
    for _ in range(2 * WORKERS):
        next(batches)
    start, seen = time.perf_counter(), 0
    while seen < samples:
        seen += next(batches)
    rate = seen / (time.perf_counter() - start)
    batches.close()
    return first, rate


def limit(photos: list[bytes], samples: int) -> float:
    """Samples/s of decoding and resizing alone, in as many processes."""
    ready, results = multiprocessing.Barrier(WORKERS), multiprocessing.SimpleQueue()
    processes = [
        multiprocessing.Process(target=decode_and_resize, args=(photos, samples // WORKERS, ready, results))
        for _ in range(WORKERS)
    ]
    for process in processes:
        process.start()
    seconds = max(results.get() for _ in processes)
    for process in processes:
        process.join()
    return samples // WORKERS * WORKERS / seconds


def decode_and_resize(photos: list[bytes], count: int, ready, results) -> None:
    """What the loader must do to a picture, without anything around it."""
    torch.set_num_threads(1)
    for n, encoded in enumerate(itertools.islice(itertools.cycle(photos), count + 8)):
        if n == 8:  # warm
            ready.wait()
            start = time.perf_counter()
        pixels_HW3 = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded))))
        interpolate(pixels_HW3.permute(2, 0, 1)[None], (SIZE, SIZE), mode="bicubic", antialias=True)
    results.put(time.perf_counter() - start)


def measure(rounds: int = 5, samples: int = 768, photos: list[bytes] | None = None) -> dict[str, float]:
    """Medians over rounds: samples/s and seconds to the first batch of each side, and METALM's rate to the others'."""
    from open_clip import get_tokenizer

    rng = np.random.default_rng(0)
    photos = photos or [photo(rng) for _ in range(128)]
    texts = captions(1024)
    tokenizer, clip_tokenizer = Tokenizer.train(texts, 1000), get_tokenizer("ViT-B-32")
    taken: dict[str, list[tuple[float, float]]] = {"metalm": [], "open_clip": [], "limit": []}
    with tempfile.TemporaryDirectory() as folder:
        write(photos, texts, Path(folder))
        sides = {
            "metalm": lambda: timed(metalm_batches(Path(folder), tokenizer), samples),
            "open_clip": lambda: timed(open_clip_batches(Path(folder), clip_tokenizer), samples),
            "limit": lambda: (0.0, limit(photos, samples)),
        }
        for round_ in range(rounds):
            for name in list(sides) if round_ % 2 == 0 else reversed(sides):
                taken[name].append(sides[name]())
    rates = {name: [rate for _, rate in values] for name, values in taken.items()}
    first = {name: [seconds for seconds, _ in values] for name, values in taken.items()}
    return {
        **{name: median(values) for name, values in rates.items()},
        "ratio": median(ours / peer for ours, peer in zip(rates["metalm"], rates["open_clip"])),
        "share": median(ours / most for ours, most in zip(rates["metalm"], rates["limit"])),
        "metalm_first": median(first["metalm"]),
        "open_clip_first": median(first["open_clip"]),
        "first_ratio": median(peer / ours for ours, peer in zip(first["metalm"], first["open_clip"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=768, help="a round and side")
    parser.add_argument("--photos", type=int, default=128, help="different ones")
    parser.add_argument("--flickr8k", type=Path, help="folder with images.zip, whose photos are taken in place of noise")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    many = arguments.photos
    photos = flickr8k_photos(arguments.flickr8k, many) if arguments.flickr8k else [photo(rng) for _ in range(many)]
    result = measure(arguments.rounds, arguments.samples, photos)
    print(f"{many} photos of {sum(map(len, photos)) / many / 1000:,.0f} kB, {WORKERS} workers, {SIZE} x {SIZE}")
    print(f"METALM {result['ratio']:.2f} x open_clip's pipeline, {result['share']:.0%} of decoding and resizing alone")
    for name in ("metalm", "open_clip", "limit"):
        first = f"  first batch after {result[f'{name}_first']:.2f} s" if name != "limit" else ""
        print(f"  {name:9s} {result[name]:7,.0f} samples/s{first}")


if __name__ == "__main__":
    main()
