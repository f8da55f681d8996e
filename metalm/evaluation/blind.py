"""Media without content: what a model says without looking or listening is the first thing to beat."""

from __future__ import annotations

import io
from dataclasses import replace

from metalm.data.sample import Sample
from metalm.errors import ConfigError


def blank(sample: Sample) -> Sample:
    """The sample with even grey pictures and silent sounds of the same sizes.

    Raises:
        ConfigError: it has a film, or states of an encoder alone.
    """
    if any(not sample.encoded[kind] for kind in sample.states):
        raise ConfigError(
            f"sample {sample.key!r}: blind evaluation blanks media, and here are stored states alone; name the shards that "
            "they were encoded from"
        )
    if sample.video is not None:
        raise ConfigError(f"sample {sample.key!r}: blind evaluation is for pictures and sounds, and this one has a film")
    image = sample.image and blank_image(sample.image)
    more = [blank_image(image) for image in sample.more_images]
    return replace(sample, image=image, more_images=more, audio=sample.audio and silence(sample.audio), states={})


def blank_image(encoded: bytes) -> bytes:
    """An even grey PNG of the size of the picture."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        size = image.size
    out = io.BytesIO()
    Image.new("RGB", size, (127, 127, 127)).save(out, "PNG")
    return out.getvalue()


def silence(encoded: bytes) -> bytes:
    """A silent WAV as long as the sound."""
    import numpy as np

    from metalm.data.audio import import_soundfile

    soundfile = import_soundfile()

    info = soundfile.info(io.BytesIO(encoded))
    out = io.BytesIO()
    soundfile.write(out, np.zeros(info.frames, dtype=np.int16), info.samplerate, format="WAV")
    return out.getvalue()
