"""Trains the mini AutoencoderKL: 64 x 64 pictures to 4 x 16 x 16 latents and back."""

import argparse

import numpy as np
import torch
from common import Run, add_run_arguments, describe, load_world, save_half, to_tensor
from diffusers import AutoencoderKL

from diffusers_iedit.mini import render


def gradients(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels; edges carry what a thing is."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., 1:] - image[..., :-1]


@torch.no_grad()
def decibels(vae, images: torch.Tensor, things: torch.Tensor) -> dict[str, float]:
    """Mean PSNR of the reconstruction, over whole pictures and over the pixels of things alone."""
    reconstruction = vae.decode(vae.encode(images).latent_dist.mode()).sample.float().clamp(-1, 1)
    error = ((reconstruction - images) / 2).pow(2).mean(1, keepdim=True)
    whole = error.mean((1, 2, 3))
    thing = (error * things).sum((1, 2, 3)) / things.sum((1, 2, 3))
    return {"psnr": -10 * whole.log10().mean().item(), "psnr_things": -10 * thing.log10().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=3_400, batch_size=8, learning_rate=1.5e-3, precision="bf16")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--thing_weight", type=float, default=5.0, help="how much more a pixel of a thing counts")
    parser.add_argument("--kl_weight", type=float, default=2e-4)
    args = parser.parse_args()

    run = Run("vae", args)
    world = load_world(args.work_dir, args.world_size)
    test_images, test_labels = zip(*(describe(render(seed))[:2] for seed in range(64)), strict=True)
    test_images = to_tensor(np.stack(test_images)).to(run.device)
    test_things = torch.from_numpy(np.stack(test_labels) > 0).unsqueeze(1).float().to(run.device)

    vae = AutoencoderKL(
        block_out_channels=tuple(args.channels),
        down_block_types=("DownEncoderBlock2D",) * len(args.channels),
        up_block_types=("UpDecoderBlock2D",) * len(args.channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )
    vae = run.prepare(vae)

    for step, rng in run.steps():
        chosen = np.sort(rng.choice(len(world), args.batch_size, replace=False))
        images = to_tensor(world.images[chosen]).to(run.device)
        things = torch.from_numpy(world.labels[chosen] > 0).unsqueeze(1).float().to(run.device)
        generator = torch.Generator(run.device).manual_seed(int(rng.integers(2**62)))

        weight = 1 + (args.thing_weight - 1) * things
        weight = weight / weight.mean()
        with run.accelerator.autocast():
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample(generator)).sample
        error = reconstruction.float() - images
        vertical, horizontal = gradients(error)
        loss = (
            (weight * (error.abs() + 0.5 * error.pow(2))).mean()
            + 0.5 * (weight[..., 1:, :] * vertical.abs()).mean()
            + 0.5 * (weight[..., 1:] * horizontal.abs()).mean()
            + args.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        )
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            run.log(step + 1, loss=loss, **decibels(vae, test_images, test_things))

    # The UNet wants latents of unit variance.
    vae = run.accelerator.unwrap_model(vae)
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(to_tensor(world.images[i : i + 64]).to(run.device)).latent_dist.mode()
                for i in range(0, 2048, 64)
            ]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.float().std().item(), 5))
    run.log(args.steps, scaling_factor=vae.config.scaling_factor, **decibels(vae, test_images, test_things))
    with run.finished("vae") as folder:
        save_half(vae, folder)


if __name__ == "__main__":
    main()
