"""What a training step costs: iEdit's objectives, the rows of the paper's Table 2, beside LDM fine-tuning by Eq. 1.

    python benchmarks/train_step.py --size mini
    python benchmarks/train_step.py --size sd

A step is what train_iedit.py does with a batch: encoding the pairs, forward, backward, clipping, AdamW, on the input
and the middle blocks in turn. All objectives run on the same networks, in turn and in one process. `sd` has the
architectures of Stable Diffusion 1.4, CLIP ViT-L/14, VGG-16 and TAESD with random weights: time and memory do not
depend on their values, and nothing is downloaded. Memory is measured apart, in a fresh process for each objective.
"""

import argparse
import gc
import io
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import diffusers
import psutil
import sd_size
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, default_collate
from transformers import CLIPImageProcessor, CLIPTokenizer

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.finetuning.data import PairStream, draw_noise
from diffusers_iedit.finetuning.families import StableDiffusion, load_base
from diffusers_iedit.finetuning.models import (
    PairEncoder,
    batch_loss,
    load_clip,
    load_decoder,
    load_features,
    parameter_groups,
)
from diffusers_iedit.losses import CLIPImageEmbedder, IEditLoss, LatentDecoder
from diffusers_iedit.pairs import FEATURES


class Variant(NamedTuple):
    """One way to train."""

    loss: str  # "plain", or terms as for --loss of train_iedit.py
    decoder: str = "vae"  # what decodes for the losses on images: "vae", or "tiny" for --loss_decoder
    option: str = ""  # "", "cached" for --cache_latents, or "checkpointing" for --gradient_checkpointing

    def __str__(self) -> str:
        return "/".join(part for part in (self.loss, self.loss != "plain" and self.decoder, self.option) if part)

    @property
    def terms(self) -> tuple[str, ...]:
        return () if self.loss == "plain" else tuple(self.loss.split("+"))

    @property
    def baseline(self) -> "Variant":
        return Variant("plain", option=self.option)


EQ_12 = "loc+global+mask+perc"
TABLE_2 = ("global+paired", "global+ldm+loc", "global+ldm+loc+perc", EQ_12)
OPTIONS = ("", "cached", "checkpointing")
VARIANTS = {
    str(variant): variant
    for variant in (
        *(Variant("plain", option=option) for option in OPTIONS),
        *(Variant(loss, decoder) for loss in TABLE_2 for decoder in ("vae", "tiny")),
        *(Variant(EQ_12, decoder, option) for option in OPTIONS[1:] for decoder in ("vae", "tiny")),
    )
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("mini", "sd"), default="mini", help="which models")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--resolution", type=int, help="side of the pictures (default: 64 for mini, 384 for sd)")
    parser.add_argument("--batch_size", type=int, help="pairs a step (default: 16 for mini, 1 for sd)")
    parser.add_argument("--repeats", type=int, help="timed steps of each block (default: 10 for mini, 3 for sd)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--memory_of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = {
        "mini": {"resolution": 64, "batch_size": 16, "repeats": 10},
        "sd": {"resolution": 384, "batch_size": 1, "repeats": 3},
    }
    for name, value in defaults[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def make_pairs(side: int, count: int = 32) -> Dataset:
    """Pairs of mini-world pictures, enlarged and with noise, so that a JPEG of one is as large as that of a photo."""

    def encode(image: Image.Image, kind: str) -> dict:
        file = io.BytesIO()
        image.save(file, kind, quality=90)
        return {"bytes": file.getvalue(), "path": None}

    rows = []
    for seed in range(count):
        row = {"similarity": 0.8}
        for name, scene in (("source", mini.render(seed)), ("target", mini.render(count + seed))):
            picture = Image.blend(
                scene.image.resize((side, side), Image.Resampling.BICUBIC),
                Image.effect_noise((side, side), 64).convert("RGB"),
                0.1,
            )
            row[f"{name}_image"] = encode(picture, "JPEG")
            row[f"{name}_mask"] = encode(scene.mask.resize((side, side)), "PNG")
            row["source_caption" if name == "source" else "edit_prompt"] = scene.caption
            row[f"{name}_term"] = scene.things[scene.focus].noun
        rows.append(row)
    return Dataset.from_list(rows, FEATURES)


def make_batch(args: argparse.Namespace) -> dict:
    stream = PairStream(make_pairs(args.resolution, args.batch_size), args.resolution)
    return default_collate([stream[position] for position in range(args.batch_size)])


def load_networks(size: str, names: set[str], device: str, half: torch.dtype) -> dict:
    """The networks of these names, as train_iedit.py has them: the UNet and the VAE in fp32, the others in `half`."""
    dtypes = {name: torch.float32 if name in ("unet", "vae") else half for name in names}
    if size == "sd":
        return {name: sd_size.build(name, dtype, device) for name, dtype in dtypes.items()}
    pipe = load_base("mini")
    networks = {name: pipe.components[name] for name in ("vae", "text_encoder", "unet")}
    networks |= {"clip": load_clip("mini")[0], "vgg": load_features("mini"), "tiny_vae": load_decoder("mini")}
    return {name: networks[name].to(device, dtype) for name, dtype in dtypes.items()}


class Training:
    """What train_iedit.py has in memory while it trains by some objectives, and one step of each.

    Args:
        size (`str`): "mini" or "sd".
        variants (`list[Variant]`): The objectives.
        device (`str`), half (`torch.dtype`): Where, and the precision of mixed precision; float32 for none.
        **adam: Options of AdamW.
    """

    def __init__(self, size: str, variants: list[Variant], device: str, half: torch.dtype, **adam):
        self.device, self.half = device, half
        needed = {name for variant in variants for term in variant.terms for name in IEditLoss.NEEDS[term]}
        names = {"vae", "text_encoder", "unet"}
        names |= {network for name, network in (("embed_image", "clip"), ("features", "vgg")) if name in needed}
        names |= {"tiny_vae" for variant in variants if variant.decoder == "tiny"}
        self.networks = load_networks(size, names, device, half)
        self.vae, self.unet = self.networks["vae"], self.networks["unet"]
        for name in ("vae", "text_encoder", "unet"):
            self.networks[name].requires_grad_(False)
        if size == "mini":
            pipe_folder = mini.model_path()
            tokenizer = CLIPTokenizer.from_pretrained(pipe_folder / "tokenizer")
            clip_processor = load_clip("mini")[1]
            clip_tokenizer, image_processor = clip_processor.tokenizer, clip_processor.image_processor
            self.scheduler = DDPMScheduler.from_pretrained(pipe_folder / "scheduler")
        else:
            tokenizer = clip_tokenizer = sd_size.tokenizer()
            image_processor = CLIPImageProcessor()
            self.scheduler = DDPMScheduler.from_config(DDIMScheduler(**sd_size.SCHEDULER).config)
        models = {name: self.networks[name] for name in ("vae", "text_encoder", "unet")}
        self.family = StableDiffusion(
            IEditPipeline(**models, tokenizer=tokenizer, scheduler=self.scheduler, requires_safety_checker=False)
        )

        embed_image = None
        if "clip" in names:
            with torch.device(device):
                embed_image = CLIPImageEmbedder(self.networks["clip"], image_processor)
        self.encoders, self.criteria = {}, {}
        for variant in variants:
            self.encoders[variant] = PairEncoder(self.family, variant.terms, self.networks.get("clip"), clip_tokenizer)
            if variant.terms:
                decode = LatentDecoder(self.networks["tiny_vae" if variant.decoder == "tiny" else "vae"])
                networks = {"decode": decode, "embed_image": embed_image, "features": self.networks.get("vgg")}
                self.criteria[variant] = IEditLoss(variant.terms, **networks)
        self.empty_prompt = self.encoders[variants[0]].encode_prompts([""])

        self.groups = parameter_groups(self.family, "alternate")
        self.trainable = {name: parameter for group in self.groups for name, parameter in group.items()}
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=1e-6, **adam)
        self.scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)
        self.unet.train()

    def plain_loss(self, variant: Variant, batch: dict) -> torch.Tensor:
        """Eq. 1, as diffusers' own training script for text to image has it."""
        if variant.option == "cached":
            latents, states = batch["source_latents"], batch["prompt_states"]
        else:
            with torch.no_grad():
                images = 2 * batch["source_image"].to(self.device) - 1
                latents = self.vae.encode(images).latent_dist.mode() * self.vae.config.scaling_factor
                states = self.encoders[variant].encode_prompts(batch["edit_prompt"])["states"]
        timesteps, noise = draw_noise(batch["noise_seed"], latents.shape[1:], self.family.draw_timestep)
        timesteps, noise = timesteps.to(self.device), noise.to(self.device)
        with torch.autocast(self.device, self.half, enabled=self.half != torch.float32):
            noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
            return F.mse_loss(self.unet(noisy_latents, timesteps, states).sample.float(), noise)

    def iedit_loss(self, variant: Variant, batch: dict) -> torch.Tensor:
        """Eq. 12 with the variant's terms, as train_iedit.py has it."""
        encoded = batch if variant.option == "cached" else self.encoders[variant](batch)
        shape = encoded["source_latents"].shape[1:]
        timesteps, noise = draw_noise(batch["noise_seed"], shape, self.family.draw_timestep)
        with torch.autocast(self.device, self.half, enabled=self.half != torch.float32):
            loss, _ = batch_loss(
                *(self.family, self.unet, self.criteria[variant], encoded, timesteps, noise),
                *(self.empty_prompt, batch["drop_caption"]),
            )
        return loss.mean()

    def prepare(self, variant: Variant, batch: dict) -> dict:
        """What `step` takes: a batch of pairs, or what the data set of cached latents has in its place."""
        if variant.option != "cached":
            return batch
        return self.encoders[variant](batch) | {name: batch[name] for name in ("noise_seed", "drop_caption")}

    def loss(self, variant: Variant, batch: dict) -> torch.Tensor:
        if variant.option == "checkpointing":
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        return self.iedit_loss(variant, batch) if variant.terms else self.plain_loss(variant, batch)

    def step(self, variant: Variant, batch: dict, number: int) -> None:
        turn = self.groups[number % len(self.groups)]
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in turn)
        self.scaler.scale(self.loss(variant, batch)).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.trainable.values(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()


def half_precision(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def measure_times(
    training: Training, variants: list[Variant], batch: dict, repeats: int
) -> dict[Variant, list[float]]:
    """Seconds of a step, as means over one of each block, taken in turn so that what else the machine does meets all
    objectives alike."""
    batches = {variant: training.prepare(variant, batch) for variant in variants}
    seconds = {variant: [] for variant in variants}
    turns = len(training.groups)
    # AdamW's moments come into being.
    for number in range(turns):
        training.step(variants[0], batches[variants[0]], number)
    for _ in range(repeats):
        for variant in variants:
            gc.collect()
            start = time.perf_counter()
            for number in range(turns):
                training.step(variant, batches[variant], number)
            seconds[variant].append((time.perf_counter() - start) / turns)
    return seconds


def measure_loading(training: Training, variant: Variant, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and seconds of it that wait for two workers to load pairs; and what a batch takes them when
    nothing else runs. The first batch, for which the workers start, does not count."""
    stream = PairStream(make_pairs(64 if args.size == "mini" else 512), args.resolution)
    steps = 2 * args.repeats

    def loader(batches: int) -> DataLoader:
        return DataLoader(stream, args.batch_size, sampler=range(batches * args.batch_size), num_workers=2)

    batches = iter(loader(steps + 1))
    training.step(variant, next(batches), 0)
    waited, began = 0.0, time.perf_counter()
    for number in range(1, steps + 1):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        training.step(variant, batch, number)
    seconds = (time.perf_counter() - began) / steps

    count = -(-64 // args.batch_size)
    batches = iter(loader(count + 1))
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    alone = (time.perf_counter() - start) / count
    return {"step_seconds": seconds, "waiting_seconds": waited / steps, "loading_alone_seconds": alone}


def measure_memory_here(variant: Variant, args: argparse.Namespace, device: str) -> dict[str, float]:
    """MiB that steps take in this process: at their peak, and by how much that is more than the loaded models."""
    batch = make_batch(args)
    training = Training(args.size, [variant], device, half_precision(device))
    batch = training.prepare(variant, batch)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
    else:
        loaded = psutil.Process().memory_info().rss
    # The last step has all of AdamW's moments in memory.
    for number in range(len(training.groups) + 1):
        training.step(variant, batch, number)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # In KiB on Linux, in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"peak_mib": peak / 2**20, "peak_over_models_mib": (peak - loaded) / 2**20}


def measure_memory(variant: Variant, args: argparse.Namespace) -> dict[str, float]:
    """`measure_memory_here` in a process of its own, as a process's peak never falls again."""
    argv = [part for name in ("size", "resolution", "batch_size") for part in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *argv, "--memory_of", str(variant)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def compute_memory(variant: Variant, args: argparse.Namespace) -> dict[str, float]:
    """MiB of all tensors of a training on a GPU at their peak, from the shapes alone: nothing is run.

    bfloat16 stands for float16, as large. Norms under autocast are in fp32, and AdamW takes all parameters at once, as
    on CUDA. The CUDA context, what its libraries take and what the allocator rounds up come on top.
    """

    def in_fp32(norm: Callable) -> Callable:
        def run(*inputs, **options):
            if not torch.is_autocast_enabled("cpu"):
                return norm(*inputs, **options)
            inputs = tree_map_only(torch.Tensor, torch.Tensor.float, inputs)
            with torch.autocast("cpu", enabled=False):
                return norm(*inputs, **options)

        return run

    norms = (
        mock.patch.object(F, "group_norm", in_fp32(F.group_norm)),
        mock.patch.object(F, "layer_norm", in_fp32(F.layer_norm)),
    )
    memory = LiveBytes()
    # Whether a pair is left out depends on its pixels, and its noise on its seed: fake tensors have neither.
    pairs = make_batch(args)
    pairs["noise_seed"] = pairs["noise_seed"].tolist()
    with FakeTensorMode() as mode, norms[0], norms[1]:
        training = Training("sd", [variant], "cpu", torch.bfloat16, foreach=True)
        batch = training.prepare(variant, tree_map_only(torch.Tensor, mode.from_tensor, pairs))
        for module in training.networks.values():
            for tensor in (*module.parameters(), *module.buffers()):
                memory.add(tensor)
        weights = memory.live
        with memory:
            for number in range(len(training.groups)):
                training.step(variant, batch, number)
            states = memory.live - weights
            for number in range(len(training.groups)):
                training.step(variant, batch, number)
    sizes = {"weights": weights, "adam": states, "rest": memory.peak - weights - states, "peak": memory.peak}
    return {f"computed_{name}_mib": size / 2**20 for name, size in sizes.items()}


def main():
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of is not None:
        print(json.dumps(measure_memory_here(VARIANTS[args.memory_of], args, device)))
        return

    plain = VARIANTS["plain"]
    chosen = [VARIANTS[name] for name in args.variants]
    variants = list(dict.fromkeys([plain, *(variant.baseline for variant in chosen), *chosen]))
    results = {variant: measure_memory(variant, args) for variant in variants}
    if args.size == "sd":
        for variant in variants:
            results[variant] |= compute_memory(variant, args)
    torch.manual_seed(0)
    training = Training(args.size, variants, device, half_precision(device))
    seconds = measure_times(training, variants, make_batch(args), args.repeats)
    for variant in variants:
        ratios = [own / base for own, base in zip(seconds[variant], seconds[variant.baseline], strict=True)]
        results[variant] |= {
            "median_seconds": statistics.median(seconds[variant]),
            "median_time_ratio": statistics.median(ratios),
            "seconds": seconds[variant],
        }
    loading = measure_loading(training, plain, args)

    settings = {
        **{name: getattr(args, name) for name in ("size", "resolution", "batch_size", "repeats")},
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "precision": str(training.half).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    computed = " fp16 computed MiB" if args.size == "sd" else ""
    print(f"{'variant':<39}{'median s':>9}{'time ratio':>12}{'peak MiB':>10}{'over models':>13}{computed}")
    for variant, result in results.items():
        print(
            f"{variant!s:<39}{result['median_seconds']:>9.3f}{result['median_time_ratio']:>12.3f}"
            f"{result['peak_mib']:>10.0f}{result['peak_over_models_mib']:>13.0f}"
            + (f"{result['computed_peak_mib']:>18.0f}" if computed else "")
        )
    print(
        f"loading pairs: {loading['waiting_seconds'] / loading['step_seconds']:.2%} of a plain step "
        f"({loading['waiting_seconds'] * 1000:.1f} ms of {loading['step_seconds'] * 1000:.0f} ms); with nothing else "
        f"to do, two workers load a batch in {loading['loading_alone_seconds'] * 1000:.1f} ms"
    )
    if args.json is not None:
        figures = {str(variant): result for variant, result in results.items()}
        with open(args.json, "w") as file:
            json.dump({"settings": settings, "results": figures, "loading": loading}, file, indent=2)


if __name__ == "__main__":
    main()
