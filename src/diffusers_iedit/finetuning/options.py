"""The options of training/train_iedit.py. Nothing here imports a library that takes long: `--help` is quick."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..loading import SHIPPED_PIPELINES


DESCRIPTION = """Fine-tunes a Stable Diffusion model (1.x, 2.x, XL, 3 or 3.5) with iEdit's objective (Secs. 3.3, 3.4
and 4.1) on pairs from build_dataset.py. The defaults are the paper's. Stopped at any moment, --resume_from_checkpoint
latest goes on where it was."""

PRESETS = {
    # Sec. 4.1. What the paper does not name is off, or as in diffusers' own scripts.
    "paper": {},
    # What keeps the background and still edits better than the base does, measured with the mini models.
    "tuned": {
        "train_blocks": "all",
        "caption_dropout": 0.1,
        "background_weight": 3.0,
        "overlap_masks": True,
        "min_edit_timestep": 100,
        "snr_gamma": 1.0,
        "lr_scheduler": "cosine",
    },
    # The same for flow matching, where what is trained alone does not keep the background.
    "tuned-sd3": {
        "train_blocks": "all",
        "lora_rank": 0,
        "caption_dropout": 0.1,
        "background_weight": 4.0,
        "overlap_masks": True,
        "min_edit_timestep": 100,
        "lr_scheduler": "cosine",
        "base_share": 0.6,
    },
}

TRAIN_BLOCKS = ("alternate", "input", "first", "middle", "all", "attention")
"""The choices of `train_blocks`: as the classes in families.py have them, which say what each is in a family."""

WEIGHTING_SCHEMES = ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none")
"""As in diffusers' scripts for Stable Diffusion 3."""

LOSS_TERMS = ("loc", "global", "mask", "perc", "paired", "ldm")
"""What `loss` joins: as `IEditLoss.NEEDS` has them."""

# Of diffusers' `SchedulerType`, those that need nothing but the options below.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# What may differ between a checkpoint and the run that goes on from it: nothing of this changes its weights.
FREE_OPTIONS = {
    "base_share",
    "output_dir",
    "max_train_steps",
    "cache_latents",
    "cache_dir",
    "dataloader_num_workers",
    "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention",
    "allow_tf32",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "validation_data",
    "validation_steps",
    "num_validation_pairs",
    "strength",
    "guidance_scale",
    "num_inference_steps",
    "evaluation_data",
    "num_evaluation_examples",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "license",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values: for None, the help says what happens, and switches are off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--preset", default="paper", choices=PRESETS, help="other defaults for some of the options: see the guide"
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        default="CompVis/stable-diffusion-v1-4",
        help="the base, a Stable Diffusion 1.x, 2.x, XL, 3 or 3.5: a Hub id, a folder, mini, mini-base, or mini-sd3",
    )
    group.add_argument(
        "--clip_model", help="CLIP of the losses loc and global; openai/clip-vit-large-patch14, for mini the mini one"
    )
    group.add_argument(
        "--perceptual_model", help="VGG-16 of the loss perc; timm/vgg16.tv_in1k by default, for mini the mini one"
    )
    group.add_argument(
        "--loss_decoder",
        help="an AutoencoderTiny (madebyollin/taesd, or mini) that decodes for the losses on images instead of the"
        " VAE, whose decoder costs more than the UNet",
    )
    group = parser.add_argument_group("data")
    group.add_argument("--train_data", required=True, help="pairs from build_dataset.py: a folder, a Hub id, or mini")
    group.add_argument("--train_split", default="train", help="split of the pairs")
    group.add_argument(
        "--resolution",
        type=int,
        help="height and width of the training pictures; by default the size that the base was made for, but no more"
        " than the paper's 384, with Stable Diffusion 3 than 512, and with XL than 1024",
    )
    group.add_argument(
        "--aspect_ratio_buckets",
        metavar="HEIGHT,WIDTH;...",
        help="train each pair at that one of these sizes whose aspect is nearest to its source's, instead of at the"
        " resolution; a step has pairs of one size",
    )
    group.add_argument(
        "--random_crop",
        action="store_true",
        help="crop a pair anywhere instead of in the centre; either way, so that the crop holds what the masks mark",
    )
    group.add_argument("--random_flip", action="store_true", help="mirror half of the pairs")
    group.add_argument(
        "--cache_latents", action="store_true", help="encode the pairs once, before the first step, not in each step"
    )
    group.add_argument(
        "--cache_dir", type=Path, help="where to, for several runs to share; OUTPUT_DIR/cache by default"
    )
    group.add_argument("--dataloader_num_workers", type=int, default=2, help="processes that read pairs; 0 for none")
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--loss",
        default="loc+global+mask+perc",
        help="the terms of Eq. 12, joined by +, of loc, global, mask, perc, paired and ldm; the rows of Table 2 are"
        " global+paired, global+ldm+loc, global+ldm+loc+perc and the default",
    )
    group.add_argument(
        "--lambda_perc", type=float, default=0.1, help="weight of perc; the paper does not give its own"
    )
    group.add_argument(
        "--caption_dropout",
        type=float,
        default=0.0,
        help="share of samples with an empty prompt, trained by Eq. 1, so that guidance has something to start from;"
        " the paper names none",
    )
    group.add_argument("--snr_gamma", type=float, help="Min-SNR weights for the losses on the noise; 5 is customary")
    group.add_argument("--background_weight", type=float, default=1.0, help="of the background in mask (Eq. 9)")
    group.add_argument(
        "--overlap_masks", action="store_true", help="in mask, edit only where the masks of source and target overlap"
    )
    group.add_argument(
        "--min_edit_timestep",
        type=int,
        default=0,
        help="below this timestep, train on the source and its own caption by Eq. 1: z_t then leaves nothing to edit",
    )
    group.add_argument(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="of flow-matching models: how timesteps are drawn, and sigma_sqrt and cosmap by which weights beside the"
        " paper's t/T; logit_normal by default",
    )
    group.add_argument("--logit_mean", type=float, help="of logit_normal; 0 by default")
    group.add_argument("--logit_std", type=float, help="of logit_normal; 1 by default")
    group.add_argument("--mode_scale", type=float, help="of mode; 1.29 by default")
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--train_blocks",
        default="alternate",
        choices=TRAIN_BLOCKS,
        help="what of the model is trained; alternate: input and middle blocks of a UNet in turn (input, middle), or"
        " first and middle ones of a transformer (first, middle)",
    )
    group.add_argument(
        "--lora_rank",
        type=int,
        help="train LoRA layers of this rank in those blocks instead; 0 for none, which is the default, but for Stable"
        " Diffusion XL and 3: 16",
    )
    group.add_argument("--max_train_steps", type=int, default=10_000, help="optimiser steps")
    group.add_argument("--train_batch_size", type=int, default=1, help="pairs a step, process and accumulation")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches a step")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="of Adam")
    group.add_argument(
        "--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="how the learning rate goes on"
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="steps until the learning rate is reached")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the mean of the gradients")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the mean of their squares")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="decoupled, as in AdamW")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    group.add_argument("--use_8bit_adam", action="store_true", help="Adam of bitsandbytes")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--use_ema", action="store_true", help="keep the average of the weights, and save that")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="of the average, after a warm-up")
    group.add_argument(
        "--base_share",
        type=float,
        default=0.0,
        help="save the average of what was trained and the base, with this share of the base's weights: it gives back"
        " more of the background than it takes of the edits; of LoRA layers, a smaller scale",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default accelerate's own setting")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    group.add_argument("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of SDPA")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 on Ampere and newer GPUs")
    group = parser.add_argument_group("checkpoints, validation and reports")
    group.add_argument("--output_dir", type=Path, required=True, help="the model's folder; checkpoints come there too")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="steps between two checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="keep so many, the newest")
    group.add_argument("--resume_from_checkpoint", help="latest, or the name of a folder in OUTPUT_DIR")
    group.add_argument(
        "--overwrite_output_dir",
        action="store_true",
        help="begin anew in a folder that holds an earlier run; its model and its checkpoints go",
    )
    group.add_argument("--validation_data", help="pairs to show; the first of the training pairs by default")
    group.add_argument("--validation_steps", type=int, default=500, help="steps between two grids")
    group.add_argument("--num_validation_pairs", type=int, default=4, help="0 for no validation")
    group.add_argument("--strength", type=float, default=0.7, help="of the edits that are shown")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="of these edits")
    group.add_argument("--num_inference_steps", "--steps", type=int, default=50, help="of these edits")
    group.add_argument(
        "--evaluation_data",
        help="at the end, edit these examples by SDEdit, iEdit and iEdit-M, into OUTPUT_DIR/evaluation, for the card's"
        " table: what `iedit evaluate --data` takes",
    )
    group.add_argument("--num_evaluation_examples", type=int, default=50, help="of each group; the first")
    group.add_argument(
        "--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"], help="who draws the curves"
    )
    group = parser.add_argument_group("Hub", "the token is HF_TOKEN, or what `hf auth login` stored")
    group.add_argument("--push_to_hub", action="store_true", help="upload the model with its card")
    group.add_argument("--hub_model_id", help="by default the output folder's name")
    group.add_argument("--hub_private", action="store_true", help="make a new repository private")
    group.add_argument("--license", help="licence of the result, in the Hub's names; it has to suit the base's")
    preset, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[preset.preset])
    args = parser.parse_args(argv)

    mini = args.model in SHIPPED_PIPELINES
    args.clip_model = args.clip_model or ("mini" if mini else "openai/clip-vit-large-patch14")
    args.perceptual_model = args.perceptual_model or ("mini" if mini else "timm/vgg16.tv_in1k")
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command where a value makes no sense, whatever the model is."""
    positive = (
        "max_train_steps train_batch_size gradient_accumulation_steps resolution checkpointing_steps "
        "checkpoints_total_limit validation_steps"
    )
    for name in positive.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} has to be 1 or more, got {getattr(args, name)}.")
    if args.lora_rank is not None and args.lora_rank < 0:
        parser.error(f"--lora_rank has to be 0 or more, got {args.lora_rank}.")
    if not 0 <= args.base_share < 1:
        parser.error(f"--base_share has to be at least 0 and below 1, got {args.base_share}.")
    if not 0 <= args.caption_dropout <= 1:
        parser.error(f"--caption_dropout has to be between 0 and 1, got {args.caption_dropout}.")
    for name, value in vars(args).items():
        if isinstance(value, float) and math.isnan(value):
            parser.error(f"--{name} has to be a number, got {value}.")
    if args.logit_std is not None and args.logit_std < 0:
        parser.error(f"--logit_std has to be 0 or more, got {args.logit_std}.")
    # Beyond, what is drawn is no time any more (https://huggingface.co/papers/2403.03206, Sec. 3.1).
    if args.mode_scale is not None and not -1 <= args.mode_scale <= 2 / (math.pi - 2):
        parser.error(f"--mode_scale has to be between -1 and {2 / (math.pi - 2):.3f}, got {args.mode_scale}.")
    terms = args.loss.split("+")
    if not set(terms) <= set(LOSS_TERMS) or len(set(terms)) < len(terms):
        known = ", ".join(LOSS_TERMS)
        parser.error(f"--loss has to be some of {known}, each once, joined by +, got {args.loss!r}.")
    if args.lambda_perc < 0:
        parser.error(f"--lambda_perc has to be 0 or more, got {args.lambda_perc}.")
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        parser.error("--overwrite_output_dir and --resume_from_checkpoint exclude each other.")
    if args.random_crop and args.cache_latents:
        parser.error("--random_crop and --cache_latents exclude each other: there is no end of crops to cache.")
