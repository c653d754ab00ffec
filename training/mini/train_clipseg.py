"""Trains the mini CLIPSeg, starting from the mini CLIP, to mark what a text names, and nothing if it is not there.

Half of the pictures are scenes as they are. The others are what a search in a large picture looks at: parts of a
mosaic of scenes, anywhere in it, with things of other sizes, cut by the border, and several of a kind.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    COLOUR_LIST,
    NOUN_LIST,
    SCENE_LIST,
    MiniWorld,
    Run,
    add_run_arguments,
    load_world,
    save_half,
    to_tensor,
)
from transformers import CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, CLIPTokenizer
from transformers import ViTImageProcessorPil as ViTImageProcessor

from diffusers_iedit.mini import SIZE, Scene, caption, render


QUERIES = 5
"""Texts a picture."""

MASK_SIZE = 96
"""Pictures are enlarged for the mask model: its patches are 8 pixels wide, too coarse for 64."""

MOSAIC = 3
"""Scenes a side of a mosaic."""

MOSAIC_THINGS = 2 * MOSAIC**2

SCALES = 0.6, 1.4
"""Of a part of a mosaic, to that of a scene."""

CLEAR = 0.5
"""The share of a thing that a part of a mosaic has to show for the thing to be asked for."""


def build_model(clip: CLIPModel) -> CLIPSegForImageSegmentation:
    """CLIPSeg with the weights of the mini CLIP, its position embeddings stretched to MASK_SIZE."""
    text, vision = clip.config.text_config.to_dict(), clip.config.vision_config.to_dict()
    patches = clip.config.vision_config.image_size // clip.config.vision_config.patch_size
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision | {"image_size": MASK_SIZE},
        projection_dim=clip.config.projection_dim,
        extract_layers=[1, 2, 3],
        reduce_dim=64,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=256,
        use_complex_transposed_convolution=False,
    )
    model = CLIPSegForImageSegmentation._from_config(config, attn_implementation="eager")
    weights = clip.state_dict()
    name = "vision_model.embeddings.position_embedding.weight"
    grid = weights[name][1:].T.reshape(1, -1, patches, patches)
    grid = F.interpolate(grid, size=MASK_SIZE // config.vision_config.patch_size, mode="bicubic")
    weights[name] = torch.cat([weights[name][:1], grid.flatten(2)[0].T])
    model.clip.load_state_dict(weights)
    # transformers starts the decoder's projections with unit variance, which saturates its attention. These let the
    # activations through at their own scale, and the text modulate them gently.
    for projection in (*model.decoder.reduces, model.decoder.film_mul, model.decoder.film_add):
        torch.nn.init.normal_(projection.weight, std=0.03)
    torch.nn.init.ones_(model.decoder.film_mul.bias)
    torch.nn.init.normal_(model.decoder.transposed_convolution.weight, std=0.03)
    return model


def phrase(noun: str, colour: str, scene: str, rng: np.random.Generator) -> str:
    """One of the ways to name a thing."""
    whole = caption([(noun, colour)], scene)
    bare = whole.removesuffix(f" {scene}")
    return str(rng.choice([noun, f"{colour} {noun}", bare, whole, colour], p=[0.25, 0.35, 0.25, 0.05, 0.1]))


def ground(scene: str) -> str:
    """The words that name a scene's background: "green grass"."""
    return " ".join(scene.split()[-2:])


def draw_queries(world: MiniWorld, index: int, rng: np.random.Generator) -> list[tuple[str, tuple[int, int, int]]]:
    """Two texts that name something in the picture and three that do not, each with what it marks.

    What it marks is one number for the background, one for the first thing and one for the second.
    """
    nouns = [NOUN_LIST[noun] for noun in world.nouns[index] if noun >= 0]
    colours = [COLOUR_LIST[colour] for colour in world.colours[index] if colour >= 0]
    scene = SCENE_LIST[world.scenes[index]]
    marks = (0, 1, 0), (0, 0, 1)

    queries = [(phrase(nouns[0], colours[0], scene, rng), marks[0])]
    last = len(nouns) - 1
    kind = rng.random()
    if kind < 0.15:
        queries.append((ground(scene), (1, 0, 0)))
    elif kind < 0.25 and last == 1:
        queries.append(
            (" and ".join(f"{colour} {noun}" for noun, colour in zip(nouns, colours, strict=True)), (0, 1, 1))
        )
    else:
        queries.append((phrase(nouns[last], colours[last], scene, rng), marks[last]))

    # A thing that is there in a colour it does not have, best the colour of the other thing.
    slot = rng.integers(len(nouns))
    other_colours = [colour for colour in COLOUR_LIST if colour != colours[slot]]
    colour = colours[1 - slot] if last == 1 and rng.random() < 0.5 else str(rng.choice(other_colours))
    wrong = caption([(nouns[slot], colour)], scene).removesuffix(f" {scene}")
    queries.append((wrong if rng.random() < 0.4 else f"{colour} {nouns[slot]}", (0, 0, 0)))

    # Two things that are not there, one in a colour that is, which only the noun gives away. Sometimes a colour or a
    # background.
    for colour in (colours[rng.integers(len(colours))], str(rng.choice(COLOUR_LIST))):
        noun = str(rng.choice([noun for noun in NOUN_LIST if noun not in nouns]))
        named = caption([(noun, colour)], scene).removesuffix(f" {scene}")
        queries.append((str(rng.choice([noun, f"{colour} {noun}", named], p=[0.2, 0.4, 0.4])), (0, 0, 0)))
    if rng.random() < 0.2:
        absent = [colour for colour in COLOUR_LIST if colour not in colours]
        absent += [ground(other) for other in SCENE_LIST if other != scene]
        queries[-1] = (str(rng.choice(absent)), (0, 0, 0))
    return queries


class Example(NamedTuple):
    """A picture and what is asked about it.

    Attributes:
        image: (S, S, 3) uint8, S pixels a side.
        labels: (S, S) uint8, 0 background, else the number of a thing.
        nouns, colours: (MOSAIC_THINGS,), each thing's classes, -1 for things that there are not.
        queries: QUERIES texts, each with what it marks: one number for the background and one for each thing, 1 what
            is asked for, 0 what is not, and -1 what does not count; what is left out at the end is 0.
    """

    image: np.ndarray
    labels: np.ndarray
    nouns: np.ndarray
    colours: np.ndarray
    queries: list[tuple[str, tuple[int, ...]]]


def draw_scene(world: MiniWorld, rng: np.random.Generator) -> Example:
    """A scene as it is."""
    index = rng.integers(len(world))
    missing = np.full(MOSAIC_THINGS - 2, -1)
    nouns, colours = (np.concatenate([field[index], missing]) for field in (world.nouns, world.colours))
    return Example(world.images[index], world.labels[index], nouns, colours, draw_queries(world, index, rng))


def as_mosaic(tiles: np.ndarray) -> np.ndarray:
    """(MOSAIC ** 2, SIZE, SIZE, ...), row by row -> (MOSAIC * SIZE, MOSAIC * SIZE, ...)."""
    rows = tiles.reshape(MOSAIC, MOSAIC, *tiles.shape[1:]).swapaxes(1, 2)
    return rows.reshape(MOSAIC * SIZE, MOSAIC * SIZE, *tiles.shape[3:])


def draw_part(world: MiniWorld, rng: np.random.Generator) -> Example:
    """A square anywhere in a mosaic that shows a thing clearly."""
    while True:
        chosen = rng.integers(len(world), size=MOSAIC**2)
        labels = world.labels[chosen]
        labels = as_mosaic(np.where(labels > 0, labels + 2 * np.arange(MOSAIC**2, dtype=np.uint8)[:, None, None], 0))
        side = round(SIZE / np.exp(rng.uniform(*np.log(SCALES))))
        top, left = rng.integers(MOSAIC * SIZE - side + 1, size=2)
        part = np.s_[top : top + side, left : left + side]
        whole, shown = (np.bincount(each.ravel(), minlength=MOSAIC_THINGS + 1)[1:] for each in (labels, labels[part]))
        shares = shown / np.maximum(whole, 1)
        if shares.max() >= CLEAR:
            break
    nouns, colours = (field[chosen].flatten() for field in (world.nouns, world.colours))
    queries = draw_part_queries(nouns, colours, np.repeat(world.scenes[chosen], 2), shares, rng)
    return Example(as_mosaic(world.images[chosen])[part], labels[part], nouns, colours, queries)


def draw_part_queries(
    nouns: np.ndarray, colours: np.ndarray, scenes: np.ndarray, shares: np.ndarray, rng: np.random.Generator
) -> list[tuple[str, tuple[int, ...]]]:
    """Two texts that name a thing in the picture and three that name nothing there, as in `Example.queries`.

    Args:
        nouns, colours, scenes: (MOSAIC_THINGS,), of each thing.
        shares: (MOSAIC_THINGS,), how much of each thing the picture shows.
    """
    things = {
        number: (NOUN_LIST[nouns[number]], COLOUR_LIST[colours[number]]) for number in np.flatnonzero(shares).tolist()
    }
    queries = []
    for number in rng.choice(np.flatnonzero(shares >= CLEAR), 2).tolist():
        noun, colour = things[number]
        text = phrase(noun, colour, SCENE_LIST[scenes[number]], rng)
        asked = [name for name in (noun, colour) if name in text.split()]
        # Of what the border has cut down to a sliver nobody can say what it is.
        marks = [0] * (MOSAIC_THINGS + 1)
        for other, names in things.items():
            if set(asked) <= set(names):
                marks[other + 1] = 1 if shares[other] >= CLEAR else -1
        queries.append((text, tuple(marks)))

    # A thing that is there in a colour that it does not have, best that of another thing; two kinds that are not
    # there, one in a colour that is. Sometimes a colour.
    there, colours_there = {noun for noun, _ in things.values()}, {colour for _, colour in things.values()}
    absent = [(noun, colour) for noun in NOUN_LIST for colour in COLOUR_LIST if (noun, colour) not in things.values()]
    other_colour = [names for names in absent if names[0] in there]
    other_noun = [names for names in absent if names[0] not in there] or absent
    for preferred, pool in (
        ([names for names in other_colour if names[1] in colours_there], other_colour),
        ([names for names in other_noun if names[1] in colours_there], other_noun),
        ([], other_noun),
    ):
        if preferred and (pool is other_noun or rng.random() < 0.5):
            pool = preferred
        noun, colour = pool[rng.integers(len(pool))]
        named = caption([(noun, colour)], "").strip()
        alone = 0.0 if noun in there else 0.2
        text = rng.choice([noun, f"{colour} {noun}", named], p=[alone, 0.5 - alone / 2, 0.5 - alone / 2])
        queries.append((str(text), ()))
    others = [colour for colour in COLOUR_LIST if colour not in colours_there]
    if others and rng.random() < 0.1:
        queries[-1] = (str(rng.choice(others)), ())
    return queries


class PatchHead(torch.nn.Module):
    """Reads noun and colour of the thing under each patch off the image tower; it only speeds up training.

    Without it the tower learns where things are long before it learns which is which.
    """

    def __init__(self, width: int):
        super().__init__()
        self.nouns = torch.nn.Linear(width, len(NOUN_LIST) + 1)
        self.colours = torch.nn.Linear(width, len(COLOUR_LIST) + 1)

    def forward(self, patches: torch.Tensor, labels: torch.Tensor, nouns: torch.Tensor, colours: torch.Tensor):
        """Sum of the mean cross-entropies; class 0 is the background.

        Args:
            patches: (B, n * n, width).
            labels: (B, S, S), 0 background, else the number of a thing.
            nouns, colours: (B, things), the things' classes.
        """
        side = math.isqrt(patches.shape[1])
        labels = F.interpolate(labels[:, None].float(), size=side, mode="nearest-exact").flatten(1).long()
        losses = []
        for head, classes in ((self.nouns, nouns), (self.colours, colours)):
            answers = F.pad(classes + 1, (1, 0)).gather(1, labels)
            losses.append(F.cross_entropy(head(patches).float().flatten(0, 1), answers.flatten()))
        return sum(losses)


def to_pixel_values(examples: list[Example]) -> torch.Tensor:
    """(N, 3, MASK_SIZE, MASK_SIZE) in [-1, 1], as the image processor makes them."""
    return torch.cat(
        [
            F.interpolate(to_tensor(example.image[None]), size=MASK_SIZE, mode="bilinear", antialias=True)
            for example in examples
        ]
    )


def to_labels(examples: list[Example]) -> torch.Tensor:
    """(N, MASK_SIZE, MASK_SIZE) int64."""
    centres = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE
    labels = []
    for example in examples:
        nearest = (centres * len(example.labels)).astype(int)
        labels.append(example.labels[np.ix_(nearest, nearest)])
    return torch.from_numpy(np.stack(labels)).long()


def to_marks(examples: list[Example]) -> torch.Tensor:
    """(N * QUERIES, 1 + MOSAIC_THINGS) int64."""
    rows = [marks + (0,) * (1 + MOSAIC_THINGS - len(marks)) for example in examples for _, marks in example.queries]
    return torch.tensor(rows)


def predict(model: CLIPSegForImageSegmentation, pixel_values: torch.Tensor, text_embeds: torch.Tensor):
    """Logits for several texts a picture, and the image tower's patches.

    (N, 3, S, S) and (N, Q, D) -> (N * Q, S, S) and (N, n * n, width).

    The model's own forward freezes both towers and takes one text a picture; training tunes them, and looks once at a
    picture for all of its texts.
    """
    queries = text_embeds.shape[1]
    hidden_states = model.clip.vision_model(pixel_values, output_hidden_states=True).hidden_states
    activations = [hidden_states[layer + 1].repeat_interleave(queries, dim=0) for layer in model.extract_layers]
    return model.decoder(activations, text_embeds.flatten(0, 1)).logits, hidden_states[-1][:, 1:]


@torch.no_grad()
def measure(model: CLIPSegForImageSegmentation, processor: CLIPSegProcessor, scenes: list[Scene]) -> dict[str, float]:
    """Mean IoU for "a red car", and the share of the frame marked for another noun and for another colour."""
    wanted, other_noun, other_colour = [], [], []
    for number, scene in enumerate(scenes):
        thing = scene.thing
        absent = [noun for noun in NOUN_LIST if noun not in [each.noun for each in scene.things]]
        wrong = [colour for colour in COLOUR_LIST if colour != thing.colour]
        wanted.append(caption([(thing.noun, thing.colour)], "").strip())
        other_noun.append(caption([(absent[number % len(absent)], thing.colour)], "").strip())
        other_colour.append(f"{wrong[number % len(wrong)]} {thing.noun}")
    truth = torch.from_numpy(np.stack([np.asarray(scene.mask) > 0 for scene in scenes])).to(model.device)
    images = [scene.image for scene in scenes]

    def marked(texts: list[str]) -> torch.Tensor:
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt").to(model.device)
        logits = model(**inputs).logits.float()
        return F.interpolate(logits[:, None], size=truth.shape[1:], mode="bilinear")[:, 0] > 0

    found = marked(wanted)
    iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2))
    return {
        "iou": iou.mean().item(),
        "marked_for_other_noun": marked(other_noun).float().mean().item(),
        "marked_for_other_colour": marked(other_colour).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=4_500, batch_size=32, learning_rate=8e-4, precision="bf16")
    parser.add_argument("--clip", type=Path, help="folder of the mini CLIP; by default what train_clip.py left behind")
    args = parser.parse_args()

    run = Run("clipseg", args)
    world = load_world(args.work_dir, args.world_size)
    clip_folder = args.clip or args.work_dir / "clip" / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    image_processor = ViTImageProcessor(
        size={"height": MASK_SIZE, "width": MASK_SIZE}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = CLIPSegProcessor(image_processor, tokenizer)
    model = build_model(CLIPModel.from_pretrained(clip_folder))
    head = PatchHead(model.config.vision_config.hidden_size)
    model = run.prepare(model, extra=[head])
    head = run.accelerator.prepare(head)
    one, two = ([render(seed, things=things) for seed in range(96)] for things in (1, 2))

    for step, rng in run.steps():
        parts = args.batch_size // 2
        examples = [draw_part(world, rng) for _ in range(parts)]
        examples += [draw_scene(world, rng) for _ in range(args.batch_size - parts)]
        texts = [text for example in examples for text, _ in example.queries]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(run.device)
        pixel_values, labels, marks = (
            convert(examples).to(run.device) for convert in (to_pixel_values, to_labels, to_marks)
        )
        nouns, colours = (
            torch.from_numpy(np.stack([getattr(example, field) for example in examples])).long().to(run.device)
            for field in ("nouns", "colours")
        )
        target = marks.gather(1, labels.flatten(1).repeat_interleave(QUERIES, dim=0)).unflatten(1, labels.shape[1:])
        counts, target = (target >= 0).float(), (target > 0).float()

        with run.accelerator.autocast():
            text_embeds = model.clip.get_text_features(**inputs).pooler_output.unflatten(0, (args.batch_size, QUERIES))
            logits, patches = predict(model, pixel_values, text_embeds)
            logits = logits.float()
            patch_loss = head(patches, labels, nouns, colours)
        # Cross-entropy for every pixel; Dice for the overlap, which small things would else hardly count in.
        probability = logits.sigmoid() * counts
        overlap = 2 * (probability * target).sum((1, 2)) / (probability.sum((1, 2)) + target.sum((1, 2)))
        named = target.amax((1, 2)) > 0
        loss = (
            F.binary_cross_entropy_with_logits(logits, target, weight=counts)
            + 0.2 * (1 - overlap)[named].mean()
            + 0.2 * patch_loss
        )
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            model.eval()
            run.log(
                step + 1,
                loss=loss,
                patches=patch_loss,
                **{f"one_{k}": v for k, v in measure(model, processor, one).items()},
            )
            run.log(step + 1, **{f"two_{k}": v for k, v in measure(model, processor, two).items()})
            model.train()

    with run.finished("clipseg") as folder:
        save_half(run.accelerator.unwrap_model(model), folder)
        processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
