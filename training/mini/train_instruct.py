"""Trains InstructPix2Pix on the pairs that the mini iEdit was fine-tuned on, with as many samples: a baseline."""

import argparse

import numpy as np
import torch
from common import Run, add_run_arguments, to_tensor
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from train_unet import encode

from diffusers_iedit.evaluation.data import edit_instruction
from diffusers_iedit.evaluation.methods import Models
from diffusers_iedit.pairs import load_pairs
from diffusers_iedit.pipeline import IEditPipeline


def widen(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """The base with four more input channels for the source's latents, which count for nothing at first."""
    unet = UNet2DConditionModel.from_config(base.config, in_channels=8)
    state = base.state_dict()
    state["conv_in.weight"] = torch.cat([state["conv_in.weight"], torch.zeros_like(state["conv_in.weight"])], 1)
    unet.load_state_dict(state)
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser, steps=1_200, batch_size=16, learning_rate=3e-4, precision="no")
    parser.add_argument("--condition_dropout", type=float, default=0.05, help="of text, image, and both, each")
    args = parser.parse_args()

    run = Run("instruct", args)
    pairs = load_pairs(args.work_dir / "train-pairs")
    pipe = Models(run.device).load(IEditPipeline, "mini-base")
    vae, empty = pipe.vae, encode(pipe.tokenizer, pipe.text_encoder, [""])
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet = run.prepare(widen(pipe.unet))

    for step, rng in run.steps():
        rows = pairs.select(rng.choice(len(pairs), args.batch_size, replace=False))
        with torch.no_grad():
            source, target = (
                vae.encode(
                    to_tensor(np.stack([np.asarray(image) for image in rows[name]])).to(run.device)
                ).latent_dist.mode()
                for name in ("source_image", "target_image")
            )
        instructions = [
            edit_instruction(*terms) for terms in zip(rows["source_term"], rows["target_term"], strict=True)
        ]
        states = encode(pipe.tokenizer, pipe.text_encoder, instructions)
        # As in its paper (Sec. 3.2.1): sometimes without text, without image, or without both.
        drawn = torch.from_numpy(rng.random(args.batch_size)).to(run.device)
        share = args.condition_dropout
        states = torch.where((drawn < 2 * share).view(-1, 1, 1), empty, states)
        source = source * ((drawn < share) | (drawn >= 3 * share)).view(-1, 1, 1, 1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(target.shape, generator=generator).to(run.device)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(target),), generator=generator).to(run.device)
        noisy = scheduler.add_noise(target * vae.config.scaling_factor, noise, t)
        with run.accelerator.autocast():
            # Its pipeline gives the source's latents unscaled.
            noise_pred = unet(torch.cat([noisy, source], 1), t, states).sample.float()
        loss = (noise_pred - noise).pow(2).mean()
        run.update(loss)
        if (step + 1) % args.report_steps == 0:
            run.log(step + 1, loss=loss)

    components = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    with run.finished("instruct") as folder:
        StableDiffusionInstructPix2PixPipeline(
            **components,
            unet=run.accelerator.unwrap_model(unet),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


if __name__ == "__main__":
    main()
