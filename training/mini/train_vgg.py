"""Trains the mini VGG-16, the feature net of Eq. 10: a classifier of thing, colour and scene that loses its head."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from common import COLOUR_LIST, NOUN_LIST, SCENE_LIST, MiniWorld, Run, add_run_arguments, describe, load_world
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import nn

from diffusers_iedit.losses import VGG16Features
from diffusers_iedit.mini import render


IGNORED = -100


class Classifier(nn.Module):
    """All thirteen convolutions of a thin VGG-16, and one linear head for each question."""

    def __init__(self, width: int):
        super().__init__()
        self.vgg = VGG16Features(layers=("relu5_3",), normalize=False, width=width).requires_grad_(True)
        self.heads = nn.ModuleList(
            nn.Linear(8 * width * 2 * 2, len(answers)) for answers in (NOUN_LIST, COLOUR_LIST, SCENE_LIST)
        )
        # Without normalisation layers, a signal gets through thirteen convolutions in He's scale only.
        for module in self.vgg.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, 64, 64) in [0, 1] -> logits over things, colours and scenes, each (B, n)."""
        hidden = F.max_pool2d(self.vgg(images)[0], 2).flatten(1)
        return [head(hidden) for head in self.heads]


def masked(image: np.ndarray, mask: np.ndarray, margin: int = 0) -> Image.Image:
    """What Eq. 10 shows to V: black outside the mask, which is first made wider by `margin` pixels."""
    wide = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * margin + 1))
    return Image.composite(Image.fromarray(image), Image.new("RGB", wide.size), wide)


def draw_picture(world: MiniWorld, index: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A thing alone or a whole scene, (64, 64, 3) uint8, with the class of thing, colour and scene (or IGNORED)."""
    count = (world.nouns[index] >= 0).sum()
    slot = rng.integers(count)
    noun, colour, scene = world.nouns[index, slot], world.colours[index, slot], world.scenes[index]
    if rng.random() < 0.5:
        picture = masked(world.images[index], world.labels[index] == slot + 1, margin=int(rng.integers(3)))
        scene = IGNORED
    else:
        picture = Image.fromarray(world.images[index])
        if count == 2:
            noun = colour = IGNORED
    # Decoded latents are never as crisp as a drawing.
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 12), (64, 64, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), (noun, colour, scene)


def to_images(pictures: list) -> torch.Tensor:
    """PIL images or arrays -> float (N, 3, H, W) in [0, 1], as `VGG16Features` takes them."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=3_000, batch_size=48, learning_rate=7e-4, precision="bf16")
    parser.add_argument("--width", type=int, default=16, help="channels of the first block; VGG-16 has 64")
    # Not the judge's seed: what the two find in a picture should differ where it can.
    parser.set_defaults(seed=1)
    args = parser.parse_args()

    run = Run("vgg", args)
    world = load_world(args.work_dir, args.world_size)
    tests = [describe(render(seed)) for seed in range(256)]
    alone = to_images([masked(image, labels == 1) for image, labels, *_ in tests]).to(run.device)
    whole = to_images([image for image, *_ in tests]).to(run.device)
    nouns, colours = (torch.tensor([test[part][0] for test in tests], device=run.device) for part in (2, 3))
    scenes = torch.tensor([test[4] for test in tests], device=run.device)
    classifier = run.prepare(Classifier(args.width))

    for step, rng in run.steps():
        chosen = rng.choice(len(world), args.batch_size, replace=False)
        pictures, answers = zip(*(draw_picture(world, index, rng) for index in chosen), strict=True)
        answers = torch.tensor(answers, device=run.device)
        with run.accelerator.autocast():
            logits = classifier(to_images(pictures).to(run.device))
        losses = [
            F.cross_entropy(part.float(), answer, ignore_index=IGNORED, label_smoothing=0.05)
            for part, answer in zip(logits, answers.T, strict=True)
        ]
        loss = torch.stack(losses).sum()
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            with torch.no_grad():
                thing, colour, _ = classifier(alone)
                right = [
                    (part.argmax(1) == answer).float().mean()
                    for part, answer in ((thing, nouns), (colour, colours), (classifier(whole)[2], scenes))
                ]
            run.log(step + 1, loss=loss, thing=right[0], colour=right[1], scene=right[2])

    weights = run.accelerator.unwrap_model(classifier).vgg.half().state_dict()
    with run.finished("vgg") as folder:
        save_file(weights, folder / "model.safetensors")


if __name__ == "__main__":
    main()
