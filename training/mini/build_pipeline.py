"""Puts the trained parts together: the pipeline folder, the whole CLIP and the judge, all with fp16 weights."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import declare_fp32
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor, CLIPTextModel, CLIPTokenizer

from diffusers_iedit import IEditPipeline, mini


MAX_FILE, MAX_TOTAL = 16 * 10**6, 40 * 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="where the parts were trained")
    parser.add_argument("--output_dir", type=Path, default=mini.model_path().parent)
    args = parser.parse_args()

    work, half = args.work_dir, {"torch_dtype": torch.float16}
    pipe = IEditPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae" / "vae", **half),
        text_encoder=CLIPTextModel.from_pretrained(work / "clip" / "clip", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(work / "clip" / "clip"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet" / "unet", **half),
        scheduler=DDIMScheduler.from_pretrained(work / "unet" / "scheduler"),
        mask_model=CLIPSegForImageSegmentation.from_pretrained(work / "clipseg" / "clipseg", dtype=torch.float16),
        mask_processor=CLIPSegProcessor.from_pretrained(work / "clipseg" / "clipseg"),
        requires_safety_checker=False,
    )
    for name in ("model", "clip", "judge"):
        shutil.rmtree(args.output_dir / name, ignore_errors=True)
    # The plain save: the package has the code files that IEditPipeline would put beside the weights.
    DiffusionPipeline.save_pretrained(pipe, args.output_dir / "model")
    for name in ("text_encoder", "mask_model"):
        declare_fp32(args.output_dir / "model" / name)
    shutil.copytree(work / "clip" / "clip", args.output_dir / "clip")
    shutil.copytree(work / "judge" / "judge", args.output_dir / "judge")

    # Paths of the machine that trained are nobody's business.
    for file in args.output_dir.glob("*/**/*.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    folders = [args.output_dir / name for name in ("model", "clip", "judge")]
    sizes = {file: file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()}
    for file, size in sizes.items():
        if file.suffix == ".safetensors":
            print(f"{size / 1e6:6.2f} MB  {file.relative_to(args.output_dir)}")
    print(f"{sum(sizes.values()) / 1e6:6.2f} MB  in all")
    if max(sizes.values()) > MAX_FILE or sum(sizes.values()) > MAX_TOTAL:
        raise SystemExit(f"Too big: at most {MAX_FILE / 1e6} MB a file and {MAX_TOTAL / 1e6} MB in all.")


if __name__ == "__main__":
    main()
