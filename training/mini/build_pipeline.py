"""Puts the trained parts together: the pipelines' folders and, beside them, what is no component of a pipeline."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from common import declare_fp32
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    UNet2DConditionModel,
)
from train_sd3 import frozen_components
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.finetuning.outputs import apply_umask


MAX_FILE, MAX_TOTAL = 16 * 10**6, 72 * 10**6

PARTS = {
    "vae": "model/vae",
    "judge": "judge",
    "clip": "clip",
    "clipseg": "model/mask_model",
    "captioner": "model/captioner",
    "unet": "base_unet",
    "finetuned": "model/unet",
    "vgg": "vgg",
    "tiny_vae": "tiny_vae",
    "sd3": "sd3/transformer",
    "finetuned_sd3": "sd3_iedit",
}
"""Part -> where it lies, or most of it, among the finished models."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="where the parts were trained")
    parser.add_argument("--output_dir", type=Path, default=mini.model_path().parent)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[part for part in PARTS if not part.startswith("finetuned")],
        help="take just these parts from the work folder; the others stay as they are in the output folder. By default"
        " all that train_all.py trains; what finetune.py makes of it comes later",
    )
    args = parser.parse_args()

    work = {part: args.work_dir / part / part for part in args.only}
    source = {part: work.get(part, args.output_dir / folder) for part, folder in PARTS.items()}
    scheduler = work["unet"].parent / "scheduler" if "unet" in work else args.output_dir / "model" / "scheduler"
    # A new base has no fine-tuned form yet.
    unet = "unet" if "unet" in work and "finetuned" not in work else "finetuned"
    half, diffusers_half = {"dtype": torch.float16}, {"torch_dtype": torch.float16}
    pipe = IEditPipeline(
        vae=AutoencoderKL.from_pretrained(source["vae"], **diffusers_half),
        text_encoder=CLIPTextModel.from_pretrained(source["clip"], **half),
        tokenizer=CLIPTokenizer.from_pretrained(source["clip"]),
        unet=UNet2DConditionModel.from_pretrained(source[unet], **diffusers_half),
        scheduler=DDIMScheduler.from_pretrained(scheduler),
        mask_model=CLIPSegForImageSegmentation.from_pretrained(source["clipseg"], **half),
        mask_processor=CLIPSegProcessor.from_pretrained(source["clipseg"]),
        captioner=BlipForConditionalGeneration.from_pretrained(source["captioner"], **half),
        caption_processor=BlipProcessor.from_pretrained(source["captioner"]),
        requires_safety_checker=False,
    )
    sd3 = StableDiffusion3Img2ImgPipeline(
        **frozen_components(source["vae"], source["clip"], torch.float16),
        transformer=SD3Transformer2DModel.from_pretrained(source["sd3"], **diffusers_half),
    )

    # The new models are whole, and small enough, before the old ones go.
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=args.output_dir) as building:
        new, old = Path(building, "new"), Path(building, "old")
        # The plain save: the package has the code files that IEditPipeline would put beside the weights.
        DiffusionPipeline.save_pretrained(pipe, new / "model")
        for name in ("text_encoder", "mask_model", "captioner"):
            declare_fp32(new / "model" / name)
        sd3.save_pretrained(new / "sd3")
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            declare_fp32(new / "sd3" / name)
        # With their processors, these two folders load alone, as repositories of the Hub do.
        pipe.mask_processor.save_pretrained(new / "model" / "mask_model")
        pipe.caption_processor.save_pretrained(new / "model" / "captioner")
        for name, folder in PARTS.items():
            if not folder.startswith(("model/", "sd3/")):
                shutil.copytree(source[name], new / folder)

        apply_umask(new)
        # Paths of the machine that trained are nobody's business.
        for file in new.rglob("*.json"):
            config = json.loads(file.read_text())
            # The second is what transformers leaves in a tokenizer that was loaded offline.
            if [config.pop(key) for key in ("_name_or_path", "local_files_only") if key in config]:
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

        sizes = {file: file.stat().st_size for file in new.rglob("*") if file.is_file()}
        for file, size in sizes.items():
            if file.suffix == ".safetensors":
                print(f"{size / 1e6:6.2f} MB  {file.relative_to(new)}")
        print(f"{sum(sizes.values()) / 1e6:6.2f} MB  in all")
        if max(sizes.values()) > MAX_FILE or sum(sizes.values()) > MAX_TOTAL:
            raise SystemExit(f"Too big: at most {MAX_FILE / 1e6} MB a file and {MAX_TOTAL / 1e6} MB in all.")

        old.mkdir()
        for folder in new.iterdir():
            if (args.output_dir / folder.name).exists():
                (args.output_dir / folder.name).rename(old / folder.name)
            folder.rename(args.output_dir / folder.name)


if __name__ == "__main__":
    main()
