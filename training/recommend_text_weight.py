"""Recommends a --text_weight for a collection: what build_dataset.py should search its pool with.

The mean of image and prompt embedding (Sec. 3.1) can return the unchanged source as often as the edit. This searches
the pool with several weights and reads the captions of what is found: do they name what the edit asks for, or still
what was there before? Captions and embeddings come from different models, so the one checks the other.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from diffusers_iedit.pairs.caption import CaptionImages, CaptionOptions
from diffusers_iedit.pairs.jobs import Collection, Options, RetrieveJob
from diffusers_iedit.pairs.read import ReadOptions
from diffusers_iedit.pairs.retrieve import Embeddings, Retrieve
from diffusers_iedit.pairs.shards import read_marker


TOLERANCE = 0.1
"""A smaller weight finds targets closer to the source, which is worth a tenth of the edits shown."""


def names(caption: str, term: str) -> bool:
    """Whether a caption has the words of a term, one after the other."""
    return re.search(rf"\b{re.escape(term.lower())}\b", caption.lower()) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs", type=Path, required=True, help="output_dir of a build that has passed its stage embed"
    )
    parser.add_argument("--sample", type=int, default=1000, help="edits to try")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9])
    parser.add_argument("--batch_size", type=int, default=16, help="images that the captioner looks at together")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of edits")
    args = parser.parse_args()

    if not (args.pairs / "manifest.json").exists():
        parser.error(f"--pairs has to be the output_dir of a build, but {args.pairs} has no manifest.json.")

    work = args.pairs / "work"
    manifest = json.loads((args.pairs / "manifest.json").read_text())
    options = Options(ReadOptions(source=manifest["read"]["source"], pool=manifest["read"]["pool"]))
    source, pool = Collection(work, "source"), Collection(work, options.pool)
    ends = np.cumsum([read_marker(work / "edit" / f"{shard}.arrow").rows_out for shard in source.shards])
    chosen = np.sort(np.random.default_rng(args.seed).permutation(ends[-1])[: args.sample])
    job = RetrieveJob(work, options, 1, None)
    edits, queries = [], []
    # Shard by shard: all edits of a large collection do not fit into memory.
    for number in np.unique(np.searchsorted(ends, chosen, side="right")):
        query = job.queries(source.shards[number])
        first = ends[number] - len(query["pool_row"])
        rows = chosen[(chosen >= first) & (chosen < ends[number])] - first
        edits += job.table("edit", source.shards[number]).take(rows).to_pylist()
        queries.append({name: values[rows] for name, values in query.items()})
    queries = {name: np.concatenate([query[name] for query in queries]) for name in queries[0]}

    files = [work / "embed" / options.pool / f"{shard}.npy" for shard in pool.shards]
    copies = manifest["retrieve"]["max_source_similarity"]
    index = work / "embed" / "pool.index"
    index = index if read_marker(index) else None
    found = {}
    for weight in tqdm(args.weights, desc="search"):
        search = Retrieve(files, index, text_weight=weight, num_candidates=1, max_source_similarity=copies)
        found[weight] = search(queries)["targets"][:, 0]

    captioner = CaptionImages(CaptionOptions(caption_model=manifest["caption"]["caption_model"]))
    rows = np.unique(np.concatenate(list(found.values())))
    # Where nothing was found, nothing is shown.
    rows, captions = rows[rows >= 0], {-1: ""}
    for start in tqdm(range(0, len(rows), args.batch_size), desc="caption"):
        batch = rows[start : start + args.batch_size]
        captions |= zip(batch, captioner({"image": [pool.image(row) for row in batch]})["caption"], strict=True)

    # How close those that show the edit are to their source.
    embeds = dict(zip(rows, Embeddings(files).take(rows), strict=True))
    print("text weight   shows the edit   shows the source unchanged   cosine with the source, where edited")
    edited = {}
    for weight, targets in found.items():
        texts = [captions[row] for row in targets]
        shows = [names(text, edit["target_term"]) for text, edit in zip(texts, edits, strict=True)]
        unchanged = [
            names(text, edit["source_term"]) and not new for text, edit, new in zip(texts, edits, shows, strict=True)
        ]
        edited[weight] = np.mean(shows)
        cosines = [queries["image_embeds"][number] @ embeds[targets[number]] for number in np.flatnonzero(shows)]
        closeness = np.mean(cosines) if cosines else float("nan")
        print(f"{weight:11.2f}   {edited[weight]:14.1%}   {np.mean(unchanged):26.1%}   {closeness:36.3f}")
    if not any(edited.values()):
        sys.exit("No weight finds an image that shows its edit: the pool may have none, see --vocabulary.")
    best = min(weight for weight, share in edited.items() if share >= (1 - TOLERANCE) * max(edited.values()))
    print(f"recommended: --text_weight {best:g} (the smallest that shows {1 - TOLERANCE:.0%} of the most edits)")


if __name__ == "__main__":
    main()
