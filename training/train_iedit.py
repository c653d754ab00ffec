"""Fine-tunes a Stable Diffusion model with iEdit's objective (Secs. 3.3, 3.4 and 4.1) on pairs from build_dataset.py.

    accelerate launch training/train_iedit.py --train_data PAIRS --output_dir MODEL

The defaults are the paper's. Stopped at any moment, `--resume_from_checkpoint latest` goes on where it was.
"""

import argparse
import json
import logging
import multiprocessing
import shutil
import signal
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from datasets.fingerprint import Hasher
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm

from diffusers_iedit.finetuning.checkpoints import list_checkpoints, load_checkpoint, register_hooks, save_checkpoint
from diffusers_iedit.finetuning.data import CachedPairStream, PairStream, cache_pairs, draw_noise
from diffusers_iedit.finetuning.hub import check_hub, check_license, push_folder, write_model_card
from diffusers_iedit.finetuning.models import (
    TRAIN_BLOCKS,
    PairEncoder,
    add_lora,
    batch_loss,
    load_base,
    load_clip,
    load_decoder,
    load_features,
    parameter_groups,
)
from diffusers_iedit.finetuning.outputs import LossLog, save_lora, save_pipeline
from diffusers_iedit.finetuning.validation import Validation
from diffusers_iedit.losses import CLIPImageEmbedder, IEditLoss, LatentDecoder
from diffusers_iedit.pairs import load_pairs


logger = get_logger(__name__)

MODEL_CARD = Path(__file__).parents[1] / "model_card.md"

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
}

# What may differ between a checkpoint and the run that goes on from it: nothing of this changes the weights.
FREE_OPTIONS = {
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--preset", default="paper", choices=PRESETS, help="other defaults for some of the options: see the guide"
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        default="CompVis/stable-diffusion-v1-4",
        help="the base, a Stable Diffusion 1.x or 2.x: a Hub id, a folder, or mini",
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
    group.add_argument("--train_data", required=True, help="pairs from build_dataset.py: a folder or a Hub id")
    group.add_argument("--train_split", default="train", help="split of the pairs")
    group.add_argument("--resolution", type=int, default=384, help="height and width of the training pictures")
    group.add_argument("--random_crop", action="store_true", help="crop a pair anywhere instead of in the centre")
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
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--train_blocks",
        default="alternate",
        choices=TRAIN_BLOCKS,
        help="what of the UNet is trained; alternate: input and middle blocks in turn",
    )
    group.add_argument("--lora_rank", type=int, help="train LoRA layers of this rank in those blocks instead")
    group.add_argument("--max_train_steps", type=int, default=10_000, help="optimiser steps")
    group.add_argument("--train_batch_size", type=int, default=1, help="pairs a step, process and accumulation")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--learning_rate", type=float, default=2e-4)
    group.add_argument("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType])
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=1e-2)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--use_8bit_adam", action="store_true", help="Adam of bitsandbytes")
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--use_ema", action="store_true", help="keep the average of the weights, and save that")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="of the average, after a warm-up")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group = parser.add_argument_group("speed and memory")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="by default accelerate's own setting")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory for more time")
    group.add_argument("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of SDPA")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 on Ampere and newer GPUs")
    group = parser.add_argument_group("checkpoints, validation and reports")
    group.add_argument("--output_dir", type=Path, required=True, help="the model's folder; checkpoints come there too")
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int, help="keep so many, the newest")
    group.add_argument("--resume_from_checkpoint", help="latest, or the name of a folder in OUTPUT_DIR")
    group.add_argument("--validation_data", help="pairs to show; the first of the training pairs by default")
    group.add_argument("--validation_steps", type=int, default=500)
    group.add_argument("--num_validation_pairs", type=int, default=4, help="0 for no validation")
    group.add_argument("--strength", type=float, default=0.7, help="of the edits that are shown, as the next two")
    group.add_argument("--guidance_scale", type=float, default=7.5)
    group.add_argument("--num_inference_steps", "--steps", type=int, default=50)
    group.add_argument(
        "--evaluation_data",
        help="at the end, edit these examples by SDEdit, iEdit and iEdit-M, into OUTPUT_DIR/evaluation, for the card's"
        " table: what `iedit evaluate --data` takes",
    )
    group.add_argument("--num_evaluation_examples", type=int, default=50, help="of each group; the first")
    group.add_argument("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "none"])
    group = parser.add_argument_group("Hub", "the token is HF_TOKEN, or what `hf auth login` stored")
    group.add_argument("--push_to_hub", action="store_true", help="upload the model with its card")
    group.add_argument("--hub_model_id", help="by default the output folder's name")
    group.add_argument("--hub_private", action="store_true", help="make a new repository private")
    group.add_argument("--license", help="licence of the result, in the Hub's names; it has to suit the base's")
    preset, _ = parser.parse_known_args(argv)
    parser.set_defaults(**PRESETS[preset.preset])
    args = parser.parse_args(argv)

    mini = args.model in ("mini", "mini-base")
    args.clip_model = args.clip_model or ("mini" if mini else "openai/clip-vit-large-patch14")
    args.perceptual_model = args.perceptual_model or ("mini" if mini else "timm/vgg16.tv_in1k")
    positive = (
        "max_train_steps train_batch_size gradient_accumulation_steps resolution lora_rank checkpointing_steps "
        "checkpoints_total_limit validation_steps"
    )
    for name in positive.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} has to be 1 or more, got {getattr(args, name)}.")
    if not 0 <= args.caption_dropout <= 1:
        parser.error(f"--caption_dropout has to be between 0 and 1, got {args.caption_dropout}.")
    terms = args.loss.split("+")
    if not set(terms) <= set(IEditLoss.NEEDS) or len(set(terms)) < len(terms):
        known = ", ".join(IEditLoss.NEEDS)
        parser.error(f"--loss has to be some of {known}, each once, joined by +, got {args.loss!r}.")
    if args.lambda_perc < 0:
        parser.error(f"--lambda_perc has to be 0 or more, got {args.lambda_perc}.")
    if args.random_crop and args.cache_latents:
        parser.error("--random_crop and --cache_latents exclude each other: there is no end of crops to cache.")
    return args


def leave_sigterm(_: int) -> None:
    """For the processes that read pairs: a SIGTERM to all is answered by the main one."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def not_finite(step: int, rows: list[int], names: tuple[str, ...], values: list[list[float]]) -> str:
    """Says which pairs of a batch gave which losses."""
    lines = [
        f"  row {row}: " + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, line, strict=False))
        for row, line in zip(rows, values, strict=True)
    ]
    first = f"The loss of step {step}, or its gradient, is not finite. The batch's pairs and their losses:"
    return "\n".join([first, *lines])


def evaluate_model(args: argparse.Namespace) -> tuple[list[dict[str, str]], str]:
    """The card's table, of what the base and the model make of the examples, and a note to it."""
    from diffusers_iedit.evaluation.methods import Settings
    from diffusers_iedit.evaluation.runner import evaluate

    settings = {name: getattr(args, name) for name in ("strength", "guidance_scale", "num_inference_steps")}
    results = evaluate(
        args.evaluation_data,
        ["sdedit", "iedit", "iedit-m"],
        # After more steps, it is another model that is evaluated.
        args.output_dir / "evaluation" / f"step-{args.max_train_steps:06}",
        Settings(model=str(args.output_dir), base_model=args.model, **settings),
        num_examples=args.num_evaluation_examples,
        networks=dict.fromkeys(("clip", "fid", "lpips", "dino"), "mini") if args.clip_model == "mini" else None,
        seed=args.seed,
    )
    if not results:
        return [], ""
    summary = next(iter(results["summary"].values()))
    shown = [name for name in ("success", "clip_score", "ssim_m", "ssim_not_m") if name in summary["iedit"]]
    rows = [
        {"method": results["variants"][variant]["title"]}
        | {
            results["metrics"][name]["title"]: "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found[name])
            for name in shown
        }
        for variant, found in summary.items()
    ]
    note = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    return rows, f"Means over {len(results['examples'])} examples, with 95 % bootstrap intervals; {note}."


def write_card(
    args: argparse.Namespace, hub_model_id: str | None, loss_log: LossLog, total_batch_size: int, evaluation: tuple
) -> None:
    """Fills model_card.md from the run."""
    last = loss_log.read()[-100:]
    losses = {name: sum(row[name] for row in last) / len(last) for name in loss_log.columns[1:-1]}
    names = (
        "preset loss lambda_perc background_weight overlap_masks min_edit_timestep caption_dropout snr_gamma "
        "train_blocks lora_rank max_train_steps learning_rate lr_scheduler lr_warmup_steps resolution random_crop "
        "random_flip clip_model perceptual_model loss_decoder use_ema mixed_precision seed"
    )
    settings = {"total_batch_size": total_batch_size} | {name: getattr(args, name) for name in names.split()}
    grid = f"images/step-{args.max_train_steps:06}.png"
    write_model_card(
        args.output_dir,
        MODEL_CARD,
        repo_id=hub_model_id or args.output_dir.resolve().name,
        base_model=args.model,
        dataset=args.train_data,
        settings=settings,
        losses=losses,
        loss_plot="loss.png",
        evaluation=evaluation[0],
        evaluation_note=evaluation[1],
        pictures=[grid] if (args.output_dir / grid).exists() else [],
        license=args.license,
        lora=args.lora_rank is not None,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir, terms = args.output_dir, tuple(args.loss.split("+"))
    check_license(args.license)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` has to be a folder that can be written to, got {output_dir}: {error}"
        ) from error

    # Of blocks that take turns, some are unused in every step.
    in_turns = len(TRAIN_BLOCKS[args.train_blocks]) > 1
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=in_turns)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`mixed_precision` fp16 needs a GPU, and there is none; a CPU takes bf16 or no.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    for library in (datasets.utils.logging, transformers.utils.logging, diffusers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if args.report_to != "none" and not accelerator.log_with:
        raise ImportError(f"`report_to` {args.report_to} needs it: pip install {args.report_to}, or --report_to none")
    if args.evaluation_data:
        # What is missing is said now, not after the training.
        try:
            from diffusers_iedit.evaluation import runner
        except ImportError as error:
            raise ImportError(f'`evaluation_data`: {error}: pip install "diffusers-iedit[eval]"') from error
        runner.load_examples(args.evaluation_data)
    hub_model_id = None
    if args.push_to_hub and accelerator.is_main_process:
        hub_model_id = check_hub(args.hub_model_id or output_dir.resolve().name, private=args.hub_private or None)

    # 1. The base, frozen but for the blocks to train. What is frozen only takes part in fp16; the VAE, which overflows
    # in it, and what is trained stay in fp32.
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_base(args.model)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    if args.resolution % pipe.vae_scale_factor:
        raise ValueError(
            f"`resolution` has to be a multiple of {pipe.vae_scale_factor}, since the VAE of {args.model} makes one"
            f" latent of so many pixels, got {args.resolution}."
        )
    for module in (vae, text_encoder, unet):
        module.requires_grad_(False)
    vae.to(accelerator.device)
    text_encoder.to(accelerator.device, half)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.lora_rank is not None:
        add_lora(unet, args.lora_rank, args.train_blocks)
    groups = parameter_groups(unet, args.train_blocks)
    trainable = {name: parameter for group in groups for name, parameter in group.items()}
    for parameter in trainable.values():
        parameter.requires_grad_(True)

    # 2. The objective, with the frozen networks that its terms need.
    needed = {name for term in terms for name in IEditLoss.NEEDS.get(term, ())}
    clip = clip_tokenizer = embed_image = features = decode = None
    if "embed_image" in needed:
        clip, processor = load_clip(args.clip_model)
        clip_tokenizer = processor.tokenizer
        embed_image = CLIPImageEmbedder(clip.to(accelerator.device, half), processor.image_processor)
        embed_image.to(accelerator.device)
    if "features" in needed:
        features = load_features(args.perceptual_model).to(accelerator.device, half)
    if "decode" in needed:
        decoder = vae if args.loss_decoder is None else load_decoder(args.loss_decoder).to(accelerator.device, half)
        decode = LatentDecoder(decoder)
    criterion = IEditLoss(
        terms,
        args.lambda_perc,
        scheduler.config.prediction_type,
        scheduler.config.num_train_timesteps,
        decode,
        embed_image,
        features,
        args.background_weight,
        args.overlap_masks,
    )
    with_captions = args.min_edit_timestep > 0
    encoder = PairEncoder(vae, text_encoder, pipe.tokenizer, terms, clip, clip_tokenizer, with_captions)
    empty_states = encoder.encode_prompts([""])

    # 3. The data: a stream of samples, each drawn from its position in the stream.
    with accelerator.main_process_first():
        pairs = load_pairs(args.train_data, args.train_split, tokenizer=pipe.tokenizer)
        shown = load_pairs(args.validation_data) if args.validation_data else pairs
    shown = shown.select(range(min(args.num_validation_pairs, len(shown))))
    augmentation = (args.random_crop, args.random_flip, args.caption_dropout)
    stream = PairStream(pairs, args.resolution, *augmentation, args.seed, pipe.tokenizer)
    if args.cache_latents:
        weights = [float(p.sum()) for model in (vae, text_encoder, clip) if model for p in model.parameters()]
        key = Hasher.hash(
            [pairs._fingerprint, weights, args.resolution, args.random_flip, sorted(needed), with_captions, str(half)]
        )
        folder = (args.cache_dir or output_dir / "cache") / key
        stream = CachedPairStream(stream, cache_pairs(stream, encoder, folder, accelerator))

    # 4. Optimiser and learning rate. accelerate steps the schedule once for each process.
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    optimizer = optimizer_class(
        trainable.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    settings = {name: getattr(args, name) for name in ("strength", "guidance_scale", "num_inference_steps")}
    validation = Validation(accelerator, pipe, shown, args.resolution, args.seed, **settings) if len(shown) else None
    unet.train()
    wrapped, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Sharding has put other parameters in their place.
        unet = accelerator.unwrap_model(wrapped)
        groups = parameter_groups(unet, args.train_blocks)
        trainable = {name: parameter for group in groups for name, parameter in group.items()}
    ema = EMAModel(trainable.values(), args.ema_decay, use_ema_warmup=True) if args.use_ema else None
    register_hooks(accelerator, trainable, ema)

    # 5. Where it starts.
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    config = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(name)
    config |= {"total_batch_size": total_batch_size, "rows": len(pairs)}
    config["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        config["max_train_steps"] = args.max_train_steps
    first_step = 0
    checkpoints = {path.name: path for path in list_checkpoints(output_dir)}
    chosen = args.resume_from_checkpoint
    if checkpoints and not chosen:
        raise ValueError(
            f"`output_dir` {output_dir} holds checkpoints of an earlier run: go on from them with"
            " --resume_from_checkpoint latest, or take another folder."
        )
    if chosen:
        if chosen != "latest" and chosen not in checkpoints:
            found = ", ".join(checkpoints) or "none"
            raise ValueError(f"`resume_from_checkpoint`: {output_dir} has no {chosen}; its checkpoints: {found}.")
        if checkpoints:
            checkpoint = list(checkpoints.values())[-1] if chosen == "latest" else checkpoints[chosen]
            first_step = load_checkpoint(accelerator, checkpoint, config)
            logger.info(f"Going on from {checkpoint}.")
    if accelerator.is_main_process:
        loss_log = LossLog(output_dir / "losses.csv", ["step", "loss", *terms, "learning_rate"], first_step)
        (output_dir / "training_args.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    accelerator.init_trackers("iedit", config={name: str(value) for name, value in vars(args).items()})
    positions = range(first_step * total_batch_size, args.max_train_steps * total_batch_size)
    dataloader = accelerator.prepare(
        torch.utils.data.DataLoader(
            stream,
            args.train_batch_size,
            sampler=positions,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=leave_sigterm,
        )
    )

    # 6. The training. That it was told to stop, or that a loss is no number, all processes learn together.
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    step, micro_batches, stopped = first_step, [], False
    progress = tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    for batch in dataloader:
        if in_turns:
            turn = groups[step % len(groups)]
            for name, parameter in trainable.items():
                parameter.requires_grad_(name in turn)
        with accelerator.accumulate(wrapped):
            encoded = batch if args.cache_latents else encoder(batch)
            shape = encoded["source_latents"].shape[1:]
            timesteps, noise = draw_noise(batch["noise_seed"], shape, criterion.num_train_timesteps)
            with accelerator.autocast():
                loss, losses = batch_loss(
                    wrapped,
                    criterion,
                    scheduler,
                    encoded,
                    timesteps,
                    noise,
                    empty_states,
                    batch["drop_caption"],
                    args.snr_gamma,
                    args.min_edit_timestep,
                )
            seen = [loss, *(losses[term] for term in terms), torch.full_like(loss, bool(terminated))]
            seen = accelerator.gather(torch.stack(seen, 1).detach())
            micro_batches.append(seen)
            finite = seen.isfinite().all()
            if finite:
                accelerator.backward(loss.mean())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trainable.values(), args.max_grad_norm)
                    # The scaler of fp16 leaves such steps out by itself, and tries a smaller scale.
                    finite = accelerator.scaler is not None or norm.isfinite()
            if not finite:
                rows = accelerator.gather(batch["row"].to(seen.device)).tolist()
                raise FloatingPointError(not_finite(step + 1, rows, ("loss", *terms), seen.tolist()))
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        step += 1
        if ema is not None:
            for parameter in trainable.values():
                # EMAModel does not average what needs no gradient, and that are those whose turn it is not.
                parameter.requires_grad_(True)
            ema.step(trainable.values())
        *means, stopped = torch.cat(micro_batches).mean(0).tolist()
        micro_batches = []
        means = dict(zip(("loss", *terms), means, strict=True))
        learning_rate = lr_scheduler.get_last_lr()[0]
        if accelerator.is_main_process:
            loss_log.write({"step": step, **means, "learning_rate": learning_rate})
        curves = {name if name == "loss" else f"loss/{name}": value for name, value in means.items()}
        accelerator.log(curves | {"learning_rate": learning_rate}, step)
        progress.update()
        progress.set_postfix(loss=f"{means['loss']:.4g}")

        if stopped or step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, step, config, args.checkpoints_total_limit)
        if stopped:
            logger.info(f"Stopped by SIGTERM after step {step}; --resume_from_checkpoint latest goes on.")
            break
        if validation and (step % args.validation_steps == 0 or step == args.max_train_steps):
            if ema is not None:
                ema.store(trainable.values())
                ema.copy_to(trainable.values())
            grid = validation.save(output_dir / "images" / f"step-{step:06}.png")
            if ema is not None:
                ema.restore(trainable.values())
            for tracker in accelerator.trackers:
                tensorboard = tracker.name == "tensorboard"
                images = np.asarray(grid)[None] if tensorboard else [grid]
                tracker.log_images({"validation": images}, step, **({"dataformats": "NHWC"} if tensorboard else {}))
    progress.close()

    # 7. The model: the base with what was trained in its place. LoRA layers are merged, and lie beside it as well.
    if not stopped:
        if ema is not None:
            ema.copy_to(trainable.values())
        if args.lora_rank is not None and accelerator.is_main_process:
            save_lora(unet, output_dir / "lora")
        # Compiled, the names of the weights are others.
        state = accelerator.get_state_dict(wrapped)
        state = {name.removeprefix("_orig_mod."): values for name, values in state.items()}
        if accelerator.is_main_process:
            if args.lora_rank is None:
                # Of an earlier run into this folder; it would be taken for this one's.
                shutil.rmtree(output_dir / "lora", ignore_errors=True)
            final = load_base(args.model)
            final.unet.load_state_dict(state)
            save_pipeline(final, output_dir)
            loss_log.plot(output_dir / "loss.png")
        accelerator.wait_for_everyone()
        evaluation = evaluate_model(args) if args.evaluation_data else ([], "")
        if accelerator.is_main_process:
            write_card(args, hub_model_id, loss_log, total_batch_size, evaluation)
            if args.push_to_hub:
                logger.info(push_folder(output_dir, hub_model_id, private=args.hub_private or None))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        message = "stopped; --resume_from_checkpoint latest goes on from the last checkpoint."
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        message = f"error: {error}"
        if "in DataLoader worker process" in message:
            # Such an error comes with the worker's traceback as its text.
            message = f"error: {message.strip().splitlines()[-1].partition(': ')[2]}"
    else:
        sys.exit()
    # The processes that read pairs outlast an error, and an exit waits for them, while they leave SIGTERM alone.
    for process in multiprocessing.active_children():
        process.kill()
    sys.exit(f"train_iedit.py: {message}")
