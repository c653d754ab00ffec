"""What the page of `iedit demo` takes: many clients at once, and many edits one after the other, on `mini`.

    OMP_NUM_THREADS=1 python benchmarks/demo_load.py

Clients call the HTTP API, each with a scene of the mini world of its own. A result is right if outside the mask, which
goes with the picture, not one byte differs from the client's own scene, and inside something does; busy is what the
page says when too many wait. Memory is the resident size of the server's process, which edits with one thread.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gradio_client
import numpy as np
import psutil
from PIL import Image

from diffusers_iedit import mini


# Seeds that no training and no other measurement uses.
FIRST_SEED = 340_000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="for which they ask (default: %(default)s)")
    parser.add_argument("--edits", type=int, default=200, help="one after the other (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of an edit (default: %(default)s)")
    return parser.parse_args()


class Person:
    """A client with a picture of its own."""

    def __init__(self, address: str, number: int, folder: Path, steps: int):
        scene = mini.render(seed=FIRST_SEED + number)
        self.picture, self.mask = folder / f"{number}.png", folder / f"{number}-mask.png"
        scene.image.save(self.picture)
        scene.mask.save(self.mask)
        self.inside = np.asarray(scene.mask) > 0
        self.steps = steps
        # While the server computes on all cores, an answer takes longer than the client's usual five seconds.
        patience = {"timeout": 600}
        results = folder / f"results-{number}"
        self.client = gradio_client.Client(address, verbose=False, download_files=results, httpx_kwargs=patience)

    def edit(self) -> str:
        """What came of an edit: `right`, `wrong`, `busy`, or another error."""
        try:
            (file,), _ = self.client.predict(
                gradio_client.handle_file(self.picture),
                "a red cat on green grass",
                mask=gradio_client.handle_file(self.mask),
                num_images=1,
                steps=str(self.steps),
                api_name="/edit",
            )
        except Exception as error:
            return "busy" if "Queue is full" in str(error) else f"{type(error).__name__}: {error}"
        differs = (np.asarray(Image.open(file)) != np.asarray(Image.open(self.picture))).any(-1)
        return "right" if differs[self.inside].any() and not differs[~self.inside].any() else "wrong"


def ask_until(person: Person, end: float, outcomes: list[str]) -> None:
    while time.monotonic() < end:
        outcomes.append(person.edit())
        # Who is told to come again later does.
        if outcomes[-1] == "busy":
            time.sleep(1)


def main() -> None:
    args = parse_args()
    command = [sys.executable, "-m", "diffusers_iedit.cli", "demo", "--model", "mini", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().partition(": Ctrl-C")[0]
            memory = psutil.Process(server.pid).memory_info
            people = [Person(address, number, Path(name), args.steps) for number in range(args.clients)]

            outcomes: list[str] = []
            end = time.monotonic() + args.seconds
            threads = [threading.Thread(target=ask_until, args=(person, end, outcomes)) for person in people]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(f"{args.clients} clients, {args.seconds:g} s: {dict(collections.Counter(outcomes))}", flush=True)

            for number in range(args.edits + 1):
                if number % 50 == 0:
                    print(f"after {number} more edits: {memory().rss / 2**20:.0f} MiB", flush=True)
                if number < args.edits:
                    outcome = people[number % args.clients].edit()
                    assert outcome == "right", outcome
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
