"""Measures pairs that build_dataset.py mined from a pool of make_pool.py, against what their pictures really show."""

import argparse
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from measure import Result
from PIL import Image

from diffusers_iedit.mini import COLOURS, NOUNS, SCENES, Scene, caption, render
from diffusers_iedit.pairs.jobs import Collection, Options, RetrieveJob
from diffusers_iedit.pairs.read import ReadOptions
from diffusers_iedit.pairs.retrieve import Retrieve
from diffusers_iedit.pairs.shards import read_table


_CAPTION = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})(?: and an? ({'|'.join(COLOURS)}) ({'|'.join(NOUNS)}))?"
    rf" ({'|'.join(SCENES)})"
)


@dataclass(frozen=True)
class Content:
    """What a caption says or a picture shows: the (noun, colour) of its things from left to right, and the scene."""

    things: tuple[tuple[str, str], ...]
    scene: str

    @classmethod
    def of_text(cls, text: str) -> "Content | None":
        """None for what is no caption of the mini world, a wrong article included."""
        if (match := _CAPTION.fullmatch(text)) is None:
            return None
        colour, noun, other_colour, other_noun, scene = match.groups()
        things = ((noun, colour),) if other_noun is None else ((noun, colour), (other_noun, other_colour))
        return cls(things, scene) if caption(list(things), scene) == text else None

    @classmethod
    def of_scene(cls, scene: Scene) -> "Content":
        return cls(tuple((thing.noun, thing.colour) for thing in scene.things), scene.scene)


def changed_thing(source: Content | None, target: Content | None) -> int | None:
    """Which thing an edit changes, if it is a valid swap: the noun or the colour of one thing, and nothing else."""
    if source is None or target is None or source.scene != target.scene or len(source.things) != len(target.things):
        return None
    changes = [
        (index, old[0] != new[0], old[1] != new[1])
        for index, (old, new) in enumerate(zip(source.things, target.things, strict=True))
        if old != new
    ]
    valid = len(changes) == 1 and changes[0][1] != changes[0][2] and len(set(target.things)) == len(target.things)
    return changes[0][0] if valid else None


class World:
    """The scenes behind the pictures of a collection, found by the pictures' bytes."""

    def __init__(self, truth_file: Path):
        self.truth = {row["sha256"]: row for row in pq.read_table(truth_file).to_pylist()}

    def scene(self, image: bytes) -> Scene:
        row = self.truth[hashlib.sha256(image).hexdigest()]
        return render(row["seed"], things=row["things"], split=row["split"])


def iou(mask: bytes, scene: Scene, thing: tuple[str, str]) -> float:
    """Of a found mask and the thing in the scene; 0 if the scene has no such thing."""
    found = np.asarray(Image.open(io.BytesIO(mask))) > 0
    truth = [each.mask for each in scene.things if (each.noun, each.colour) == thing]
    if not truth:
        return 0.0
    truth = np.asarray(truth[0]) > 0
    return float((found & truth).sum() / max((found | truth).sum(), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pairs", type=Path, required=True, help="output_dir of build_dataset.py, with its work folder"
    )
    parser.add_argument("--truth", type=Path, required=True, help="the truth that make_pool.py left beside the pool")
    parser.add_argument("--queries", type=int, default=4000, help="edits to compare the weights on")
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 1])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()

    work = args.pairs / "work"
    manifest = json.loads((args.pairs / "manifest.json").read_text())
    options = Options(ReadOptions(source=manifest["read"]["source"], pool=manifest["read"]["pool"]))
    source, pool, world = Collection(work, "source"), Collection(work, options.pool), World(args.truth)
    contents = {
        name: [
            Content.of_scene(world.scene(image))
            for shard in collection.shards
            for image in collection.column(shard, "image")
        ]
        for name, collection in (("source", source), (options.pool, pool))
    }

    results = []
    captions = [
        text
        for shard in source.shards
        for text in read_table(work / "caption" / f"{shard}.arrow")["caption"].to_pylist()
    ]
    right = [
        text == caption(list(shown.things), shown.scene)
        for text, shown in zip(captions, contents["source"], strict=True)
    ]
    results.append(Result("caption", "exactly right", float(np.mean(right)), 0.95))

    # The edits, each with what it asks for.
    edits = [
        edit | {"row": edit["row"] + source.first_row(shard)}
        for shard in source.shards
        for edit in read_table(work / "edit" / f"{shard}.arrow").to_pylist()
    ]
    asked = [Content.of_text(edit["edit_prompt"]) for edit in edits]
    changes = [
        changed_thing(Content.of_text(edit["source_caption"]), content)
        for edit, content in zip(edits, asked, strict=True)
    ]
    results.append(Result("edit", "captions with an edit", len(edits) / len(captions)))
    results.append(Result("edit", "valid swaps", float(np.mean([change is not None for change in changes])), 0.98))

    # Retrieval by image alone (weight 0), text alone (1) and between, against what the pool offers.
    job = RetrieveJob(work, options, 1, None)
    queries = [job.queries(shard) for shard in source.shards]
    queries = {name: np.concatenate([query[name] for query in queries]) for name in queries[0]}
    chosen = [number for number, change in enumerate(changes) if change is not None][: args.queries]
    offered = {(thing, content.scene) for content in contents[options.pool] for thing in content.things}
    wanted = {number: asked[number].things[changes[number]] for number in chosen}
    best = np.mean([(wanted[number], asked[number].scene) in offered for number in chosen])
    results.append(Result("retrieve", "best possible: thing, colour and scene are in the pool", float(best)))
    whole = set(contents[options.pool])
    results.append(
        Result(
            "retrieve",
            "best possible: all of the prompt is in one picture of the pool",
            float(np.mean([asked[n] in whole for n in chosen])),
        )
    )
    files = [work / "embed" / options.pool / f"{shard}.npy" for shard in pool.shards]
    for weight in args.weights:
        found = Retrieve(files, text_weight=weight, num_candidates=1)(
            {name: values[chosen] for name, values in queries.items()}
        )
        shown = [contents[options.pool][row] for row in found["targets"][:, 0]]
        old = [contents["source"][edits[number]["row"]].things[changes[number]] for number in chosen]
        has = np.array([wanted[number] in content.things for number, content in zip(chosen, shown, strict=True)])
        scene = np.array([asked[number].scene == content.scene for number, content in zip(chosen, shown, strict=True)])
        exact = np.array([asked[number] == content for number, content in zip(chosen, shown, strict=True)])
        unchanged = np.array([thing in content.things for thing, content in zip(old, shown, strict=True)]) & ~has
        name = {0: "image alone", 1: "text alone"}.get(weight, f"text weight {weight:g}")
        results.append(Result("retrieve", f"{name}: thing and colour right", float(has.mean())))
        results.append(Result("retrieve", f"{name}:   and the scene", float((has & scene).mean())))
        results.append(Result("retrieve", f"{name}:   and the other thing", float(exact.mean())))
        results.append(Result("retrieve", f"{name}: the source's thing, unchanged", float(unchanged.mean())))

    # The pairs that were kept.
    kept = [
        pair for file in sorted((args.pairs / "data").glob("*.parquet")) for pair in pq.read_table(file).to_pylist()
    ]
    targets_right, scenes_right, source_ious, target_ious = [], [], [], []
    for pair in kept:
        before, after = Content.of_text(pair["source_caption"]), Content.of_text(pair["edit_prompt"])
        if (change := changed_thing(before, after)) is None:
            targets_right.append(False)
            continue
        target_scene = world.scene(pair["target_image"]["bytes"])
        shown = Content.of_scene(target_scene)
        targets_right.append(after.things[change] in shown.things)
        scenes_right.append(targets_right[-1] and after.scene == shown.scene)
        source_scene = world.scene(pair["source_image"]["bytes"])
        source_ious.append(iou(pair["source_mask"]["bytes"], source_scene, before.things[change]))
        target_ious.append(iou(pair["target_mask"]["bytes"], target_scene, after.things[change]))
    results.append(Result("pairs", "kept, of the images of the source", len(kept) / len(captions)))
    results.append(Result("pairs", "target right in thing and colour", float(np.mean(targets_right)), 0.9))
    results.append(Result("pairs", "target right in thing, colour and scene", float(np.mean(scenes_right))))
    results.append(Result("pairs", "mean IoU of M_1 with the source's thing", float(np.mean(source_ious)), 0.75))
    results.append(Result("pairs", "mean IoU of M_2 with the target's thing", float(np.mean(target_ious)), 0.75))
    print(*results, sep="\n")
    if args.json:
        args.json.write_text(json.dumps([vars(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
