"""Trains what the tables of the evaluation compare: the rows of the paper's Table 2, with several seeds each.

Run finetune.py first, which mines the pairs. Run again after an interruption, it goes on where it was.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

from datasets import load_dataset
from finetune import HERE, run
from PIL import Image
from transformers import CLIPTokenizer

from diffusers_iedit import mini
from diffusers_iedit.pairs import load_pairs
from diffusers_iedit.pairs.schema import same_tokens


ROWS = {
    "global+paired": "caption-pairs",
    "global+ldm+loc": "train-pairs",
    "global+ldm+loc+perc": "train-pairs",
    "loc+global+mask+perc": "train-pairs",
}
"""Losses of a row of Table 2 -> the pairs that it is trained on. The fifth row is the fourth, edited with masks."""

BUDGET = ("--preset", "paper", "--train_batch_size", 8, "--max_train_steps", 500, "--loss_decoder", "mini")
"""The paper's settings but for the batch, and as many samples for each row: 4,000."""


def hash_of(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def write_caption_pairs(pool: Path, pairs: Path, output_dir: Path) -> None:
    """The same pictures with the noisy captions that both came with: in miniature, the paper's LAION-caption-200K."""
    captions = {
        hash_of(row["image"]): row["text"].strip()
        for row in load_dataset(str(pool), split="train").to_iterable_dataset()
    }

    def with_captions(row: dict) -> dict:
        source, target = (captions[hash_of(row[f"{side}_image"])] for side in ("source", "target"))
        return {"source_caption": source, "edit_prompt": target}

    partial = output_dir.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    captioned = load_pairs(pairs).map(with_captions)
    tokenizer = CLIPTokenizer.from_pretrained(mini.model_path(), subfolder="tokenizer")
    captioned = captioned.filter(
        lambda *texts: all(texts) and not same_tokens(tokenizer, *texts),
        input_columns=["source_caption", "edit_prompt"],
    )
    captioned.to_parquet(partial / "train.parquet")
    partial.rename(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="of finetune.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    if not (args.work_dir / "caption-pairs").exists():
        write_caption_pairs(*(args.work_dir / name for name in ("pool", "train-pairs", "caption-pairs")))
    for seed in args.seeds:
        for number, (loss, pairs) in enumerate(ROWS.items(), start=1):
            output_dir = args.work_dir / f"table2-row{number}-{seed}"
            if (output_dir / "model_index.json").exists():
                continue
            run(
                *(HERE.parent / "train_iedit.py", *BUDGET, "--loss", loss, "--model", "mini-base", "--resolution", 64),
                *("--train_data", args.work_dir / pairs, "--output_dir", output_dir, "--seed", seed),
                *("--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1),
                *("--dataloader_num_workers", 0, "--num_validation_pairs", 0),
            )


if __name__ == "__main__":
    main()
