"""Compares fine-tuned mini models with their base: SDEdit on held-out pairs, with the same noise, and no masks."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from measure import ask_for_edit
from transformers import CLIPModel, CLIPProcessor

from diffusers_iedit import mini
from diffusers_iedit.evaluation import metrics
from diffusers_iedit.evaluation.statistics import interval
from diffusers_iedit.finetuning.families import load_base
from diffusers_iedit.losses import CLIPImageEmbedder
from diffusers_iedit.mini import Scene
from diffusers_iedit.mini.judging import Judge


# `measure.py` counts from 100,000 and the pool from 200,000. Settings were chosen on the first of these, never on the
# second.
FIRST_SEEDS = {"choose": 120_000, "test": 130_000}

BASES = {"mini-base": "mini", "mini-sd3": "mini-sd3-iedit"}
"""Each with what was fine-tuned from it and lies in the package."""

SETTINGS = {"strength": 0.3, "guidance_scale": 1.5, "num_inference_steps": 50}
"""Chosen on the bases, which succeed in three quarters of the edits or less: that leaves room both ways."""

COLUMNS = ("success", "clip_score", "ssim_not_m", "ssim_not_m_region")


def held_out_pairs(count: int, part: str) -> list[tuple[Scene, Scene]]:
    """Sources that show what no training picture shows, one thing or two in turn, and what each is to become."""
    pairs = []
    for number in range(count):
        source = mini.render(FIRST_SEEDS[part] + number, things=1 + number // 2 % 2, split="held_out")
        pairs.append((source, ask_for_edit(source, number)))
    return pairs


def to_tensor(images) -> torch.Tensor:
    """PIL images -> (B, C, H, W) in [0, 1]."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2)


class Examiner:
    """Edits all pairs with a pipeline and takes the numbers of `COLUMNS`."""

    def __init__(self, pairs: list[tuple[Scene, Scene]], **settings):
        self.pairs, self.settings = pairs, settings
        self.judge = Judge.from_pretrained(mini.judge_path())
        self.clip = CLIPModel.from_pretrained(mini.clip_path()).eval()
        processor = CLIPProcessor.from_pretrained(mini.clip_path())
        self.tokenizer = processor.tokenizer
        self.embed_image = CLIPImageEmbedder(self.clip, processor.image_processor)

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline) -> dict[str, np.ndarray]:
        pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
        found = {name: [] for name in COLUMNS}
        for start in range(0, len(self.pairs), 32):
            sources, targets = zip(*self.pairs[start : start + 32], strict=True)
            prompts = [target.caption for target in targets]
            images = pipe(
                image=[source.image for source in sources],
                prompt=prompts,
                generator=[torch.Generator().manual_seed(start + number) for number in range(len(sources))],
                **self.settings,
            ).images
            verdicts = self.judge.look(images, [source.mask for source in sources])
            found["success"] += [
                (verdict.noun, verdict.colour) == (target.thing.noun, target.thing.colour)
                for verdict, target in zip(verdicts, targets, strict=True)
            ]
            tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
            texts = self.clip.get_text_features(**tokens).pooler_output
            edited, before = to_tensor(images), to_tensor([source.image for source in sources])
            # The background is what neither the old thing covers nor the new one would.
            masks = torch.maximum(*(to_tensor([scene.mask for scene in side]) for side in (sources, targets)))
            found["clip_score"] += metrics.clip_score(self.embed_image(edited), texts).tolist()
            for name in ("ssim_not_m", "ssim_not_m_region"):
                found[name] += getattr(metrics, name)(edited, before, masks).tolist()
        return {name: np.array(values, dtype=float) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", choices=BASES, default="mini-base", help="what the models were fine-tuned from")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="more fine-tuned pipelines: their folders")
    parser.add_argument("--part", choices=FIRST_SEEDS, default="test", help="choose: the pairs to choose settings on")
    parser.add_argument("--pairs", type=int, default=400, help="number of held-out pairs")
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--json", type=Path, help="also write the numbers of each pair to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in SETTINGS}
    examine = Examiner(held_out_pairs(args.pairs, args.part), **settings)
    found = {name: examine(load_base(name)) for name in (args.base, BASES[args.base])}
    for folder in args.models:
        found[folder.name] = examine(load_base(str(folder)))
    base = found[args.base]
    for name, values in found.items():
        # Of edits that succeed, the background could be worse because more has changed beside it.
        both = (values["success"] > 0) & (base["success"] > 0)
        print(f"{name}: {int(both.sum())} of {args.pairs} succeed by the base too")
        for column in COLUMNS:
            mean, low, high = interval(values[column])
            line = f"  {column:18} {mean:.4f} [{low:.4f}, {high:.4f}]"
            if name != args.base:
                for where, pairs in (("against the base", slice(None)), ("in these", both)):
                    if len(difference := (values[column] - base[column])[pairs]):
                        mean, low, high = interval(difference)
                        line += f"   {where} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(line, flush=True)
    if args.json:
        numbers = {name: {column: list(v) for column, v in values.items()} for name, values in found.items()}
        args.json.write_text(
            json.dumps({"settings": settings | {"base": args.base, "part": args.part}} | numbers) + "\n"
        )


if __name__ == "__main__":
    main()
