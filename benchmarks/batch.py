"""What `iedit batch` costs an edit, together and one by one, and how much of it the models take: on `mini`.

    OMP_NUM_THREADS=1 python benchmarks/batch.py

Each line is a run of the command on the same jobs: scenes of the mini world with their masks, by the defaults of
`iedit edit`. Seconds are CPU seconds of one process without loading the model; with one thread they are the time it
takes on an idle machine. The models are text encoder, VAE and UNet. What differs are bytes (of all pictures) from
those that are edited one by one, and by how many of 255 levels at most.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from diffusers_iedit import batch, cli, mini


# Seeds that no training and no other measurement uses.
FIRST_SEED = 330_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=32, help="how many edits (default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="default: 1 4 16")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    return parser.parse_args()


def write_jobs(folder: Path, count: int) -> Path:
    jobs = []
    for number in range(count):
        scene = mini.render(seed=FIRST_SEED + number)
        scene.image.save(folder / f"{number}.png")
        scene.mask.save(folder / f"{number}-mask.png")
        jobs.append({"image": f"{number}.png", "mask": f"{number}-mask.png", "prompt": "a red cat on green grass"})
    file = folder / "jobs.jsonl"
    file.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return file


@contextlib.contextmanager
def timed(owner, name: str, seconds: list[float]):
    """Adds up the CPU seconds of a function in the one entry of `seconds`."""
    original = getattr(owner, name)

    def measured(*args, **kwargs):
        started = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[0] += time.process_time() - started

    with mock.patch.object(owner, name, measured):
        yield


def run(jobs: Path, output_dir: Path, pipe, options: list[str]) -> tuple[float, float]:
    """CPU seconds of all edits, and of the models in them."""
    edits, models = [0.0], [0.0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cli, "_load_pipeline", return_value=pipe))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(timed(cli._JobEditor, "__call__", edits))
        stack.enter_context(timed(batch.Results, "append", edits))
        for owner, name in (
            (pipe.unet, "forward"),
            (pipe.text_encoder, "forward"),
            (pipe.vae, "encode"),
            (pipe.vae, "decode"),
        ):
            stack.enter_context(timed(owner, name, models))
        assert cli.main(["batch", str(jobs), "--output-dir", str(output_dir), "--model", "mini", *options]) == 0
    return edits[0], models[0]


def main() -> None:
    args = parse_args()
    pipe = cli._load_pipeline("mini", "cpu", "auto", True, False, False, {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = write_jobs(folder, args.jobs)
        steps = ["--steps", str(args.steps)]
        run(write_jobs(folder, 1), folder / "warm-up", pipe, steps)
        jobs = write_jobs(folder, args.jobs)
        print("| batch size | CPU seconds an edit | outside the models | bytes that differ | by at most |")
        print("|---|---|---|---|---|")
        alone: dict[str, np.ndarray] = {}
        for size in args.batch_sizes:
            output_dir = folder / str(size)
            seconds, of_models = run(jobs, output_dir, pipe, [*steps, "--batch-size", str(size)])
            pictures = {file.name: np.asarray(Image.open(file), int) for file in output_dir.glob("*.png")}
            alone = alone or pictures
            differences = np.stack([np.abs(pictures[name] - alone[name]) for name in alone])
            print(
                f"| {size} | {seconds / args.jobs:.3f} | {1 - of_models / seconds:.1%} |"
                f" {(differences > 0).mean():.4%} | {differences.max()} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
