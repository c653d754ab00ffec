"""Trains the mini CLIPSeg, starting from the mini CLIP, to mark what a text names, and nothing if it is not there."""

import argparse
import math
from pathlib import Path

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

from diffusers_iedit.mini import Scene, caption, render


QUERIES = 5
"""Texts a picture."""

MASK_SIZE = 96
"""Pictures are enlarged for the mask model: its patches are 8 pixels wide, too coarse for 64."""


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
            labels: (B, 64, 64), 0 background, 1 and 2 the things.
            nouns, colours: (B, 2), the things' classes.
        """
        side = math.isqrt(patches.shape[1])
        labels = F.interpolate(labels[:, None].float(), size=side, mode="nearest-exact").flatten(1).long()
        losses = []
        for head, classes in ((self.nouns, nouns), (self.colours, colours)):
            answers = F.pad(classes + 1, (1, 0)).gather(1, labels)
            losses.append(F.cross_entropy(head(patches).float().flatten(0, 1), answers.flatten()))
        return sum(losses)


def to_pixel_values(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, 64, 64, 3) -> (N, 3, MASK_SIZE, MASK_SIZE) in [-1, 1], as the image processor does."""
    return F.interpolate(to_tensor(images), size=MASK_SIZE, mode="bilinear")


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
    add_run_arguments(parser, steps=1_400, batch_size=16, learning_rate=8e-4, precision="bf16")
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
        chosen = np.sort(rng.choice(len(world), args.batch_size, replace=False))
        queries = [draw_queries(world, index, rng) for index in chosen]
        texts, marks = zip(*(query for picture in queries for query in picture), strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt").to(run.device)
        labels = torch.from_numpy(world.labels[chosen]).long()
        asked = labels.repeat_interleave(QUERIES, dim=0)
        target = torch.tensor(marks, dtype=torch.float32).gather(1, asked.flatten(1)).view_as(asked).to(run.device)
        target = F.interpolate(target[:, None], size=MASK_SIZE)[:, 0]

        with run.accelerator.autocast():
            text_embeds = model.clip.get_text_features(**inputs).pooler_output.unflatten(0, (args.batch_size, QUERIES))
            logits, patches = predict(model, to_pixel_values(world.images[chosen]).to(run.device), text_embeds)
            logits = logits.float()
            nouns, colours = (torch.from_numpy(field[chosen]).long() for field in (world.nouns, world.colours))
            patch_loss = head(patches, *(tensor.to(run.device) for tensor in (labels, nouns, colours)))
        # Cross-entropy for every pixel; Dice for the overlap, which small things would else hardly count in.
        probability = logits.sigmoid()
        overlap = 2 * (probability * target).sum((1, 2)) / (probability.sum((1, 2)) + target.sum((1, 2)))
        named = target.amax((1, 2)) > 0
        loss = (
            F.binary_cross_entropy_with_logits(logits, target) + 0.2 * (1 - overlap)[named].mean() + 0.2 * patch_loss
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
