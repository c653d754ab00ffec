"""Trains the mini AutoencoderTiny: what TAESD is to Stable Diffusion's VAE, a cheap decoder of the same latents."""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Run, add_run_arguments, describe, load_world, save_half, to_tensor
from diffusers import AutoencoderKL, AutoencoderTiny
from train_vae import gradients

from diffusers_iedit.mini import render


@torch.no_grad()
def fidelity(tiny: AutoencoderTiny, vae: AutoencoderKL, latents: torch.Tensor) -> float:
    """Mean PSNR, in dB, of what `tiny` decodes scaled latents to, with what the VAE does as the truth."""
    wanted = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    error = (tiny.decode(latents).sample.float().clamp(-1, 1) - wanted) / 2
    return -10 * error.square().mean((1, 2, 3)).log10().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=4_000, batch_size=16, learning_rate=2e-3, precision="bf16")
    parser.add_argument("--vae", type=Path, help="folder of the mini VAE; by default what train_vae.py left behind")
    parser.add_argument("--channels", type=int, default=32, help="of the decoder; the encoder has half as many")
    args = parser.parse_args()

    run = Run("tiny_vae", args)
    world = load_world(args.work_dir, args.world_size)
    vae = AutoencoderKL.from_pretrained(args.vae or args.work_dir / "vae" / "vae").to(run.device).eval()
    vae.requires_grad_(False)
    test_images = to_tensor(np.stack([describe(render(seed))[0] for seed in range(64)])).to(run.device)
    test_latents = vae.encode(test_images).latent_dist.mode() * vae.config.scaling_factor
    test_noise = torch.randn(test_latents.shape, generator=torch.Generator().manual_seed(0)).to(run.device)

    # The encoder is no part of the loss's decoder. It is there because the class has one, and small.
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(args.channels // 2,) * 3,
        num_encoder_blocks=(0, 1, 1),
        decoder_block_out_channels=(args.channels,) * 3,
        num_decoder_blocks=(3, 3, 1),
    )
    tiny = run.prepare(tiny)

    for step, rng in run.steps():
        chosen = np.sort(rng.choice(len(world), args.batch_size, replace=False))
        images = to_tensor(world.images[chosen]).to(run.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        other_share, noise_level = 0.5 * torch.rand(2, args.batch_size, 1, 1, 1, generator=generator)
        # Half of the batch stays as encoded. The latents of Eq. 7 are predictions: averages of pictures, with errors.
        other_share[::2] = noise_level[::2] = 0

        with run.accelerator.autocast():
            with torch.no_grad():
                encoded = vae.encode(images).latent_dist.mode().float() * vae.config.scaling_factor
                noise = torch.randn(encoded.shape, generator=generator).to(run.device)
                latents = encoded.lerp(encoded.roll(1, 0), other_share.to(run.device))
                latents = latents + noise_level.to(run.device) * noise
                wanted = vae.decode(latents / vae.config.scaling_factor).sample.float().clamp(-1, 1)
            error = tiny.decode(latents).sample.float() - wanted
            encoding_error = tiny.encode(images).latents.float() - encoded
        vertical, horizontal = gradients(error)
        loss = (
            error.abs().mean()
            + error.square().mean()
            + 0.5 * (vertical.abs().mean() + horizontal.abs().mean())
            + 0.1 * encoding_error.square().mean()
        )
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            run.log(
                step + 1,
                loss=loss,
                psnr=fidelity(tiny, vae, test_latents),
                psnr_noisy=fidelity(tiny, vae, test_latents + 0.3 * test_noise),
                encoder=encoding_error.square().mean(),
            )

    with run.finished("tiny_vae") as folder:
        save_half(run.accelerator.unwrap_model(tiny), folder)


if __name__ == "__main__":
    main()
