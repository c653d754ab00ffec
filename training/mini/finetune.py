"""Fine-tunes the mini models with iEdit's objective, from mining the pairs to the comparison with their base.

Run it again after an interruption: what is finished is skipped, and the rest goes on where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import save_half
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from train_all import MALLOC

from diffusers_iedit import mini
from diffusers_iedit.finetuning.outputs import apply_umask
from diffusers_iedit.pairs import load_pairs


HERE = Path(__file__).parent

MASK_ALONE = ("--loss", "mask", "--train_batch_size", 16, "--learning_rate", 3e-4)
CACHED = ("--cache_latents", "--dataloader_num_workers", 0)

# The base of each run, and how it is trained: by the paper's settings to the letter, and by those that fit this world;
# 10,000 samples, 19,200, and 12,000. Of Stable Diffusion 3 nothing is cached: the rows of its T5 would take 9 GB.
RUNS = {
    "paper": ("mini-base", "--preset", "paper", *CACHED),
    "tuned": ("mini-base", "--preset", "tuned", *MASK_ALONE, "--max_train_steps", 1200, *CACHED),
    "sd3": ("mini-sd3", "--preset", "tuned-sd3", *MASK_ALONE, "--max_train_steps", 750),
}

# What the package ships: of these runs, the first seed's, by the names of build_pipeline.py.
SHIPPED = {
    "tuned": ("finetuned", "unet", UNet2DConditionModel),
    "sd3": ("finetuned_sd3", "transformer", SD3Transformer2DModel),
}


def run(*command: object, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | MALLOC | environment)


def asks_for_held_out(prompt: str) -> bool:
    """Whether an edit prompt names a combination that is kept for measuring. The pool's pictures show none."""
    return any(
        f"{colour} {noun}" in prompt and scene in prompt for noun, colour, scene in mini.held_out_combinations()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="pool, pairs, and trained models")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["paper", "tuned"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    pool, pairs, train_pairs = (args.work_dir / name for name in ("pool", "pairs", "train-pairs"))
    if not train_pairs.exists():
        if not pool.exists():
            run(HERE / "make_pool.py", "--output_dir", pool)
        models = [word for part in ("caption", "clip", "mask") for word in (f"--{part}_model", "mini")]
        run(
            *(HERE.parent / "build_dataset.py", "--source", pool, "--output_dir", pairs, *models),
            *("--text_weight", 0.8, "--min_mask_iou", 0.3, "--vocabulary", *mini.NOUNS, *mini.COLOURS),
            *("--max_hypernym_levels", 8),
        )
        partial = train_pairs.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        kept = load_pairs(pairs).filter(lambda prompt: not asks_for_held_out(prompt), input_columns="edit_prompt")
        kept.to_parquet(partial / "train.parquet")
        partial.rename(train_pairs)

    folders: dict[str, list[Path]] = {}
    for seed in args.seeds:
        for name in args.runs:
            base, *options = RUNS[name]
            folder = args.work_dir / f"iedit-{name}-{seed}"
            folders.setdefault(base, []).append(folder)
            if not (folder / "model_index.json").exists():
                run(
                    *(HERE.parent / "train_iedit.py", *options, "--model", base, "--resolution", 64),
                    *("--train_data", train_pairs, "--output_dir", folder, "--seed", seed),
                    *("--cache_dir", args.work_dir / "cache", "--resume_from_checkpoint", "latest"),
                    *("--checkpoints_total_limit", 1),
                )
    for name, (part, component, model_class) in SHIPPED.items():
        if name not in args.runs:
            continue
        finished, trained = args.work_dir / part, args.work_dir / f"iedit-{name}-0"
        if not finished.exists() and trained.exists():
            partial = finished.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            save_half(model_class.from_pretrained(trained / component), partial / part)
            apply_umask(partial)
            partial.rename(finished)
        if finished.exists():
            run(HERE / "build_pipeline.py", "--work_dir", args.work_dir, "--only", part)
    for base, models in folders.items():
        numbers = args.work_dir / f"finetuning-{base}.json"
        run(HERE / "measure_finetuning.py", "--base", base, "--models", *models, "--json", numbers)


if __name__ == "__main__":
    main()
