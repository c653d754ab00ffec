"""Trains the judge, the classifier that decides whether a picture shows the thing, colour and scene asked for."""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from common import MiniWorld, Run, add_run_arguments, load_world, to_tensor
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from diffusers_iedit.mini import render
from diffusers_iedit.mini.judging import Judge, Verdict, view


IGNORED = -100


def draw_view(world: MiniWorld, index: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A view of a scene, (64, 64, 3) uint8, with the class of thing, colour and scene (IGNORED where it has none)."""
    image = Image.fromarray(world.images[index])
    count = (world.nouns[index] >= 0).sum()
    slot, kind = rng.integers(count), rng.random()
    answers = int(world.nouns[index, slot]), int(world.colours[index, slot]), int(world.scenes[index])
    if kind < 0.4:
        region = None
        if count == 2:
            answers = IGNORED, IGNORED, answers[2]
    elif kind < 0.8 or count == 1:
        mask = Image.fromarray((world.labels[index] == slot + 1).astype(np.uint8) * 255)
        region = Image.new("L", mask.size)
        region.paste(mask.filter(ImageFilter.MaxFilter(int(rng.choice([1, 3, 5])))), tuple(rng.integers(-3, 4, 2)))
    else:
        region = ("left", "right")[slot]
    seen = view(image, region)
    # Decoded latents are never as crisp as a drawing.
    if rng.random() < 0.5:
        seen = seen.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    noisy = np.asarray(seen) + rng.normal(0, rng.uniform(0, 12), (64, 64, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=1_400, batch_size=48, learning_rate=1.5e-3, precision="no")
    args = parser.parse_args()

    run = Run("judge", args)
    world = load_world(args.work_dir, args.world_size)
    judge = run.prepare(Judge())
    scenes = [render(seed) for seed in range(256)]
    truth = [Verdict(scene.thing.noun, scene.thing.colour, scene.scene) for scene in scenes]

    for step, rng in run.steps():
        chosen = rng.choice(len(world), args.batch_size, replace=False)
        views, answers = zip(*(draw_view(world, index, rng) for index in chosen), strict=True)
        views, answers = to_tensor(np.stack(views)).to(run.device), torch.tensor(answers, device=run.device)
        with run.accelerator.autocast():
            logits = judge(views)
        losses = [
            F.cross_entropy(part.float(), answer, ignore_index=IGNORED, label_smoothing=0.05)
            for part, answer in zip(logits, answers.T, strict=True)
        ]
        loss = torch.stack(losses).sum()
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            verdicts = judge.look([scene.image for scene in scenes], [scene.mask for scene in scenes])
            right = np.mean(
                [
                    [v.noun == t.noun, v.colour == t.colour, v.scene == t.scene]
                    for v, t in zip(verdicts, truth, strict=True)
                ],
                axis=0,
            )
            run.log(step + 1, loss=loss, thing=right[0], colour=right[1], scene=right[2])

    weights = run.accelerator.unwrap_model(judge).half().state_dict()
    with run.finished("judge") as folder:
        save_file(weights, folder / "model.safetensors")


if __name__ == "__main__":
    main()
