"""The embedded world: pictures of coloured shapes, captions, text-only descriptions, and questions.

Everything is drawn from a seed. A scene holds one to three objects (shape, colour) in cells of a 3 x 3 grid. Six of the
36 colour-shape pairs are held out: no image of pretraining or fine-tuning shows one, every evaluated question is asked on
an image that does.

    images       pretraining: pictures with captions in varied wording (listings, attributes, counts, places); no question
    text         pretraining: descriptions of scenes that are never drawn, with captions of the same kinds
    questions    pretraining: descriptions with questions on them
    vqa          evaluation: pictures with held-out pairs, and questions
    captioning   fine-tuning: pictures with one caption in a fixed form; `captioning-val` to evaluate, held-out pairs included

VQA is therefore zero-shot in earnest: a question about a picture is first met at evaluation. What a question means has to
be learned from text and carried over to pictures by the docked encoder.
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metalm.data.sample import Question, Sample
from metalm.data.shards import write_shards

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 170),
    "orange": (245, 125, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
HELD_OUT = frozenset(zip(COLORS, SHAPES))  # the diagonal: each colour and each shape is seen in five other pairs
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three")
CAPTIONS = 10  # of a scene
IMAGE_SIZE = 48
CELL = IMAGE_SIZE // 3


@dataclass(frozen=True)
class Thing:
    """An object of a scene; `row` and `column` are 0..2."""

    color: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


Scene = list[Thing]


def random_scene(rng: random.Random, held_out: bool | None) -> Scene:
    """One to three things in reading order.

    Args:
        held_out: False: no held-out pair; True: at least one; None: as it comes.
    """
    while True:
        cells = rng.sample(range(9), rng.choice((1, 2, 2, 3, 3)))
        things = [Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), *divmod(cell, 3)) for cell in sorted(cells)]
        found = any((thing.color, thing.shape) in HELD_OUT for thing in things)
        if held_out is None or found == held_out:
            return things


def draw(scene: Scene, rng: random.Random) -> bytes:
    """The scene as a PNG of 48 x 48 pixels: jittered places, sizes, shades and background."""
    from PIL import Image, ImageDraw

    scale = 4  # drawn large, then reduced: smooth edges
    grey = rng.randint(215, 255)
    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        radius = CELL * scale * rng.uniform(0.36, 0.5)
        slack = CELL * scale / 2 - radius
        x = (thing.column + 0.5) * CELL * scale + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * CELL * scale + rng.uniform(-slack, slack)
        color = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLORS[thing.color])
        _draw_shape(canvas, thing.shape, x, y, radius, color)
    out = io.BytesIO()
    image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX).save(out, "PNG")
    return out.getvalue()


def _draw_shape(canvas, shape: str, x: float, y: float, r: float, color: tuple[int, ...]) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        canvas.ellipse(box, fill=color)
    elif shape == "ring":
        canvas.ellipse(box, outline=color, width=max(2, round(0.42 * r)))
    elif shape == "square":
        canvas.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=color)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=color)
    elif shape == "star":
        radii = [r if i % 2 == 0 else 0.42 * r for i in range(10)]
        angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
        canvas.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for s, a in zip(radii, angles)], fill=color)
    else:
        arm = 0.3 * r
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=color)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=color)


# ---- language ----------------------------------------------------------------------------------------------------------


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


@dataclass(frozen=True)
class Wording:
    """How a listing puts each thing, and what it puts around them all."""

    forms: tuple[str, ...]
    frames: tuple[str, ...]


SENTENCES = Wording(
    ("in the {t.place} {a_color} {t.shape}", "{a_shape} that is {t.color} in the {t.place}"),
    ("{}", "there is {}", "a picture, {}", "we see {}"),
)
# As people label pictures in a hurry. Whatever is known of a thing is here followed at once by whatever is asked of it, so
# that looking up one by the other is learned a step at a time; in sentences words stand between them.
NOTES = Wording(
    tuple(" ".join(order) for order in itertools.permutations(("{t.color}", "{t.shape}", "{t.place}"))),
    ("{}", "a picture, {}"),
)


def listing(scene: Scene, rng: random.Random, wording: Wording = SENTENCES) -> str:
    """The things with place, colour and shape, in any order, all in one form."""
    form = rng.choice(wording.forms)
    parts = [
        form.format(t=t, a_color=with_article(t.color), a_shape=with_article(t.shape)) for t in rng.sample(scene, len(scene))
    ]
    return rng.choice(wording.frames).format(", ".join(parts))


@dataclass(frozen=True)
class Fact:
    """Something true of a scene, sayable as a statement and askable as a question; the answer ends the statement."""

    type: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str

    def statement(self, rng: random.Random) -> str:
        return f"{rng.choice(self.statements)} {self.answer}"


def facts(scene: Scene, rng: random.Random) -> list[Fact]:
    """One fact of every type that the scene has, in random order, so that all types are about as frequent."""
    found: dict[str, list[Fact]] = {}
    for fact in (*_attributes(scene), *_counts(scene), *_existence(scene, rng), *_relations(scene)):
        found.setdefault(fact.type, []).append(fact)
    return [rng.choice(found[name]) for name in rng.sample(list(found), len(found))]


def _unique(scene: Scene, attribute: Callable[[Thing], str]) -> list[Thing]:
    values = [attribute(thing) for thing in scene]
    return [thing for thing in scene if values.count(attribute(thing)) == 1]


def _attributes(scene: Scene) -> Iterator[Fact]:
    for thing in _unique(scene, lambda thing: thing.shape):
        name = thing.shape
        yield Fact("color", (f"the color of the {name} is", f"the {name} is"), (f"what color is the {name}?",), thing.color)
        yield Fact("place", (f"the place of the {name} is", f"the {name} is in the"), (f"where is the {name}?",), thing.place)
    for thing in _unique(scene, lambda thing: thing.color):
        name = f"{thing.color} thing"
        yield Fact("shape", (f"the shape of the {name} is a", f"the {name} is a"), (f"what shape is the {name}?",), thing.shape)


def _counts(scene: Scene) -> Iterator[Fact]:
    count = NUMBERS[len(scene)]
    yield Fact("count", ("the number of things is", "things in all:"), ("how many things are there?",), count)
    for shape in sorted({thing.shape for thing in scene}):
        count = NUMBERS[sum(thing.shape == shape for thing in scene)]
        yield Fact("count", (f"the number of {plural(shape)} is",), (f"how many {plural(shape)} are there?",), count)


def _existence(scene: Scene, rng: random.Random) -> Iterator[Fact]:
    names = {thing.name for thing in scene}
    for thing in scene[:2]:
        # A near miss: the colour or the shape is there, the pair is not.
        color, shape = rng.choice(
            [(c, thing.shape) for c in COLORS if f"{c} {thing.shape}" not in names]
            + [(thing.color, s) for s in SHAPES if f"{thing.color} {s}" not in names]
        )
        for name, answer in ((thing.name, "yes"), (f"{color} {shape}", "no")):
            yield Fact("exists", (f"{with_article(name)} in the picture:",), (f"is there {with_article(name)}?",), answer)


def _relations(scene: Scene) -> Iterator[Fact]:
    things = _unique(scene, lambda thing: thing.shape)
    for thing in things:
        for word, others in (
            ("left of", [t for t in scene if t.column < thing.column]),
            ("right of", [t for t in scene if t.column > thing.column]),
            ("above", [t for t in scene if t.row < thing.row]),
            ("below", [t for t in scene if t.row > thing.row]),
        ):
            if len(others) == 1:
                where = f"{word} the {thing.shape}"
                yield Fact("relation", (f"the thing {where} is the",), (f"what is {where}?",), others[0].name)


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Captions of pretraining: most of them one statement, some a listing.

    Most end where a fact is told, as answers do; after longer ones the model would go on talking when it is asked.
    """
    chosen = rng.choices((SENTENCES, NOTES, None), (0.15, 0.2, 0.65), k=CAPTIONS)
    return [listing(scene, rng, wording) if wording else facts(scene, rng)[0].statement(rng) for wording in chosen]


def canonical_caption(scene: Scene) -> str:
    """The fixed form of fine-tuning: every thing with colour and shape, in reading order."""
    parts = [with_article(thing.name) for thing in scene]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---- samples -----------------------------------------------------------------------------------------------------------


def ask(scene: Scene, rng: random.Random, number: int) -> list[Question]:
    """Up to `number` questions, each of another type."""
    return [
        Question(str(i), rng.choice(fact.questions), [fact.answer], type=fact.type)
        for i, fact in enumerate(facts(scene, rng)[:number])
    ]


def image_samples(seed: int, count: int) -> Iterator[Sample]:
    for i in range(count):
        rng = random.Random(f"images {seed} {i}")
        scene = random_scene(rng, held_out=False)
        yield Sample(f"image-{i:06d}", draw(scene, rng), captions=captions(scene, rng))


def text_samples(seed: int, count: int) -> Iterator[Sample]:
    """Descriptions of scenes that are not drawn, with captions as an image has them."""
    for i in range(count):
        rng = random.Random(f"text {seed} {i}")
        scene = random_scene(rng, held_out=None)
        yield Sample(f"text-{i:06d}", text=listing(scene, rng) + ".", captions=captions(scene, rng))


def question_samples(seed: int, count: int) -> Iterator[Sample]:
    for i in range(count):
        rng = random.Random(f"questions {seed} {i}")
        scene = random_scene(rng, held_out=None)
        yield Sample(f"question-{i:06d}", text=listing(scene, rng) + ".", questions=ask(scene, rng, 4))


def vqa_samples(seed: int, count: int) -> Iterator[Sample]:
    for i in range(count):
        rng = random.Random(f"vqa {seed} {i}")
        scene = random_scene(rng, held_out=True)
        yield Sample(f"vqa-{i:06d}", draw(scene, rng), questions=ask(scene, rng, 4))


def captioning_samples(seed: int, count: int, split: str) -> Iterator[Sample]:
    for i in range(count):
        rng = random.Random(f"captioning {split} {seed} {i}")
        scene = random_scene(rng, held_out=False if split == "train" else None)
        yield Sample(f"caption-{split}-{i:06d}", draw(scene, rng), captions=[canonical_caption(scene)])


def write_scenes(out: str | Path, seed: int = 0, size: int = 20_000) -> dict[str, int]:
    """Writes the world's data sets below `out`; returns how many samples each has.

    Args:
        size: number of pretraining images, and of texts; the other sets are in proportion.
    """
    parts = {
        "images": image_samples(seed, size),
        "text": text_samples(seed, size),
        "questions": question_samples(seed, size),
        "vqa": vqa_samples(seed, max(size // 40, 8)),
        "captioning": captioning_samples(seed, max(size // 4, 8), "train"),
        "captioning-val": captioning_samples(seed, max(size // 40, 8), "val"),
    }
    per_shard = max(1, size // 32)
    counts = {}
    for name, samples in parts.items():
        index = write_shards(samples, Path(out) / name, per_shard, source=f"embedded scenes, {name}, seed {seed}")
        counts[name] = index["num_samples"]
    return counts
