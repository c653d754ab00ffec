"""What makes an edit faster, and what it costs in success and in likeness to the true picture, on the mini models.

    OMP_NUM_THREADS=1 python benchmarks/fast.py
    OMP_NUM_THREADS=1 python benchmarks/fast.py --only steps --forms mini --scenes 8
    OMP_NUM_THREADS=1 python benchmarks/fast.py --processes 16

Three parts:

- `steps`: the curve over steps, by scheduler and by guidance, from which `acceleration.FEW_STEPS` was chosen.
- `levers`: the defaults, `--fast`, and each lever on it alone and all together, on scenes of other seeds.
- `precision`: `--fast` in each precision that the machine has; on a CPU without bfloat16 that is slow, and only
  success is of interest.

Every edit swaps a thing or a colour, in turn, in the true mask, in scenes of one thing and of two. It succeeds if the
classifier that is in no loss, `mini.judging.Judge`, sees the thing and the colour that were asked for. PSNR is that of
the masked pixels against the true edited picture. Seconds are CPU seconds, on CUDA those of the clock.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from regions import ask, psnr_inside
from tqdm import tqdm

from diffusers_iedit import IEditPipeline, LocalEditor, mini
from diffusers_iedit.acceleration import FEW_STEPS, GuidanceCutoffCallback, devices, few_steps, prepare
from diffusers_iedit.mini.judging import Judge


# Seeds that no training and no other measurement uses; what is reported is not what was chosen on.
CHOOSING_SEED, REPORTING_SEED = 400_000, 410_000
PARTS = ("steps", "levers", "precision")
FORMS = ("mini", "mini-sd3")
STRENGTH, DILATION, BATCH = 0.7, 2, 8

SCHEDULERS = {
    "mini": {
        "DDIM": (DDIMScheduler, {}),
        "Euler": (EulerDiscreteScheduler, {}),
        "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
        "DPM++ 2M Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        "UniPC": (UniPCMultistepScheduler, {}),
    },
    "mini-sd3": {
        "flow-match Euler": (FlowMatchEulerDiscreteScheduler, {}),
        "flow-match Heun": (FlowMatchHeunDiscreteScheduler, {}),
    },
}
STEPS = (4, 6, 8, 12, 20)
GUIDANCES = (3.0, 7.5)
# By the model's own scheduler.
DEFAULTS = {"mini": (50, 7.5), "mini-sd3": (50, 7.0)}


class Variant(NamedTuple):
    """How edits are made; the scheduler is the model's own, that of `few_steps`, or one out of `SCHEDULERS`."""

    form: str
    scheduler: str
    steps: int
    guidance: float
    share: float | None = None
    tiny_vae: bool = False
    dtype: str = "float32"


class Task(NamedTuple):
    """A batch of edits; those of one variant, group and number are the same ones in every variant."""

    variant: Variant
    things: int
    first_seed: int
    numbers: tuple[int, ...]


@cache
def load(form: str, dtype: str, tiny_vae: bool):
    """What edits, as the command has it."""
    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    if form == "mini":
        left_out = dict.fromkeys(("mask_model", "mask_processor", "captioner", "caption_processor"))
        editor = IEditPipeline.from_pretrained(mini.model_path(), dtype=getattr(torch, dtype), **left_out)
        pipe = editor
    else:
        editor = LocalEditor.from_pretrained(form, dtype=getattr(torch, dtype))
        pipe = editor.pipe
    pipe.set_progress_bar_config(disable=True)
    if tiny_vae:
        pipe.vae = AutoencoderTiny.from_pretrained(mini.tiny_vae_path(), dtype=getattr(torch, dtype))
    return prepare(editor, dtype=getattr(torch, dtype))


@cache
def load_judge() -> Judge:
    return Judge.from_pretrained(mini.judge_path())


def editor_of(variant: Variant):
    editor = load(variant.form, variant.dtype, variant.tiny_vae)
    if variant.scheduler == "own":
        return editor
    if variant.scheduler == "fast":
        return few_steps(editor)[0]
    cls, options = SCHEDULERS[variant.form][variant.scheduler]
    pipe = copy.copy(getattr(editor, "pipe", editor))
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    return pipe if variant.form == "mini" else LocalEditor(pipe)


def clock() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def measure(task: Task) -> list[dict]:
    """Success, PSNR, seconds and the largest change outside the mask of each edit of a task."""
    variant = task.variant
    editor = editor_of(variant)
    scenes = [mini.render(task.first_seed + number, things=task.things) for number in task.numbers]
    targets = [ask(scene, number) for scene, number in zip(scenes, task.numbers, strict=True)]
    options = {} if variant.share is None else {"callback_on_step_end": GuidanceCutoffCallback(variant.share)}
    start = clock()
    output = editor(
        image=[scene.image for scene in scenes],
        prompt=[target.caption for target in targets],
        mask_image=[scene.mask for scene in scenes],
        mask_dilation=DILATION,
        strength=STRENGTH,
        num_inference_steps=variant.steps,
        guidance_scale=variant.guidance,
        generator=[torch.Generator().manual_seed(number) for number in task.numbers],
        **options,
    )
    seconds = (clock() - start) / len(scenes)
    verdicts = load_judge().look(output.images, [scene.mask for scene in scenes])
    return [
        {
            "success": (seen.noun, seen.colour) == (target.thing.noun, target.thing.colour),
            "psnr": psnr_inside(image, target.image, np.asarray(mask) > 0),
            "seconds": seconds,
            "outside": int(
                np.abs(np.asarray(image).astype(int) - np.asarray(scene.image))[np.asarray(mask) == 0].max()
            ),
        }
        for seen, scene, target, image, mask in zip(
            verdicts, scenes, targets, output.images, output.masks, strict=True
        )
    ]


def steps_variants(form: str) -> list[Variant]:
    rows = [Variant(form, "own", DEFAULTS[form][0], guidance) for guidance in GUIDANCES]
    rows += [
        Variant(form, scheduler, steps, guidance)
        for scheduler in SCHEDULERS[form]
        for guidance in GUIDANCES
        for steps in STEPS
    ]
    return rows


def levers_variants(form: str) -> dict[str, Variant]:
    steps, guidance = DEFAULTS[form]
    default = Variant(form, "own", steps, guidance)
    fast = Variant(form, "fast", FEW_STEPS["num_inference_steps"], FEW_STEPS["guidance_scale"])
    strong = fast._replace(guidance=guidance)
    return {
        f"defaults: {steps} steps, guidance {guidance:g}": default,
        f"guidance {fast.guidance:g}": default._replace(guidance=fast.guidance),
        "guidance in the first half of the steps": default._replace(share=0.5),
        "tiny VAE": default._replace(tiny_vae=True),
        f"`--fast`: {fast.steps} steps, guidance {fast.guidance:g}": fast,
        f"`--fast`, guidance {guidance:g}": strong,
        f"`--fast`, guidance {guidance:g}, in the first half": strong._replace(share=0.5),
        "`--fast`, guidance in the first half": fast._replace(share=0.5),
        "`--fast`, tiny VAE": fast._replace(tiny_vae=True),
        "`--fast`, guidance in the first half, tiny VAE": fast._replace(share=0.5, tiny_vae=True),
    }


def precision_variants(form: str) -> dict[str, Variant]:
    names = ("float32", "bfloat16", *(("float16",) if devices()[0] == "cuda" else ()))
    fast = Variant(form, "fast", FEW_STEPS["num_inference_steps"], FEW_STEPS["guidance_scale"])
    return {f"`--fast`, {name}": fast._replace(dtype=name) for name in names}


def tasks_of(variants: list[Variant], first_seed: int, scenes: int) -> list[Task]:
    """All edits, interleaved: what else the machine does concerns all variants alike."""
    batches = [tuple(range(start, min(start + BATCH, scenes))) for start in range(0, scenes, BATCH)]
    return [
        Task(variant, things, first_seed, numbers) for numbers in batches for things in (1, 2) for variant in variants
    ]


def run(tasks: list[Task], processes: int, what: str) -> dict[Variant, dict[str, float]]:
    with contextlib.ExitStack() as stack:
        map_tasks = map
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,))
            map_tasks = stack.enter_context(pool).map
        found: dict[Variant, list[dict]] = {}
        for task, rows in zip(tasks, tqdm(map_tasks(measure, tasks), total=len(tasks), desc=what), strict=True):
            found.setdefault(task.variant, []).extend(rows)
    return {
        variant: {
            "edits": len(rows),
            "success": float(np.mean([row["success"] for row in rows])),
            "psnr": float(np.mean([row["psnr"] for row in rows])),
            "seconds": float(np.median([row["seconds"] for row in rows])),
            "outside": max(row["outside"] for row in rows),
        }
        for variant, rows in found.items()
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def steps_table(form: str, found: dict[Variant, dict[str, float]]) -> str:
    """A row a scheduler and guidance; in the cells, success of all edits and PSNR."""

    def cell(row: dict[str, float]) -> str:
        return f"{round(row['success'] * row['edits'])}, {row['psnr']:.1f} dB"

    edits = next(iter(found.values()))["edits"]
    own = DEFAULTS[form][0]
    rows = [
        [name, f"{guidance:g}", *(cell(found[Variant(form, name, steps, guidance)]) for steps in STEPS)]
        for guidance in GUIDANCES
        for name in SCHEDULERS[form]
    ]
    references = "; ".join(
        f"at guidance {guidance:g}: {cell(found[Variant(form, 'own', own, guidance)])}" for guidance in GUIDANCES
    )
    header = ["scheduler", "guidance", *(f"{steps} steps" for steps in STEPS)]
    return (
        f"`{form}`, successes of {edits} edits and PSNR inside the mask; {own} steps of its own scheduler"
        f" {references}.\n\n{table(header, rows)}"
    )


def levers_table(named: dict[str, Variant], found: dict[Variant, dict[str, float]]) -> str:
    slow = found[next(iter(named.values()))]["seconds"]
    rows = [
        [
            name,
            f"{round(row['success'] * row['edits'])} of {row['edits']}",
            f"{row['psnr']:.1f}",
            f"{row['seconds']:.2f}",
            f"{slow / row['seconds']:.1f}",
            str(row["outside"]),
        ]
        for name, row in ((name, found[variant]) for name, variant in named.items())
    ]
    header = ["edit", "success", "PSNR inside, dB", "seconds", "times as fast", "largest change outside"]
    form = next(iter(named.values())).form
    return f"`{form}`:\n\n{table(header, rows)}"


def write_plot(results: dict[str, dict[Variant, dict[str, float]]], file: Path) -> None:
    import matplotlib.pyplot as plt

    columns = [(form, guidance) for form in results for guidance in GUIDANCES]
    figure, axes = plt.subplots(2, len(columns), figsize=(4 * len(columns), 6), layout="constrained", squeeze=False)
    for column, (form, guidance) in zip(axes.T, columns, strict=True):
        for axis, key in zip(column, ("success", "psnr"), strict=True):
            for name in SCHEDULERS[form]:
                axis.plot(
                    STEPS,
                    [results[form][Variant(form, name, steps, guidance)][key] for steps in STEPS],
                    marker="o",
                    label=name,
                )
            axis.axhline(results[form][Variant(form, "own", DEFAULTS[form][0], guidance)][key], color="grey", ls=":")
            axis.set_xlabel("steps at strength 1")
            axis.set_ylabel({"success": "success", "psnr": "PSNR inside the mask, dB"}[key])
        column[0].set_title(f"{form}, guidance {guidance:g}")
        column[0].set_ylim(0, 1.05)
        column[0].legend(fontsize="small")
    figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the mini models")
    parser.add_argument("--scenes", type=int, default=16, help="of one thing, and as many of two")
    parser.add_argument("--processes", type=int, default=1, help="that share the edits, one thread each")
    parser.add_argument("--output-dir", type=Path, help="also write fast-PART-FORM.md, fast.png and fast.json there")
    args = parser.parse_args()
    torch.set_num_threads(1)

    written: dict[str, str] = {}
    curves: dict[str, dict[Variant, dict[str, float]]] = {}
    kept: dict[str, list] = {}
    for part in args.only:
        for form in args.forms:
            if part == "steps":
                found = run(tasks_of(steps_variants(form), CHOOSING_SEED, args.scenes), args.processes, form)
                curves[form] = found
                text = steps_table(form, found)
            else:
                named = (levers_variants if part == "levers" else precision_variants)(form)
                tasks = tasks_of(list(named.values()), REPORTING_SEED, args.scenes)
                found = run(tasks, args.processes, form)
                text = levers_table(named, found)
            written[f"fast-{part}-{form}.md"] = text
            kept[f"{part} {form}"] = [variant._asdict() | row for variant, row in found.items()]
            print(f"\n{part}, {text}", flush=True)
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (args.output_dir / name).write_text(text)
        (args.output_dir / "fast.json").write_text(json.dumps(kept, indent=1) + "\n")
        if curves:
            write_plot(curves, args.output_dir / "fast.png")


if __name__ == "__main__":
    main()
