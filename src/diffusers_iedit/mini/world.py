"""The mini world: pictures drawn in code, with their captions, exact masks and exact edits.

A scene holds one thing ("a red car on green grass") or two side by side ("a red car and a blue ball on green grass",
the left one named first); a large scene is a grid of scenes in one picture, with small things. Everything follows from
an integer seed, on every machine. Because the picture is drawn and not photographed, the true mask of each thing and
the true picture after an edit are known.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


SIZE = 64
SUPERSAMPLING = 4

NOUNS = ("car", "bus", "boat", "house", "tree", "flower", "fish", "bird", "cat", "cup", "hat", "ball")

COLOURS = {
    "red": (212, 32, 38),
    "orange": (250, 138, 18),
    "yellow": (252, 224, 56),
    "green": (34, 142, 58),
    "blue": (40, 88, 216),
    "purple": (124, 44, 164),
    "pink": (255, 138, 194),
    "white": (244, 244, 244),
}

# Phrase of the caption -> (sky at the top, sky at the horizon, ground at the horizon, ground at the bottom), RGB.
SCENES = {
    "on green grass": ((150, 200, 240), (205, 228, 240), (124, 186, 84), (88, 156, 60)),
    "on a sandy beach": ((92, 186, 206), (150, 216, 222), (232, 210, 160), (214, 184, 126)),
    "in deep snow": ((172, 186, 206), (204, 214, 226), (226, 234, 242), (200, 212, 228)),
    "on a grey road": ((196, 190, 182), (216, 210, 202), (132, 132, 136), (96, 96, 102)),
    "on calm water": ((240, 196, 172), (248, 222, 196), (98, 152, 184), (58, 108, 150)),
    "under a night sky": ((16, 20, 52), (40, 44, 88), (52, 56, 72), (34, 36, 50)),
}

# Seeds of the scenes in large pictures, which nothing else uses: trainings draw from 1,000,000 up, pools from 200,000
# up, benchmarks and measurements from below 160,000.
LARGE_SCENE_SEEDS = range(160_000, 200_000)

DARK, LIGHT, GLASS, WOOD, SKIN = (44, 42, 50), (250, 250, 246), (190, 224, 240), (122, 80, 48), (250, 176, 60)

Split = Literal["train", "held_out"]


class _Pen:
    """Draws in unit coordinates, (0, 0) top left to (1, 1) bottom right of a thing's box, on a supersampled tile."""

    def __init__(self, image: Image.Image, box: tuple[int, int, int, int], ink=None):
        self.draw, self.box, self.ink = ImageDraw.Draw(image), box, ink

    def _points(self, points):
        left, top, right, bottom = self.box
        return [(left + x * (right - left), top + y * (bottom - top)) for x, y in points]

    def polygon(self, fill, *points):
        self.draw.polygon(self._points(points), fill=self.ink or fill)

    def rectangle(self, fill, x0, y0, x1, y1, radius=0.0):
        radius *= self.box[2] - self.box[0]
        self.draw.rounded_rectangle(self._points([(x0, y0), (x1, y1)]), radius, fill=self.ink or fill)

    def ellipse(self, fill, x0, y0, x1, y1):
        self.draw.ellipse(self._points([(x0, y0), (x1, y1)]), fill=self.ink or fill)

    def arc(self, fill, x0, y0, x1, y1, start, end, width):
        width = round(width * (self.box[2] - self.box[0]))
        self.draw.arc(self._points([(x0, y0), (x1, y1)]), start, end, fill=self.ink or fill, width=width)


def _draw_thing(pen: _Pen, noun: str, colour: str) -> None:
    """One filled silhouette per noun, each about as big as its box, so that any thing fits where another one stood."""
    body = COLOURS[colour]
    shade = tuple(round(0.68 * channel) for channel in body)

    if noun == "car":
        pen.polygon(body, (0.2, 0.5), (0.3, 0.12), (0.72, 0.12), (0.86, 0.5))
        pen.rectangle(body, 0.0, 0.42, 1.0, 0.84, radius=0.12)
        pen.polygon(GLASS, (0.29, 0.45), (0.36, 0.2), (0.5, 0.2), (0.5, 0.45))
        pen.polygon(GLASS, (0.56, 0.45), (0.56, 0.2), (0.68, 0.2), (0.77, 0.45))
        for x in (0.24, 0.76):
            pen.ellipse(DARK, x - 0.16, 0.68, x + 0.16, 1.0)
            pen.ellipse(LIGHT, x - 0.06, 0.78, x + 0.06, 0.9)
    elif noun == "bus":
        pen.rectangle(body, 0.0, 0.0, 1.0, 0.88, radius=0.1)
        for y in (0.1, 0.44):
            for x in (0.1, 0.4, 0.7):
                pen.rectangle(GLASS, x, y, x + 0.2, y + 0.2)
        for x in (0.25, 0.75):
            pen.ellipse(DARK, x - 0.13, 0.74, x + 0.13, 1.0)
    elif noun == "boat":
        pen.polygon(body, (0.46, 0.0), (0.46, 0.64), (0.0, 0.64))
        pen.polygon(body, (0.54, 0.1), (0.98, 0.64), (0.54, 0.64))
        pen.rectangle(WOOD, 0.46, 0.0, 0.54, 0.7)
        pen.polygon(shade, (0.0, 0.66), (1.0, 0.66), (0.82, 1.0), (0.18, 1.0))
    elif noun == "house":
        pen.rectangle(body, 0.08, 0.42, 0.92, 1.0)
        pen.polygon(shade, (0.5, 0.0), (1.0, 0.46), (0.0, 0.46))
        pen.rectangle(WOOD, 0.2, 0.6, 0.44, 1.0)
        pen.rectangle(GLASS, 0.56, 0.58, 0.8, 0.8)
    elif noun == "tree":
        pen.rectangle(WOOD, 0.38, 0.75, 0.62, 1.0)
        pen.polygon(shade, (0.62, 0.3), (1.0, 0.84), (0.0, 0.84), (0.38, 0.3))
        pen.polygon(body, (0.62, 0.14), (0.96, 0.62), (0.04, 0.62), (0.38, 0.14))
        pen.polygon(shade, (0.56, 0.02), (0.88, 0.4), (0.12, 0.4), (0.44, 0.02))
        pen.polygon(body, (0.56, 0.0), (0.86, 0.34), (0.14, 0.34), (0.44, 0.0))
    elif noun == "flower":
        for petal in range(6):
            x, y = 0.5 + 0.31 * math.cos(math.pi * petal / 3), 0.5 + 0.31 * math.sin(math.pi * petal / 3)
            pen.ellipse(body, x - 0.2, y - 0.2, x + 0.2, y + 0.2)
        pen.ellipse(WOOD, 0.31, 0.31, 0.69, 0.69)
        pen.ellipse(SKIN, 0.38, 0.38, 0.62, 0.62)
    elif noun == "fish":
        pen.polygon(shade, (0.6, 0.5), (1.0, 0.08), (0.94, 0.5), (1.0, 0.92))
        pen.polygon(shade, (0.24, 0.25), (0.5, 0.0), (0.62, 0.3))
        pen.ellipse(body, 0.0, 0.1, 0.82, 0.92)
        pen.arc(shade, 0.04, 0.14, 0.38, 0.88, -70, 70, 0.06)
        pen.ellipse(LIGHT, 0.1, 0.3, 0.29, 0.49)
        pen.ellipse(DARK, 0.14, 0.34, 0.25, 0.45)
    elif noun == "bird":
        pen.polygon(shade, (0.0, 0.3), (0.34, 0.46), (0.12, 0.74))
        pen.polygon(SKIN, (0.84, 0.14), (1.0, 0.27), (0.84, 0.38))
        pen.rectangle(SKIN, 0.38, 0.88, 0.44, 1.0)
        pen.rectangle(SKIN, 0.56, 0.88, 0.62, 1.0)
        pen.ellipse(body, 0.08, 0.3, 0.9, 0.94)
        pen.ellipse(body, 0.46, 0.0, 0.92, 0.54)
        pen.ellipse(shade, 0.18, 0.46, 0.6, 0.76)
        pen.ellipse(DARK, 0.68, 0.14, 0.8, 0.26)
    elif noun == "cat":
        pen.polygon(body, (0.04, 0.0), (0.46, 0.26), (0.06, 0.56))
        pen.polygon(body, (0.96, 0.0), (0.54, 0.26), (0.94, 0.56))
        pen.ellipse(body, 0.0, 0.18, 1.0, 1.0)
        for x in (0.29, 0.71):
            pen.ellipse(LIGHT, x - 0.13, 0.4, x + 0.13, 0.66)
            pen.ellipse(DARK, x - 0.06, 0.42, x + 0.06, 0.64)
        pen.polygon(DARK, (0.4, 0.7), (0.6, 0.7), (0.5, 0.82))
    elif noun == "cup":
        pen.ellipse(shade, 0.5, 0.26, 1.0, 0.8)
        pen.ellipse(LIGHT, 0.66, 0.42, 0.86, 0.64)
        pen.rectangle(body, 0.0, 0.1, 0.76, 1.0, radius=0.14)
        pen.ellipse(shade, 0.0, 0.0, 0.76, 0.3)
        pen.ellipse(DARK, 0.08, 0.06, 0.68, 0.25)
    elif noun == "hat":
        pen.rectangle(body, 0.2, 0.02, 0.8, 0.8, radius=0.08)
        pen.rectangle(DARK, 0.2, 0.52, 0.8, 0.7)
        pen.ellipse(body, 0.0, 0.66, 1.0, 0.98)
    elif noun == "ball":
        pen.ellipse(body, 0.0, 0.0, 1.0, 1.0)
        pen.rectangle(DARK, 0.47, 0.0, 0.53, 1.0)
        pen.rectangle(DARK, 0.0, 0.47, 1.0, 0.53)
        pen.arc(DARK, -0.62, 0.02, 0.34, 0.98, -50, 50, 0.06)
        pen.arc(DARK, 0.66, 0.02, 1.62, 0.98, 130, 230, 0.06)


def _value_noise(rng: random.Random, cells: int) -> np.ndarray:
    """Smooth noise, (SIZE, SIZE) in [-1, 1]: a coarse random grid, interpolated linearly."""
    grid = np.array([[2 * rng.random() - 1 for _ in range(cells + 1)] for _ in range(cells + 1)])
    position = (np.arange(SIZE) + 0.5) * cells / SIZE
    cell = position.astype(int)
    fraction = position - cell
    rows = grid[cell] * (1 - fraction[:, None]) + grid[cell + 1] * fraction[:, None]
    return rows[:, cell] * (1 - fraction) + rows[:, cell + 1] * fraction


def _background(scene: str, seed: int) -> Image.Image:
    """Sky over ground with a gentle texture, RGB, SIZE x SIZE."""
    rng = random.Random(seed)
    sky_top, sky_low, ground_high, ground_low = (np.array(colour, dtype=float) for colour in SCENES[scene])
    horizon = SIZE * (0.34 + 0.1 * rng.random())
    y = np.arange(SIZE)[:, None] + 0.5
    sky = sky_top + (sky_low - sky_top) * np.minimum(y / horizon, 1)
    ground = ground_high + (ground_low - ground_high) * np.maximum((y - horizon) / (SIZE - horizon), 0)
    # The horizon falls inside a pixel row, which mixes sky and ground.
    below = np.clip(y + 0.5 - horizon, 0, 1)
    picture = (sky * (1 - below) + ground * below)[:, None, :] + np.zeros((1, SIZE, 1))
    texture = 5 * _value_noise(rng, 4) + 4 * below * _value_noise(rng, 10)
    picture += texture[:, :, None] + 6 * (2 * rng.random() - 1)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Thing:
    """A thing in a scene: what it is, its colour, and its square box (left, top, side) in supersampled pixels."""

    noun: str
    colour: str
    box: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The words that name it: "red car"."""
        return f"{self.colour} {self.noun}"

    def _paint(self, image: Image.Image, ink=None) -> None:
        left, top, side = self.box
        _draw_thing(_Pen(image, (left, top, left + side, top + side), ink), self.noun, self.colour)

    @cached_property
    def _silhouette(self) -> Image.Image:
        """All that the thing covers, its outline included: PIL L, supersampled, binary."""
        silhouette = Image.new("L", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
        self._paint(silhouette, ink=255)
        return silhouette.filter(ImageFilter.MaxFilter(5))

    @cached_property
    def mask(self) -> Image.Image:
        """Every pixel that the thing touches: PIL L, SIZE x SIZE, 255 = the thing, 0 elsewhere."""
        coverage = np.asarray(self._silhouette).reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
        return Image.fromarray(coverage.max(axis=(1, 3)))

    def draw(self, image: Image.Image) -> None:
        """Draws the thing with a dark outline onto a supersampled RGB image."""
        image.paste(tuple(round(0.3 * channel) for channel in COLOURS[self.colour]), mask=self._silhouette)
        self._paint(image)


@dataclass(frozen=True)
class Scene:
    """A picture of the mini world, described completely. `focus` is the index of the thing that an edit concerns."""

    things: tuple[Thing, ...]
    scene: str
    background_seed: int
    focus: int = 0

    @cached_property
    def image(self) -> Image.Image:
        """The picture: PIL RGB, SIZE x SIZE."""
        image = _background(self.scene, self.background_seed)
        image = image.resize((SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), Image.Resampling.NEAREST)
        for thing in self.things:
            thing.draw(image)
        return image.reduce(SUPERSAMPLING)

    @property
    def caption(self) -> str:
        return caption([(thing.noun, thing.colour) for thing in self.things], self.scene)

    @property
    def masks(self) -> tuple[Image.Image, ...]:
        """The mask of each thing, left to right: PIL L, SIZE x SIZE, 255 = the thing. They are disjoint."""
        return tuple(thing.mask for thing in self.things)

    @property
    def thing(self) -> Thing:
        """The thing that an edit concerns."""
        return self.things[self.focus]

    @property
    def mask(self) -> Image.Image:
        """The mask of the thing that an edit concerns."""
        return self.thing.mask

    @property
    def held_out(self) -> bool:
        """Whether a combination in this scene is in no training picture."""
        return any((thing.noun, thing.colour, self.scene) in held_out_combinations() for thing in self.things)

    def swap(self, thing: str | None = None, colour: str | None = None, index: int | None = None) -> Scene:
        """The true edit: another thing or colour at the same place (of thing `index`, by default the focus).

        Background, places and all other things stay as they are, so the pictures differ only inside the old and the
        new thing's masks. `captions` lists the result's caption unless the swap repeats the other thing or its colour.
        """
        index = self.focus if index is None else index
        old = self.things[index]
        new = Thing(thing or old.noun, colour or old.colour, old.box)
        if new.noun not in NOUNS or new.colour not in COLOURS:
            raise ValueError(
                f"The mini world has no {new.name}. Things: {', '.join(NOUNS)}; colours: {', '.join(COLOURS)}."
            )
        return replace(self, things=(*self.things[:index], new, *self.things[index + 1 :]), focus=index)


@dataclass(frozen=True)
class LargeScene:
    """grid x grid scenes as one picture, row by row. `focus` is the index of the scene that an edit concerns."""

    scenes: tuple[Scene, ...]
    grid: int
    focus: int

    @cached_property
    def image(self) -> Image.Image:
        """The picture: PIL RGB, grid * SIZE a side."""
        image = Image.new("RGB", (self.grid * SIZE, self.grid * SIZE))
        for index, scene in enumerate(self.scenes):
            image.paste(scene.image, self._cell(index))
        return image

    @property
    def scene(self) -> Scene:
        """The scene that an edit concerns."""
        return self.scenes[self.focus]

    @property
    def caption(self) -> str:
        """The caption of this scene alone."""
        return self.scene.caption

    @property
    def thing(self) -> Thing:
        """The thing that an edit concerns, as its scene has it: `thing.name` are the words that name it."""
        return self.scene.thing

    @property
    def cell(self) -> tuple[int, int, int, int]:
        """The box of this scene in the large picture: left, top, right, bottom, the last two exclusive."""
        return self._cell(self.focus)

    @cached_property
    def mask(self) -> Image.Image:
        """The mask of the thing that an edit concerns: PIL L, as large as the picture, 255 = the thing."""
        mask = Image.new("L", self.image.size)
        mask.paste(self.scene.mask, self.cell)
        return mask

    def swap(self, thing: str | None = None, colour: str | None = None) -> LargeScene:
        """The true edit: another thing or colour in the place of the one that an edit concerns, as in `Scene.swap`."""
        edited = self.scene.swap(thing, colour)
        return replace(self, scenes=(*self.scenes[: self.focus], edited, *self.scenes[self.focus + 1 :]))

    def _cell(self, index: int) -> tuple[int, int, int, int]:
        top, left = (SIZE * place for place in divmod(index, self.grid))
        return left, top, left + SIZE, top + SIZE


def caption(things: list[tuple[str, str]], scene: str) -> str:
    """The caption of (noun, colour) pairs, named from left to right, in a scene of SCENES."""
    named = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}" for noun, colour in things]
    return f"{' and '.join(named)} {scene}"


@lru_cache(maxsize=1)
def held_out_combinations() -> frozenset[tuple[str, str, str]]:
    """The 36 (noun, colour, scene) combinations in no training picture: three of each noun, six of each scene."""
    colours, scenes = list(COLOURS), list(SCENES)
    return frozenset(
        (noun, colours[(3 * i + 5 * j) % len(colours)], scenes[(i + 2 * j) % len(scenes)])
        for i, noun in enumerate(NOUNS)
        for j in range(3)
    )


def held_out_captions() -> list[str]:
    """The captions of these combinations. No training scene of two things contains one of them either."""
    return sorted(caption([(noun, colour)], scene) for noun, colour, scene in held_out_combinations())


def captions(things: Literal[1, 2] | None = None) -> list[str]:
    """All captions that `render` can produce, or only those that name one thing or two."""
    kinds = [(noun, colour) for noun in NOUNS for colour in COLOURS]
    one = [[kind] for kind in kinds]
    two = [[left, right] for left in kinds for right in kinds if left[0] != right[0] and left[1] != right[1]]
    chosen = {1: one, 2: two, None: one + two}[things]
    return [caption(named, scene) for scene in SCENES for named in chosen]


def render(seed: int, things: Literal[1, 2] | None = None, split: Split | None = None) -> Scene:
    """Draws the scene that belongs to a seed; the same seed gives the same picture everywhere.

    Args:
        seed: any integer. The shipped models were trained on seeds from 1,000,000 up, so smaller ones are new to them.
        things: how many things; by default one or two with equal odds.
        split: `"train"` draws only from the combinations of training, `"held_out"` only scenes with one that is in no
            training picture; by default from all.
    """
    # Of all methods of `random`, only random() is promised to give the same numbers in every version of Python.
    rng = random.Random(seed)

    def pick(options):
        return options[int(rng.random() * len(options))]

    def uniform(low, high):
        return low + (high - low) * rng.random()

    count = things or pick((1, 2))
    while True:
        scene = pick(list(SCENES))
        nouns = [pick(NOUNS) for _ in range(count)]
        colours = [pick(list(COLOURS)) for _ in range(count)]
        held_out = any(
            (noun, colour, scene) in held_out_combinations() for noun, colour in zip(nouns, colours, strict=True)
        )
        distinct = len(set(nouns)) == len(set(colours)) == count
        if distinct and split in (None, "held_out" if held_out else "train"):
            break

    drawn = []
    for index, (noun, colour) in enumerate(zip(nouns, colours, strict=True)):
        if count == 1:
            side, x, y = uniform(30, 36), uniform(28, 36), uniform(32, 38)
        else:
            side, x, y = uniform(26, 28), uniform(15.5, 16.1) + 32 * index, uniform(32, 38)
        box = tuple(round(SUPERSAMPLING * value) for value in (x - side / 2, y - side / 2, side))
        drawn.append(Thing(noun, colour, box))
    return Scene(tuple(drawn), scene, background_seed=int(2**32 * rng.random()), focus=pick(range(count)))


def render_large(seed: int, grid: int, things: Literal[1, 2] | None = None, split: Split | None = None) -> LargeScene:
    """Draws grid x grid scenes as one picture: many times the models' size, with one small thing that is to change.

    A thing of its kind stands nowhere else in the picture, in no colour, so that "car" names it as "red car" does.

    Args:
        seed: any integer; the same seed gives the same picture everywhere. No model was trained on its scenes.
        grid: how many scenes a side, 1 or more; the picture has grid * SIZE pixels a side.
        things: how many things every scene has; by default one in the scene that an edit concerns, one or two in the
            others.
        split: of every scene, as in `render`.
    """
    if not isinstance(grid, int) or grid < 1:
        raise ValueError(f"`grid` has to be an integer of at least 1 (scenes a side), but is {grid!r}.")
    rng = random.Random(seed)

    def draw(things):
        return render(LARGE_SCENE_SEEDS[int(rng.random() * len(LARGE_SCENE_SEEDS))], things, split)

    focus, asked = int(rng.random() * grid**2), draw(things or 1)
    scenes: list[Scene] = []
    while len(scenes) < grid**2:
        scene = asked if len(scenes) == focus else draw(things)
        if scene is asked or asked.thing.noun not in [thing.noun for thing in scene.things]:
            scenes.append(scene)
    return LargeScene(tuple(scenes), grid, focus)
