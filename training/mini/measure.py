"""Measures the mini models on scenes that no training saw, each number beside the bar it must reach."""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common import to_tensor
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from train_captioner import measure as measure_captions
from train_clip import embed_images, embed_texts
from train_clipseg import measure as measure_masks
from train_tiny_vae import fidelity
from train_vae import decibels
from train_vgg import to_images
from transformers import CLIPModel, CLIPTokenizer

from diffusers_iedit import IEditPipeline, LocalEditor, mini
from diffusers_iedit.losses import VGG16Features, noise_latents, perceptual_loss, predict_latents
from diffusers_iedit.mini import COLOURS, NOUNS, Scene
from diffusers_iedit.mini.judging import Judge


FIRST_SEED = 100_000
"""Seeds below a million are in no training; the first thousands served to watch it."""

PARTS = (
    "judge",
    "vae",
    "clip",
    "clipseg",
    "captioner",
    "vgg",
    "tiny_vae",
    "text_to_image",
    "edit",
    "edit_found_mask",
    "sd3_text_to_image",
    "sd3_edit",
)


@dataclass
class Result:
    """One measured number and, where there is one, the bar it must reach."""

    part: str
    what: str
    value: float
    bar: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        bar = "" if self.bar is None else f"{'<=' if self.at_most else '>='} {self.bar:g}"
        kept = ""
        if self.bar is not None:
            kept = "ok" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "MISSED"
        return f"{self.part:17} {self.what:66} {self.value:8.4f}  {bar:8} {kept}"


def scenes(count: int, things: int | None = None, split: str | None = None) -> list[Scene]:
    return [mini.render(FIRST_SEED + number, things=things, split=split) for number in range(count)]


def groups(count: int) -> dict[str, list[Scene]]:
    """Scenes of one thing and of two, from all combinations and from those kept out of training."""
    return {
        f"{('one thing', 'two things')[things - 1]}, {name}": scenes(count, things, split)
        for things in (1, 2)
        for name, split in (("all combinations", None), ("held-out combinations", "held_out"))
    }


def measure_judge(judge: Judge, count: int) -> list[Result]:
    results = []
    for name, group in groups(count).items():
        verdicts = judge.look([scene.image for scene in group], [scene.mask for scene in group])
        right = [(v.noun, v.colour) == (s.thing.noun, s.thing.colour) for v, s in zip(verdicts, group, strict=True)]
        results.append(Result("judge", f"thing and colour right, {name}", float(np.mean(right))))
    return results


def measure_vae(pipe: IEditPipeline, count: int) -> list[Result]:
    results = []
    for name, group in groups(count).items():
        images = to_tensor(np.stack([np.asarray(scene.image) for scene in group]))
        things = np.stack([np.max([np.asarray(mask) for mask in scene.masks], axis=0) > 0 for scene in group])
        reached = decibels(pipe.vae, images, torch.from_numpy(things).unsqueeze(1).float())
        results.append(Result("vae", f"dB, whole picture, {name}", reached["psnr"], 30))
        results.append(Result("vae", f"dB, things alone, {name}", reached["psnr_things"], 24))
    return results


def measure_clip(folder: Path, count: int) -> list[Result]:
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    captions = mini.captions()
    place = {caption: number for number, caption in enumerate(captions)}
    text_embeds = embed_texts(clip, tokenizer, captions)
    results = []
    for name, group in groups(count).items():
        image_embeds = embed_images(clip, np.stack([np.asarray(scene.image) for scene in group]))
        answers = torch.tensor([place[scene.caption] for scene in group])
        right = ((image_embeds @ text_embeds.T).argmax(1) == answers).float().mean().item()
        results.append(Result("clip", f"right caption among all {len(captions)}, {name}", right, 0.9))
    return results


def measure_clipseg(pipe: IEditPipeline, count: int) -> list[Result]:
    results = []
    for name, group in groups(count).items():
        reached = measure_masks(pipe.mask_model, pipe.mask_processor, group)
        bar = 0.75 if name.startswith("one") else 0.7
        results.append(Result("clipseg", f"IoU with the thing asked for, {name}", reached["iou"], bar))
        for kind in ("noun", "colour"):
            share = reached[f"marked_for_other_{kind}"]
            results.append(Result("clipseg", f"marked for a {kind} not there, {name}", share, 0.02, at_most=True))
    return results


def measure_captioner(pipe: IEditPipeline, count: int) -> list[Result]:
    return [
        Result(
            "captioner",
            f"exactly the true caption, {name}",
            measure_captions(pipe.captioner, pipe.caption_processor, group),
            0.95,
        )
        for name, group in groups(count).items()
    ]


@torch.no_grad()
def measure_vgg(folder: Path, count: int) -> list[Result]:
    """Is a thing, by Eq. 10, nearer to its like in another scene than to a wrong thing or colour in that place?"""
    networks = {
        "pixels": lambda image: image,
        "default layers": VGG16Features.from_pretrained(folder),
        "relu5_3": VGG16Features.from_pretrained(folder, layers=("relu5_3",)),
    }
    results = []
    for name, group in groups(count).items():
        likes = [
            other.swap(thing=scene.thing.noun, colour=scene.thing.colour)
            for scene, other in zip(group, group[1:] + group[:1], strict=True)
        ]
        wrong = [ask_for_edit(like, number) for number, like in enumerate(likes)]
        images, images_like, images_wrong = (
            to_images([scene.image for scene in row]) for row in (group, likes, wrong)
        )
        masks, masks_like, masks_wrong = (
            torch.from_numpy(np.stack([np.asarray(scene.mask) for scene in row])).unsqueeze(1) / 255
            for row in (group, likes, wrong)
        )
        # Eq. 10 compares place by place, and of two scenes of two things, few have theirs in the same place.
        bars = {"default layers": 0.9 if name.startswith("one") else None, "relu5_3": 0.95}
        for features, network in networks.items():
            near = perceptual_loss(network, images, images_like, masks, masks_like)
            far = perceptual_loss(network, images, images_wrong, masks, masks_wrong)
            share = (near < far).float().mean().item()
            results.append(Result("vgg", f"like is nearer, {features}, {name}", share, bars.get(features)))
    return results


@torch.no_grad()
def measure_tiny_vae(pipe: IEditPipeline, folder: Path, count: int) -> list[Result]:
    """On latents of pictures, and on those that Eq. 7 gives for edits at timesteps from 0 to the last."""
    tiny = AutoencoderTiny.from_pretrained(folder).eval()
    results = []
    for name, group in groups(count).items():
        images = to_tensor(np.stack([np.asarray(scene.image) for scene in group]))
        latents = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
        prompts = [ask_for_edit(scene, number).caption for number, scene in enumerate(group)]
        states, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
        t = torch.linspace(0, pipe.scheduler.config.num_train_timesteps - 1, count).long()
        alpha_bar = pipe.scheduler.alphas_cumprod[t]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        noisy = noise_latents(latents, noise, alpha_bar)
        predicted = predict_latents(noisy, pipe.unet(noisy, t, states).sample, alpha_bar)
        results.append(Result("tiny_vae", f"dB to the VAE, pictures, {name}", fidelity(tiny, pipe.vae, latents), 28))
        results.append(Result("tiny_vae", f"dB to the VAE, Eq. 7, {name}", fidelity(tiny, pipe.vae, predicted), 28))
    return results


def stable_diffusion(pipe: IEditPipeline) -> StableDiffusionPipeline:
    """The stock text-to-image pipeline with the same models."""
    components = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def measure_text_to_image(
    text_to_image: DiffusionPipeline, judge: Judge, count: int, part: str, guidance: float, bars: dict[str, float]
) -> list[Result]:
    """Samples for one thing are judged as a whole, for two by halves; the keys of `bars` are "one" and "two"."""
    text_to_image.set_progress_bar_config(disable=True)
    results = []
    for name, group in groups(count).items():
        images = []
        for start in range(0, count, 32):
            prompts = [scene.caption for scene in group[start : start + 32]]
            generator = torch.Generator().manual_seed(start)
            images += text_to_image(prompts, guidance_scale=guidance, generator=generator).images
        right = []
        whole = judge.look(images)
        halves = [judge.look(images, [side] * count) for side in ("left", "right")]
        for number, scene in enumerate(group):
            seen = [whole[number]] if len(scene.things) == 1 else [half[number] for half in halves]
            asked = [(thing.noun, thing.colour) for thing in scene.things]
            right.append([(v.noun, v.colour) for v in seen] == asked and whole[number].scene == scene.scene)
        bar = bars.get(name.split()[0])
        results.append(Result(part, f"all right, guidance {guidance:g}, {name}", float(np.mean(right)), bar))
    return results


def ask_for_edit(scene: Scene, number: int) -> Scene:
    """The scene after an edit: even numbers change the thing, odd ones the colour, to what the scene does not have."""
    taken = scene.things
    if number % 2 == 0:
        nouns = [noun for noun in NOUNS if noun not in [thing.noun for thing in taken]]
        return scene.swap(thing=nouns[(number // 2) % len(nouns)])
    colours = [colour for colour in COLOURS if colour not in [thing.colour for thing in taken]]
    return scene.swap(colour=colours[(number // 2) % len(colours)])


def measure_edits(
    editor: IEditPipeline | LocalEditor, judge: Judge, count: int, part: str, bar: float | None, **settings
) -> list[Result]:
    """An edit counts if the judge sees the thing and the colour of the prompt where the old thing was.

    Without a bar, the mask is the one that words find.
    """
    results = []
    for name, group in groups(count).items():
        targets = [ask_for_edit(scene, number) for number, scene in enumerate(group)]
        right, background = [], 0
        for start in range(0, count, 32):
            sources, wanted = group[start : start + 32], targets[start : start + 32]
            if bar is not None:
                where = {"mask_image": [scene.mask for scene in sources]}
            else:
                where = {"mask_prompt": [scene.thing.name for scene in sources]}
            output = editor(
                image=[scene.image for scene in sources],
                prompt=[scene.caption for scene in wanted],
                generator=[torch.Generator().manual_seed(start + number) for number in range(len(sources))],
                **where,
                **settings,
            )
            verdicts = judge.look(output.images, [scene.mask for scene in sources])
            for source, target, image, mask, verdict in zip(
                sources, wanted, output.images, output.masks, verdicts, strict=True
            ):
                right.append((verdict.noun, verdict.colour) == (target.thing.noun, target.thing.colour))
                change = np.abs(np.asarray(image).astype(int) - np.asarray(source.image).astype(int))
                background = max(background, change[np.asarray(mask) == 0].max())
        things, colours = float(np.mean(right[::2])), float(np.mean(right[1::2]))
        results.append(Result(part, f"success, {name}", float(np.mean(right)), bar))
        results.append(Result(part, f"  of swaps of the thing, {name}", things))
        results.append(Result(part, f"  of swaps of the colour, {name}", colours))
        results.append(Result(part, f"  largest change outside the mask, {name}", float(background), 0, at_most=True))
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=mini.model_path(), help="the pipeline's folder")
    parser.add_argument("--clip", type=Path, default=mini.clip_path())
    parser.add_argument("--judge", type=Path, default=mini.judge_path())
    parser.add_argument("--vgg", type=Path, default=mini.vgg_path())
    parser.add_argument("--tiny_vae", type=Path, default=mini.tiny_vae_path())
    parser.add_argument("--sd3", type=Path, default=mini.model_path("sd3"), help="folder of the SD3 pipeline")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--scenes", type=int, default=64, help="scenes in each group")
    parser.add_argument("--text_guidance", type=float, default=3.0, help="guidance of text-to-image")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    edit = parser.add_argument_group("settings of IEditPipeline's edits", "by default those of IEditPipeline")
    edit.add_argument("--strength", type=float)
    edit.add_argument("--guidance_scale", type=float)
    edit.add_argument("--num_inference_steps", "--steps", type=int)
    edit.add_argument("--mask_dilation", type=int)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pipe = IEditPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    sd3 = StableDiffusion3Img2ImgPipeline.from_pretrained(args.sd3)
    sd3.set_progress_bar_config(disable=True)
    judge = Judge.from_pretrained(args.judge)
    names = ("strength", "guidance_scale", "num_inference_steps", "mask_dilation")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    run = {
        "judge": lambda: measure_judge(judge, args.scenes),
        "vae": lambda: measure_vae(pipe, args.scenes),
        "clip": lambda: measure_clip(args.clip, args.scenes),
        "clipseg": lambda: measure_clipseg(pipe, args.scenes),
        "captioner": lambda: measure_captioner(pipe, args.scenes),
        "vgg": lambda: measure_vgg(args.vgg, args.scenes),
        "tiny_vae": lambda: measure_tiny_vae(pipe, args.tiny_vae, args.scenes),
        "text_to_image": lambda: measure_text_to_image(
            stable_diffusion(pipe), judge, args.scenes, "text_to_image", args.text_guidance, {"one": 0.85}
        ),
        "edit": lambda: measure_edits(pipe, judge, args.scenes, "edit", 0.8, **settings),
        "edit_found_mask": lambda: measure_edits(pipe, judge, args.scenes, "edit_found_mask", None, **settings),
        "sd3_text_to_image": lambda: measure_text_to_image(
            StableDiffusion3Pipeline(**sd3.components),
            judge,
            args.scenes,
            "sd3_text_to_image",
            args.text_guidance,
            {"one": 0.95, "two": 0.95},
        ),
        "sd3_edit": lambda: measure_edits(
            LocalEditor(sd3),
            judge,
            args.scenes,
            "sd3_edit",
            0.95,
            strength=0.7,
            guidance_scale=3.0,
            num_inference_steps=28,
        ),
    }
    results = []
    for part in args.parts:
        started = time.monotonic()
        results += (measured := run[part]())
        print(*measured, f"{part:17} took {time.monotonic() - started:.0f} s", sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
