"""Fine-tunes a Stable Diffusion model (1.x, 2.x, XL, 3 or 3.5) with iEdit's objective (Secs. 3.3, 3.4 and 4.1) on
pairs from build_dataset.py.

    accelerate launch training/train_iedit.py --train_data PAIRS --output_dir MODEL

The defaults are the paper's. Stopped at any moment, `--resume_from_checkpoint latest` goes on where it was.
"""

import sys

from diffusers_iedit.finetuning.options import parse_args


if __name__ == "__main__":
    # What --help and a wrong option get is not to wait for the imports below, which take seconds.
    args = parse_args()

import argparse
import json
import logging
import multiprocessing
import re
import shlex
import shutil
import signal
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from datasets.fingerprint import Hasher
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, parse_buckets_string
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from diffusers_iedit.finetuning.checkpoints import (
    choose_checkpoint,
    list_checkpoints,
    load_checkpoint,
    register_hooks,
    remove_later,
    remove_leftovers,
    remove_run,
    save_checkpoint,
)
from diffusers_iedit.finetuning.data import CachedPairStream, PairStream, cache_pairs, draw_noise, open_pairs
from diffusers_iedit.finetuning.families import Family, load_base, load_family
from diffusers_iedit.finetuning.hub import COMMAND, check_hub, check_license, push_folder, write_model_card
from diffusers_iedit.finetuning.models import (
    PairEncoder,
    add_lora,
    batch_loss,
    load_clip,
    load_decoder,
    load_features,
    parameter_groups,
)
from diffusers_iedit.finetuning.options import FREE_OPTIONS
from diffusers_iedit.finetuning.outputs import LossLog, check_folders, save_lora, save_pipeline
from diffusers_iedit.finetuning.validation import Validation
from diffusers_iedit.losses import CLIPImageEmbedder, IEditLoss, LatentDecoder
from diffusers_iedit.resuming import lock_folder


logger = get_logger(__name__)

MODEL_CARD = Path(__file__).parents[1] / "model_card.md"

LEFT_OUT = (
    "at this size one of their masks, or with --overlap_masks the overlap, covers less than a tenth of any latent."
)

MINI_NETWORKS = dict.fromkeys(("clip", "fid", "lpips", "dino"), "mini")


# Errors that say in words what is wrong, so that their kind need not be named.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)


class Terminated(BaseException):
    """SIGTERM, where it ends the work at once."""


def terminate(*_) -> None:
    """A handler of signals."""
    raise Terminated


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


def check_evaluation(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Says now, and not after the training, what is missing for `evaluation_data` and which of its rows are bad."""
    try:
        from diffusers_iedit.evaluation import runner
    except ImportError as error:
        raise ImportError(f'`evaluation_data`: {error}: pip install "diffusers-iedit[eval]"') from error
    examples = runner.load_examples(args.evaluation_data)
    if accelerator.is_main_process:
        # To read an example is to check it; the evaluation reads all of them too.
        for _ in tqdm(examples, desc="Checking the evaluation's examples", leave=False):
            pass


def evaluation_folder(args: argparse.Namespace) -> Path:
    """Of this model alone: after more steps, or averaged otherwise with its base, it is another one."""
    share = f"-base-{args.base_share:g}" if args.base_share else ""
    return args.output_dir / "evaluation" / f"step-{args.max_train_steps:06}{share}"


def evaluate_model(args: argparse.Namespace, family: Family) -> tuple[list[dict[str, str]], str]:
    """The card's table, of what the base and the model make of the examples, and a note to it."""
    from diffusers_iedit.evaluation.methods import Settings
    from diffusers_iedit.evaluation.runner import evaluate

    settings = {name: getattr(args, name) for name in ("strength", "guidance_scale", "num_inference_steps")}
    results = evaluate(
        args.evaluation_data,
        family.evaluation_methods(args.model, str(args.output_dir)),
        evaluation_folder(args),
        Settings(model=str(args.output_dir), base_model=args.model, **settings),
        num_examples=args.num_evaluation_examples,
        networks=MINI_NETWORKS if args.clip_model == "mini" else None,
        seed=args.seed,
    )
    if not results:
        return [], ""
    summary = next(iter(results["summary"].values()))
    measured = next(iter(summary.values()))
    shown = [name for name in ("success", "clip_score", "ssim_m", "ssim_not_m") if name in measured]
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
    args: argparse.Namespace,
    family: Family,
    hub_model_id: str | None,
    loss_log: LossLog,
    total_batch_size: int,
    evaluation: list[dict[str, str]] = [],
    evaluation_note: str = "",
) -> None:
    """Fills model_card.md from the run."""
    last = loss_log.read()[-100:]
    losses = {name: sum(row[name] for row in last) / len(last) for name in loss_log.losses}
    names = (
        "preset loss lambda_perc background_weight overlap_masks min_edit_timestep caption_dropout snr_gamma "
        "weighting_scheme train_blocks lora_rank max_train_steps learning_rate lr_scheduler lr_warmup_steps "
        "resolution random_crop random_flip clip_model perceptual_model loss_decoder use_ema base_share "
        "mixed_precision seed"
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
        evaluation=evaluation,
        evaluation_note=evaluation_note,
        pictures=[grid] if (args.output_dir / grid).exists() else [],
        license=args.license,
        lora=args.lora_rank is not None,
        pipeline_class=family.pipeline_class.__name__,
    )


def evaluation_command(args: argparse.Namespace, family: Family | type[Family]) -> str:
    """What evaluates the finished model as the training would have."""
    options = {
        "data": args.evaluation_data,
        "model": args.output_dir,
        "base-model": args.model,
        "methods": ",".join(family.evaluation_methods(args.model, str(args.output_dir))),
        "output-dir": evaluation_folder(args),
        "strength": args.strength,
        "guidance-scale": args.guidance_scale,
        "steps": args.num_inference_steps,
        "num-examples": args.num_evaluation_examples,
        "seed": args.seed,
    }
    if args.clip_model == "mini":
        options["networks"] = ",".join(f"{part}={name}" for part, name in MINI_NETWORKS.items())
    return shlex.join(
        ["iedit", "evaluate", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    )


def what_is_left(args: argparse.Namespace, family: Family, hub_model_id: str | None) -> str:
    """The commands for what comes after the model is saved."""
    left = [evaluation_command(args, family)] if args.evaluation_data else []
    if args.push_to_hub:
        left.append(shlex.join([*COMMAND.split(), str(args.output_dir), hub_model_id or args.output_dir.name]))
    return f" What is left: {'; '.join(left)}" if left else ""


def main(args: argparse.Namespace) -> None:
    check_license(args.license)
    check_folders(args)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`output_dir` has to be a folder that can be written to, got {args.output_dir}: {error}"
        ) from error

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")
        ),
        # Of blocks that take turns, some are unused in every step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.train_blocks == "alternate")],
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
    lock = lock_folder(args.output_dir, "training") if accelerator.is_main_process else nullcontext()
    with lock, logging_redirect_tqdm():
        try:
            accelerator.wait_for_everyone()
        except RuntimeError:
            # The main process has ended, and has said why.
            sys.exit(1)
        train(args, accelerator)


def train(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """The training, in a folder that is locked for it."""
    output_dir, terms = args.output_dir, tuple(args.loss.split("+"))
    checkpoint = choose_checkpoint(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    if accelerator.is_main_process:
        remove_leftovers(output_dir)
    if args.evaluation_data:
        check_evaluation(args, accelerator)
    hub_model_id = None
    if args.push_to_hub and accelerator.is_main_process:
        hub_model_id = check_hub(args.hub_model_id or output_dir.resolve().name, private=args.hub_private or None)

    # 1. The base, frozen but for the blocks to train. What is frozen only takes part in fp16; the VAE, which overflows
    # in it, and what is trained stay in fp32.
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    family = load_family(args.model)
    family.settle(args)
    model, vae, native = family.model, family.pipe.vae, family.native_resolution
    if args.resolution > native:
        logger.warning(
            f"`resolution` {args.resolution} is more than the {native} pixels that {args.model} was made for."
        )
    buckets = None
    if args.aspect_ratio_buckets is not None:
        try:
            buckets = parse_buckets_string(args.aspect_ratio_buckets)
        except ValueError as error:
            raise ValueError(f"`aspect_ratio_buckets`: {error}") from error
    for name, sides in (("resolution", [args.resolution]), ("aspect_ratio_buckets", chain(*(buckets or [])))):
        for side in sides:
            if side % family.multiple:
                raise ValueError(
                    f"`{name}` has to be a multiple of {family.multiple}, as {args.model} sees so many pixels as one,"
                    f" got {side}."
                )
    for module in (vae, model, *family.text_encoders):
        module.requires_grad_(False)
    vae.to(accelerator.device)
    for text_encoder in family.text_encoders:
        text_encoder.to(accelerator.device, half)
    if args.enable_xformers_memory_efficient_attention:
        model.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if args.lora_rank is not None:
        add_lora(family, args.lora_rank, args.train_blocks)
    groups = parameter_groups(family, args.train_blocks)
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
        family.prediction_type,
        family.num_train_timesteps,
        decode,
        embed_image,
        features,
        args.background_weight,
        args.overlap_masks,
    )
    with_captions = args.min_edit_timestep > 0
    encoder = PairEncoder(family, terms, clip, clip_tokenizer, with_captions)
    empty_prompt = encoder.encode_prompts([""])

    # 3. The data: a stream of samples, each drawn from its position in the stream.
    with accelerator.main_process_first():
        pairs = open_pairs(args.train_data, args.train_split, family.pipe.tokenizer)
        shown = open_pairs(args.validation_data) if args.validation_data else pairs
    shown = shown.select(range(min(args.num_validation_pairs, len(shown))))
    total_batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    stream = PairStream(
        pairs,
        args.resolution,
        args.random_crop,
        args.random_flip,
        args.caption_dropout,
        args.seed,
        family.pipe.tokenizer,
        buckets,
        total_batch_size,
        family.pipe.vae_scale_factor,
        args.overlap_masks and "mask" in terms,
    )
    if args.cache_latents:
        networks = [network for network in (vae, *family.text_encoders, clip) if network is not None]
        weights = [float(p.sum()) for network in networks for p in network.parameters()]
        key = Hasher.hash(
            [
                *(pairs._fingerprint, weights, stream.sizes, args.random_flip, stream.overlap_masks, sorted(needed)),
                *(with_captions, str(half)),
            ]
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
    terminated = []
    validation = None
    if len(shown):
        # Under FSDP every process has to take part in every forward pass.
        sharded = accelerator.distributed_type == DistributedType.FSDP
        validation = Validation(
            accelerator,
            family,
            shown,
            args.resolution,
            args.seed,
            lambda: bool(terminated) and not sharded,
            **settings,
        )
    model.train()
    wrapped, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    if accelerator.distributed_type == DistributedType.FSDP:
        # Sharding has put other parameters in their place.
        groups = parameter_groups(family, args.train_blocks, accelerator.unwrap_model(wrapped))
        trainable = {name: parameter for group in groups for name, parameter in group.items()}
    ema = EMAModel(trainable.values(), args.ema_decay, use_ema_warmup=True) if args.use_ema else None
    register_hooks(accelerator, trainable, ema)
    # On the CPU, as nothing needs it before the end. Under FSDP, a process has its own part of it.
    start = [parameter.detach().to("cpu", copy=True) for parameter in trainable.values()] if args.base_share else []

    # 5. Where it starts.
    config = {name: value for name, value in vars(args).items() if name not in FREE_OPTIONS}
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(name)
    config |= {"total_batch_size": total_batch_size, "rows": len(pairs)}
    config["mixed_precision"] = accelerator.mixed_precision
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        config["max_train_steps"] = args.max_train_steps
    first_step = 0
    if checkpoint is not None:
        first_step = load_checkpoint(accelerator, checkpoint, config)
        logger.info(f"Going on from {checkpoint}.")
    if accelerator.is_main_process:
        if checkpoint is not None:
            remove_later(checkpoint)
        elif args.overwrite_output_dir:
            remove_run(output_dir)
        loss_log = LossLog(
            output_dir / "losses.csv", ["step", "loss", *terms, "learning_rate", "left_out"], first_step
        )
        partial = output_dir / "training_args.json.partial"
        partial.write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
        partial.replace(output_dir / "training_args.json")
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
    def show(step: int) -> bool:
        """Saves and reports a grid, of the averaged weights if there are any; False if SIGTERM came meanwhile."""
        if ema is not None:
            ema.store(trainable.values())
            ema.copy_to(trainable.values())
        grid = validation.save(output_dir / "images" / f"step-{step:06}.png")
        if ema is not None:
            ema.restore(trainable.values())
        if grid is None:
            return False
        for tracker in accelerator.trackers:
            tensorboard = tracker.name == "tensorboard"
            images = np.asarray(grid)[None] if tensorboard else [grid]
            tracker.log_images({"validation": images}, step, **({"dataformats": "NHWC"} if tensorboard else {}))
        return True

    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    step, micro_batches, stopped = first_step, [], False
    # Whether any sample had a part in the training; in an epoch every pair is seen. Where a crop lies decides, too.
    used = [accelerator.is_main_process and any(row["left_out"] < total_batch_size for row in loss_log.read())]
    used = broadcast_object_list(used)[0]
    enough = min((10 if args.random_crop else 1) * stream.epoch_length, args.max_train_steps * total_batch_size)
    with tqdm(
        total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    ) as progress:
        for batch in dataloader:
            if len(groups) > 1:
                turn = groups[step % len(groups)]
                for name, parameter in trainable.items():
                    parameter.requires_grad_(name in turn)
            with accelerator.accumulate(wrapped):
                encoded = batch if args.cache_latents else encoder(batch)
                shape = encoded["source_latents"].shape[1:]
                timesteps, noise = draw_noise(batch["noise_seed"], shape, family.draw_timestep)
                with accelerator.autocast():
                    loss, losses = batch_loss(
                        family,
                        wrapped,
                        criterion,
                        encoded,
                        timesteps,
                        noise,
                        empty_prompt,
                        batch["drop_caption"],
                        args.snr_gamma,
                        args.min_edit_timestep,
                    )
                left_out = batch["left_out"].to(loss.device)
                loss = loss.masked_fill(left_out, 0)
                seen = [loss, *(losses[term] for term in terms), left_out, torch.full_like(loss, bool(terminated))]
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
            *means, left_out, stopped = torch.cat(micro_batches).mean(0).tolist()
            micro_batches = []
            means = dict(zip(("loss", *terms), means, strict=True))
            learning_rate = lr_scheduler.get_last_lr()[0]
            left_out = round(left_out * total_batch_size)
            used = used or left_out < total_batch_size
            if not used and step * total_batch_size >= enough:
                raise ValueError(
                    f"`train_data`: all of the {step * total_batch_size} samples of steps 1 to {step} were left out,"
                    f" so nothing is trained: {LEFT_OUT} A larger `resolution` keeps more of small masks."
                )
            if accelerator.is_main_process:
                loss_log.write({"step": step, **means, "learning_rate": learning_rate, "left_out": left_out})
            curves = {name if name == "loss" else f"loss/{name}": value for name, value in means.items()}
            accelerator.log(curves | {"learning_rate": learning_rate}, step)
            progress.update()
            progress.set_postfix(loss=f"{means['loss']:.4g}")

            saved = stopped or step % args.checkpointing_steps == 0
            if saved:
                save_checkpoint(accelerator, output_dir, step, config, args.checkpoints_total_limit)
            # The last grid comes after the last step, whether this run took it or only goes on from there.
            if validation and not stopped and step % args.validation_steps == 0 and step < args.max_train_steps:
                stopped = not show(step)
            if stopped:
                if not saved:
                    save_checkpoint(accelerator, output_dir, step, config, args.checkpoints_total_limit)
                logger.info(f"Stopped by SIGTERM after step {step}; --resume_from_checkpoint latest goes on.")
                break
    if stopped:
        accelerator.end_training()
        return

    if accelerator.is_main_process:
        left_out, count = (sum(row["left_out"] for row in loss_log.read()), args.max_train_steps * total_batch_size)
        if left_out:
            logger.warning(
                f"{left_out:.0f} of {count} samples were left out: {LEFT_OUT} losses.csv has them by steps."
            )

    # 7. The model: the base with what was trained, or its average with the base, in its place. LoRA layers are merged,
    # and lie beside it as well.
    if ema is not None:
        ema.copy_to(trainable.values())
        ema = None
    with torch.no_grad():
        for (name, parameter), before in zip(trainable.items(), start, strict=False):
            # Of the product of two LoRA matrices, one has the share; it starts at zero.
            if "lora_A" not in name:
                parameter.lerp_(before.to(parameter.device), args.base_share)
    if validation:
        show(args.max_train_steps)
    if args.lora_rank is not None and accelerator.is_main_process:
        # Until it has the pipeline of these layers, it is no finished model.
        (output_dir / "model_index.json").unlink(missing_ok=True)
        save_lora(family, output_dir / "lora")
    # Compiled, the names of the weights are others.
    state = accelerator.get_state_dict(wrapped)
    state = {name.removeprefix("_orig_mod."): values for name, values in state.items()}
    if accelerator.is_main_process:
        if args.lora_rank is None:
            # Of an earlier run into this folder; it would be taken for this one's.
            shutil.rmtree(output_dir / "lora", ignore_errors=True)
        final = load_base(args.model)
        getattr(final, family.model_name).load_state_dict(state)
        save_pipeline(final, output_dir)
        loss_log.plot(output_dir / "loss.png")
        write_card(args, family, hub_model_id, loss_log, total_batch_size)
    accelerator.wait_for_everyone()

    # 8. What follows can fail, or be stopped at once: the model is whole.
    try:
        signal.signal(signal.SIGTERM, terminate)
        if terminated:
            raise Terminated
        if args.evaluation_data:
            evaluation = evaluate_model(args, family)
            if accelerator.is_main_process:
                write_card(args, family, hub_model_id, loss_log, total_batch_size, *evaluation)
        if args.push_to_hub and accelerator.is_main_process:
            logger.info(push_folder(output_dir, hub_model_id, private=args.hub_private or None))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except (Terminated, KeyboardInterrupt, Exception) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        whole = f"The model in {output_dir} is whole.{what_is_left(args, family, hub_model_id)}"
        if not isinstance(error, Terminated):
            reason = "Stopped" if isinstance(error, KeyboardInterrupt) else describe(error)
            raise RuntimeError(f"{reason.rstrip('.')}. {whole}") from error
        logger.info(f"Stopped by SIGTERM. {whole}")
    else:
        edit = shlex.join(["iedit", "edit", "PICTURE", "PROMPT", "--model", str(output_dir), "-o", "edited.png"])
        logger.info(f"The model is in {output_dir}. To edit with it: {edit}")
    accelerator.end_training()


def describe(error: Exception) -> str:
    """What went wrong, without the traceback of the process that read the data."""
    message = str(error)
    if "in DataLoader worker process" in message:
        # Such an error comes with a traceback as its text. What it says begins after the last line of code.
        _, _, last = message.rpartition("\n  File ")
        message = re.sub(r"\A.*?\n(?=\S)", "", last, flags=re.DOTALL).strip()
        name, _, said = message.partition(": ")
        return said if name in [kind.__name__ for kind in EXPECTED] else message
    return message if isinstance(error, EXPECTED) else f"{type(error).__name__}: {message}"


if __name__ == "__main__":
    try:
        main(args)
    except KeyboardInterrupt:
        newest = [path.name for path in list_checkpoints(args.output_dir)][-1:]
        goes_on = (
            f"--resume_from_checkpoint latest goes on from {newest[0]}." if newest else "no checkpoint was written."
        )
        message = f"stopped; {goes_on}"
    except Exception as error:
        message = f"error: {describe(error)}"
    else:
        message = None
    # The processes that read pairs outlast an error, and an exit waits for them, while they leave SIGTERM alone.
    # PyTorch would report their end as an error of its own.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()
    sys.exit(message and f"train_iedit.py: {message}")
