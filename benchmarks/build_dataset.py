"""What mining pairs costs, stage by stage: rows per second, and how much of the time the models are not at work.

    python benchmarks/build_dataset.py --count 4000

Builds a set of pairs from mini-world pictures with the mini models, in one process. The stages read, caption, edit,
embed, retrieve and mask do with them what they do with photos and the real models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusers_iedit import mini
from diffusers_iedit.pairs.build import build
from diffusers_iedit.pairs.caption import CaptionOptions
from diffusers_iedit.pairs.edit_prompts import EditOptions
from diffusers_iedit.pairs.embed import EmbedOptions
from diffusers_iedit.pairs.jobs import Options
from diffusers_iedit.pairs.options import MaskOptions
from diffusers_iedit.pairs.read import ReadOptions
from diffusers_iedit.pairs.retrieve import RetrieveOptions


MAKE_POOL = Path(__file__).parent.parent / "training" / "mini" / "make_pool.py"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="pictures to mine")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures that a model looks at together")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args()


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder, "pool")
        command = [sys.executable, str(MAKE_POOL), "--count", str(args.count), "--output_dir", str(pool)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        options = Options(
            read=ReadOptions(source=str(pool)),
            caption=CaptionOptions(caption_model="mini"),
            edit=EditOptions(vocabulary=frozenset((*mini.NOUNS, *mini.COLOURS)), max_hypernym_levels=8),
            embed=EmbedOptions(clip_model="mini"),
            retrieve=RetrieveOptions(text_weight=0.65),
            mask=MaskOptions(mask_model="mini"),
        )
        started = time.perf_counter()
        report = build(Path(folder, "pairs"), options, batch_size=args.batch_size)
        wall = time.perf_counter() - started

    print(f"{args.count} pictures, batches of {args.batch_size}, {torch.get_num_threads()} threads")
    print("stage              rows   rows/s   outside the models")
    model_seconds = 0.0
    for name, stage in report["stages"].items():
        outside = "" if stage["model_seconds"] == 0 else f"{1 - stage['model_seconds'] / stage['seconds']:20.1%}"
        print(f"{name:16} {stage['rows_in']:6}   {stage['rows_in'] / stage['seconds']:6.0f}   {outside}")
        model_seconds += stage["model_seconds"]
    print(f"whole build: {wall:.1f} s, of which outside the models {1 - model_seconds / wall:.1%}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps({"report": report, "seconds": wall, "model_seconds": model_seconds}))


if __name__ == "__main__":
    main()
