"""Fine-tunes the mini model with iEdit's objective, from mining the pairs to the comparison with its base.

Run it again after an interruption: what is finished is skipped, and the rest goes on where it was.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import save_half
from diffusers import UNet2DConditionModel
from train_all import MALLOC

from diffusers_iedit import mini
from diffusers_iedit.finetuning.outputs import apply_umask
from diffusers_iedit.pairs import load_pairs


HERE = Path(__file__).parent

# The paper's settings to the letter, and those that fit this world; 10,000 and 19,200 samples.
RUNS = {
    "paper": ("--preset", "paper"),
    "tuned": (
        *("--preset", "tuned", "--loss", "mask", "--train_batch_size", 16, "--max_train_steps", 1200),
        *("--learning_rate", 3e-4),
    ),
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
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    pool, pairs, train_pairs = (args.work_dir / name for name in ("pool", "pairs", "train-pairs"))
    if not pool.exists():
        run(HERE / "make_pool.py", "--output_dir", pool)
    models = [word for part in ("caption", "clip", "mask") for word in (f"--{part}_model", "mini")]
    run(
        *(HERE.parent / "build_dataset.py", "--source", pool, "--output_dir", pairs, *models, "--text_weight", 0.8),
        *("--min_mask_iou", 0.3, "--vocabulary", *mini.NOUNS, *mini.COLOURS, "--max_hypernym_levels", 8),
    )
    if not train_pairs.exists():
        partial = train_pairs.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        kept = load_pairs(pairs).filter(lambda prompt: not asks_for_held_out(prompt), input_columns="edit_prompt")
        kept.to_parquet(partial / "train.parquet")
        partial.rename(train_pairs)

    folders = []
    for seed in args.seeds:
        for name in args.runs:
            folders.append(args.work_dir / f"iedit-{name}-{seed}")
            if not (folders[-1] / "model_index.json").exists():
                run(
                    *(HERE.parent / "train_iedit.py", *RUNS[name], "--model", "mini-base", "--resolution", 64),
                    *("--train_data", train_pairs, "--output_dir", folders[-1], "--seed", seed),
                    *("--cache_latents", "--cache_dir", args.work_dir / "cache", "--resume_from_checkpoint", "latest"),
                    *("--checkpoints_total_limit", 1, "--dataloader_num_workers", 0),
                )
    # The first of the best runs is what the package ships.
    finished = args.work_dir / "finetuned"
    if not finished.exists():
        partial = finished.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_half(
            UNet2DConditionModel.from_pretrained(args.work_dir / "iedit-tuned-0" / "unet"), partial / "finetuned"
        )
        apply_umask(partial)
        partial.rename(finished)
    run(HERE / "build_pipeline.py", "--work_dir", args.work_dir, "--only", "finetuned")
    run(HERE / "measure_finetuning.py", "--models", *folders, "--json", args.work_dir / "finetuning.json")


if __name__ == "__main__":
    main()
