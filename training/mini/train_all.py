"""Trains every mini model in order, builds the pipelines' folders and measures them. Finished parts are skipped.

Run it again after an interruption: each part goes on from its last checkpoint.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent
PARTS = {
    "vae": "vae/vae",
    "judge": "judge/judge",
    "clip": "clip/clip",
    "clipseg": "clipseg/clipseg",
    "captioner": "captioner/captioner",
    "unet": "unet/unet",
    "vgg": "vgg/vgg",
    "tiny_vae": "tiny_vae/tiny_vae",
    "sd3": "sd3/sd3",
}
"""Script -> the folder, in the work folder, that it leaves behind when it is done."""

# On a CPU, half of the time goes into page faults unless glibc keeps the memory of freed tensors, in huge pages.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=268435456"
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="cache, checkpoints and logs")
    parser.add_argument("--output_dir", type=Path, help="where the finished models go; by default into the package")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="train just these parts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each part")
    args = parser.parse_args()

    def run(script: str, *arguments: object) -> None:
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        print("$", *command, flush=True)
        subprocess.run(command, check=True, env=os.environ | MALLOC)

    for part in args.only:
        if (args.work_dir / PARTS[part]).exists():
            print(f"{part} is trained already: {args.work_dir / PARTS[part]}", flush=True)
        else:
            run(f"train_{part}.py", "--work_dir", args.work_dir, "--threads", args.threads)

    if all((args.work_dir / folder).exists() for folder in PARTS.values()):
        output = ["--output_dir", args.output_dir] if args.output_dir else []
        run("build_pipeline.py", "--work_dir", args.work_dir, *output)
        models = []
        if args.output_dir:
            names = ("model", "clip", "judge", "vgg", "tiny_vae", "sd3")
            models = [word for name in names for word in (f"--{name}", args.output_dir / name)]
        run("measure.py", *models, "--json", args.work_dir / "measured.json", "--threads", args.threads)


if __name__ == "__main__":
    main()
