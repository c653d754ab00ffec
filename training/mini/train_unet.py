"""Trains the mini UNet2DConditionModel on latents of the mini VAE and text states of the mini CLIP."""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import MiniWorld, Run, add_run_arguments, load_world, save_half, to_tensor, world_captions
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_iedit.mini import captions
from diffusers_iedit.mini.judging import Judge


def sd14_scheduler() -> DDIMScheduler:
    """DDIM with the settings of Stable Diffusion 1.4."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, world: MiniWorld, file: Path) -> np.ndarray:
    """Scaled latents of all training pictures, (N, 4, 16, 16) fp16, computed once."""
    if not file.exists():
        batches = (to_tensor(world.images[start : start + 64]) for start in range(0, len(world), 64))
        latents = [vae.encode(batch.to(vae.device)).latent_dist.mode().half().cpu() for batch in batches]
        partial = file.with_suffix(".partial.npy")
        np.save(partial, (torch.cat(latents) * vae.config.scaling_factor).numpy())
        partial.rename(file)
    return np.load(file)


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: list[str]) -> torch.Tensor:
    """Text states as the pipeline computes them, padded to full length: (N, 24, 128)."""
    inputs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return text_encoder(inputs.input_ids.to(text_encoder.device))[0]


@torch.no_grad()
def sample(unet, vae, states, empty, guidance: float, steps: int, seed: int) -> list[Image.Image]:
    """Text-to-image with classifier-free guidance, for the progress report."""
    scheduler = sd14_scheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(states), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(unet.device)
    both = torch.cat([empty.expand_as(states), states])
    for t in scheduler.timesteps:
        unconditional, conditional = unet(torch.cat([latents] * 2), t, both).sample.chunk(2)
        noise_pred = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(noise_pred, t, latents).prev_sample
    images = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    pixels = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def judge_samples(judge: Judge, images: list[Image.Image], texts: list[str]) -> dict[str, float]:
    """Shares of samples for captions of one thing that show the thing, it in its colour, and the scene."""
    right = [
        [verdict.noun in text, f"{verdict.colour} {verdict.noun}" in text, verdict.scene in text]
        for verdict, text in zip(judge.look(images), texts, strict=True)
    ]
    return dict(zip(("thing", "coloured_thing", "scene"), np.mean(right, axis=0), strict=True))


def save_sheet(images: list[Image.Image], file: Path) -> None:
    """The samples in one picture, twelve a row."""
    sheet = Image.new("RGB", (64 * 12, 64 * -(-len(images) // 12)))
    for number, image in enumerate(images):
        sheet.paste(image, (64 * (number % 12), 64 * (number // 12)))
    sheet.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=5_200, batch_size=32, learning_rate=1e-3, precision="bf16")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 160])
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--vae", type=Path, help="folder of the mini VAE; by default what train_vae.py left behind")
    parser.add_argument("--clip", type=Path, help="folder of the mini CLIP; by default what train_clip.py left behind")
    parser.add_argument("--judge", type=Path, help="folder of the judge, for the progress report")
    args = parser.parse_args()

    run = Run("unet", args)
    world = load_world(args.work_dir, args.world_size)
    vae = AutoencoderKL.from_pretrained(args.vae or args.work_dir / "vae" / "vae").to(run.device).eval()
    clip_folder = args.clip or args.work_dir / "clip" / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder).to(run.device).eval()
    judge = Judge.from_pretrained(args.judge or args.work_dir / "judge" / "judge").to(run.device)

    latents = cache_latents(vae, world, run.folder.parent / "latents.npy")
    texts = world_captions(world)
    empty = encode(tokenizer, text_encoder, [""])
    scheduler = sd14_scheduler()

    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(args.channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=text_encoder.config.hidden_size,
        norm_num_groups=16,
    )
    # On CPU, plain attention trains faster than the fused kernel.
    unet.set_attn_processor(AttnProcessor())
    unet = run.prepare(unet)
    ema = run.average(unet)
    test_texts = captions(1)[::11][:48]
    test_states = encode(tokenizer, text_encoder, test_texts)

    for step, rng in run.steps():
        chosen = rng.choice(len(world), args.batch_size, replace=False)
        z_0 = torch.from_numpy(latents[chosen]).float().to(run.device)
        kept = ["" if rng.random() < args.caption_dropout else texts[index] for index in chosen]
        states = encode(tokenizer, text_encoder, kept)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(z_0.shape, generator=generator).to(run.device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(z_0),), generator=generator).to(run.device)

        with run.accelerator.autocast():
            noise_pred = unet(scheduler.add_noise(z_0, noise, t), t, states).sample.float()
        # Min-SNR weights: almost clean latents are no longer what most of the training is spent on.
        snr = compute_snr(scheduler, t)
        loss = (snr.clamp(max=5) / snr * (noise_pred - noise).pow(2).mean((1, 2, 3))).mean()
        run.update(loss)
        ema.step(unet.parameters())

        if (step + 1) % args.report_steps == 0:
            ema.store(unet.parameters())
            ema.copy_to(unet.parameters())
            images = sample(unet, vae, test_states, empty, guidance=3.0, steps=25, seed=0)
            ema.restore(unet.parameters())
            run.log(step + 1, loss=loss, **judge_samples(judge, images, test_texts))
            save_sheet(images, run.folder / f"samples-{step + 1}.png")

    unet = run.accelerator.unwrap_model(unet)
    ema.copy_to(unet.parameters())
    scheduler.save_pretrained(run.folder / "scheduler")
    with run.finished("unet") as folder:
        save_half(unet, folder)


if __name__ == "__main__":
    main()
