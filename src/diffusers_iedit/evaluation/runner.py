"""Edits all examples by all methods, measures what came, and writes results.json with its report; can be resumed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..engines import LocalEngine
from ..resuming import differences, lock_folder, replacing
from . import report
from .data import Example, load_examples
from .measuring import Metrics
from .methods import Method, Models, Settings, Variant, parse_variant
from .metrics import fid
from .networks import DEFAULT_MODELS, Networks
from .statistics import summarise


VERSIONS = ("diffusers-iedit", "diffusers", "transformers", "torch", "scikit-image")

FEATURES_BATCH = 16
"""Pictures whose features are taken together."""


def write_json(content: dict, file: Path) -> None:
    """Writes JSON at once or not at all."""
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_image(image: Image.Image, file: Path) -> None:
    """Writes a PNG at once or not at all."""
    with replacing(file) as partial:
        image.save(partial, "PNG")


class _Files:
    """What lies where in the output folder."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.config = output_dir / "config.json"
        self.results = output_dir / "results.json"

    def image(self, folder: str, key: str) -> Path:
        return self.output_dir / "images" / folder / f"{key}.png"

    def batch(self, variant: Variant, number: int) -> Path:
        """What a batch came to: `{"asked": metrics, "results": {key: values}}`. It comes after the batch's images."""
        return self.output_dir / "batches" / variant.slug / f"{number:06}.json"


@contextmanager
def _claimed(files: _Files, engine: LocalEngine) -> Iterator[None]:
    """Keeps the folder for this evaluation, if it is one; of several processes, the main one does."""
    if not engine.is_main:
        yield
        return
    # What is hidden is the lock.
    held = list(files.output_dir.glob("[!.]*"))
    if not files.config.exists() and any(file.suffix != ".partial" for file in held):
        raise ValueError(f"`output_dir` {files.output_dir} is not empty, and what it holds is no evaluation.")
    files.output_dir.mkdir(parents=True, exist_ok=True)
    with lock_folder(files.output_dir, "evaluation"):
        yield


def _start(files: _Files, config: dict, variants: list[Variant], weights: dict[str, str]) -> None:
    """Checks that the folder belongs to this configuration, and makes what is to be in it."""
    known = {}
    if files.config.exists():
        try:
            found = json.loads(files.config.read_text(encoding="utf-8"))
            known = found.pop("weights")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{files.config} is damaged, or of no evaluation: take another folder.") from error
        changes = differences(found, config)
        changes += [
            f"the weights of {name} have changed"
            for name in weights
            if known.get(name, weights[name]) != weights[name]
        ]
        if changes:
            raise ValueError(
                f"`output_dir` {files.output_dir} holds another evaluation: {'; '.join(changes)}. Take another"
                " folder, or remove it."
            )
    # First of all, as it says whose folder this is.
    write_json(config | {"weights": known | weights}, files.config)
    # What a kill left behind.
    for partial in files.output_dir.rglob("*.partial"):
        partial.unlink()
    folders = [files.output_dir / "images" / name for name in ("source", "mask", "target")]
    for variant in variants:
        folders += [files.image(variant.slug, "").parent, files.batch(variant, 0).parent]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def _edit(variant: Variant, method: Method, examples: list[Example], seeds: list[int]) -> Sequence[Image.Image | str]:
    """The edited images, or why there is none."""

    def one_by_one() -> list:
        pairs = zip(examples, seeds, strict=True)
        return [found for example, seed in pairs for found in _edit(variant, method, [example], [seed])]

    if len({example.image.size for example in examples}) > 1:
        return one_by_one()
    try:
        images = method(examples, variant.settings, [torch.Generator().manual_seed(seed) for seed in seeds])
        for example, image in zip(examples, images, strict=True):
            if not isinstance(image, Image.Image) or (image.mode, image.size) != ("RGB", example.image.size):
                found = f"{image.mode} {image.size}" if isinstance(image, Image.Image) else type(image).__name__
                raise ValueError(f"a method has to return PIL images, RGB {example.image.size}, got {found}.")
    # A method may fail on a picture in any way: that is a result too, and the others go on.
    except Exception as error:
        if len(examples) == 1:
            return [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        return one_by_one()
    return images


def _read_batch(file: Path) -> dict | None:
    """What a batch came to if all of it was edited without an error; None if it is to be edited (again)."""
    try:
        batch = json.loads(file.read_text(encoding="utf-8"))
    # It was cut off after it was written.
    except (FileNotFoundError, ValueError):
        return None
    return None if any("error" in found for found in batch["results"].values()) else batch


def _is_done(file: Path, metrics: Metrics) -> bool:
    """Whether a batch has been edited without an error, and all of these metrics were taken."""
    batch = _read_batch(file)
    return batch is not None and set(metrics.infos) <= set(batch["asked"])


def _work_off(
    files: _Files,
    file: Path,
    variant: Variant,
    method: Method,
    metrics: Metrics,
    examples: list[Example],
    seeds: list[int],
) -> None:
    """Edits and measures one batch, or only measures it, if that is all that is left to do."""
    errors = {}
    if _read_batch(file) is None:
        for example, found in zip(examples, _edit(variant, method, examples, seeds), strict=True):
            if isinstance(found, str):
                errors[example.key] = {"error": found}
            else:
                write_image(found, files.image(variant.slug, example.key))
    done = [example for example in examples if example.key not in errors]
    images = [report.open_picture(files.image(variant.slug, example.key)).convert("RGB") for example in done]
    measured = dict(zip([example.key for example in done], metrics.measure(done, images), strict=True))
    write_json({"asked": sorted(metrics.infos), "results": errors | measured}, file)


def _add_fid(files: _Files, metrics: Metrics, rows: list[dict], variants: list[Variant], summary: dict) -> None:
    """FID by group, beside the means: of the edited pictures and of their sources."""

    def features(folder: str, keys: list[str]) -> torch.Tensor:
        batches = (keys[start : start + FEATURES_BATCH] for start in range(0, len(keys), FEATURES_BATCH))
        opened = ([report.open_picture(files.image(folder, key)).convert("RGB") for key in batch] for batch in batches)
        return torch.cat([metrics.features(images) for images in opened])

    # Of fewer pictures than the others, it would be another number.
    whole = [v for v in variants if all("error" not in row["results"].get(v.name, {"error": ""}) for row in rows)]
    keys = [row["key"] for row in rows]
    by_folder = {folder: features(folder, keys) for folder in ("source", *(variant.slug for variant in whole))}
    for group, by_variant in summary.items():
        chosen = [number for number, row in enumerate(rows) if group in ("all", row["group"])]
        for variant in whole if len(chosen) > 1 else ():
            value = fid(by_folder[variant.slug][chosen], by_folder["source"][chosen])
            by_variant[variant.name]["fid"] = {"value": value}


def _read(
    files: _Files, examples: Sequence[Example], num_examples: int | None, seed: int, engine: LocalEngine
) -> list[dict]:
    """What each example is asked for, which is kept; its pictures are left on the disk."""
    rows: list[dict] = []
    counts: Counter[str] = Counter()
    quiet = not engine.state.is_local_main_process
    for number, example in enumerate(tqdm(examples, desc="Reading", unit="example", disable=quiet)):
        counts[example.group] += 1
        if num_examples is not None and counts[example.group] > num_examples:
            continue
        texts = {name: getattr(example, name) for name in ("key", "group", "source_caption", "edit_prompt")}
        rows.append(texts | {"seed": seed + number, "number": number, "place": counts[example.group]})
        if engine.is_main:
            for folder, image in (("source", example.image), ("mask", example.mask), ("target", example.target)):
                file = files.image(folder, example.key)
                if image is not None and not file.exists():
                    write_image(image, file)
    return rows


def _results(
    files: _Files,
    metrics: Metrics,
    rows: list[dict],
    work: list[tuple[Variant, Path, list[dict]]],
    variants: list[Variant],
    curves: list[Variant],
) -> dict:
    """What the batches came to together."""
    by_key = {row["key"]: row | {"results": {}} for row in rows}
    for variant, file, _ in work:
        for key, values in json.loads(file.read_text())["results"].items():
            by_key[key]["results"][variant.name] = {
                name: value for name, value in values.items() if name in ("error", *metrics.infos)
            }
    rows = list(by_key.values())
    all_variants = [*variants, *curves]
    summary = summarise(rows, metrics.infos, [variant.name for variant in all_variants], variants[0].name)
    if "fid" in metrics.infos:
        _add_fid(files, metrics, rows, variants, summary)
    kept = ("key", "group", "source_caption", "edit_prompt", "seed", "results")
    return {
        "metrics": {
            name: {"title": info.title, "better": info.better, "about": info.about}
            for name, info in metrics.infos.items()
        },
        "left_out": metrics.left_out,
        "variants": {
            variant.name: {
                "title": variant.title,
                "slug": variant.slug,
                "method": variant.method,
                "settings": variant.changes,
                "given_mask": variant.method_class.given_mask,
            }
            for variant in all_variants
        },
        "examples": [{name: row[name] for name in kept} for row in rows],
        "summary": summary,
    }


def evaluate(
    data: str,
    methods: list[str],
    output_dir: str | os.PathLike,
    settings: Settings,
    split: str | None = None,
    num_examples: int | None = None,
    strengths: list[float] = [],
    num_curve_examples: int | None = None,
    metrics: list[str] | None = None,
    networks: dict[str, str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    caption_model: str | None = None,
) -> dict:
    """Evaluates methods on a set of examples (Sec. 4), and writes `results.json`, `results.md` and `index.html`.

    Under `accelerate launch`, the processes share the work; all have to see the output folder. Stopped at any time and
    called again, it goes on where it was, with the same results, and tries what failed again. Methods and metrics can
    be added to a finished evaluation; whatever else changes needs another folder.

    Args:
        data (`str`): `mini`, `pie-bench:DIR`, or a set of pairs or of edits: see
            [`~diffusers_iedit.evaluation.data.load_examples`].
        methods (`list[str]`): Variants, as for [`~diffusers_iedit.evaluation.methods.parse_variant`]. Differences are
            taken from the first.
        output_dir (`str` or `os.PathLike`): A new folder, or that of an earlier call.
        settings ([`Settings`]): For all methods.
        split (`str`, *optional*): Of the data.
        num_examples (`int`, *optional*): Take only the first of each group, to try something.
        strengths (`list[float]`): Also run each method that has a strength with each of these, for trade-off curves.
        num_curve_examples (`int`, *optional*): How many examples of each group the curves take.
        metrics (`list[str]`, *optional*): Of [`~diffusers_iedit.evaluation.measuring.METRICS`]; all by default whose
            networks can be had.
        networks (`dict[str, str]`, *optional*): See [`~diffusers_iedit.evaluation.networks.Networks`]; for the mini
            benchmark, `mini` is the default of each.
        seed (`int`): Of the noise: an example's is `seed` plus its place in the set.
        dtype (`torch.dtype`): Of the models that edit.
        batch_size (`int`): How many pictures are edited together; what a stop can lose.
        caption_model (`str`, *optional*): What writes the captions of a set that has none.

    Returns:
        `dict`: What `results.json` holds. An edit that failed has the one entry `error`.

    Raises:
        ValueError: If anything that was given cannot be used, or the folder holds another evaluation.
        RuntimeError: If another process is at work on the folder.
    """
    engine = LocalEngine()
    device = engine.state.device
    examples = load_examples(data, split, caption_model)
    variants = [parse_variant(name, settings) for name in dict.fromkeys(methods)]
    models = Models(device, dtype)
    curves = [
        parse_variant(f"{variant.name}@strength={strength}", settings)
        for variant in variants
        for strength in strengths
        if strength != settings.strength
        and "@" not in variant.name
        and variant.method_class(models).has_strength(variant.settings)
    ]
    if data == "mini":
        networks = dict.fromkeys(DEFAULT_MODELS, "mini") | (networks or {})
    metrics_taken = Metrics(metrics, Networks(networks, device))
    built = {variant.name: variant.method_class(models) for variant in (*variants, *curves)}

    weights: dict[str, str] = {}
    for variant in (*variants, *curves):
        # Each, as variants with the same models may need other parts of them.
        built[variant.name].load(variant.settings)
        weights |= {name: models.weights_hash(name) for name in variant.models if name not in weights}

    config = asdict(settings) | {"data": data, "split": split, "data_hash": examples.fingerprint, "seed": seed}
    config |= {"num_examples": num_examples, "num_curve_examples": num_curve_examples, "batch_size": batch_size}
    config |= {"dtype": str(dtype).removeprefix("torch."), "networks": metrics_taken.networks.models}
    files = _Files(Path(output_dir))
    with _claimed(files, engine):
        if engine.is_main:
            _start(files, config, [*variants, *curves], weights)
        engine.wait()
        rows = _read(files, examples, num_examples, seed, engine)
        # A batch always holds the same examples, as its size and its neighbours show in the last bits of the results.
        curve_rows = [row for row in rows if row["place"] <= (num_curve_examples or row["place"])]
        work = [
            (variant, files.batch(variant, start), chosen[start : start + batch_size])
            for variants_, chosen in ((variants, rows), (curves, curve_rows))
            for start in range(0, len(chosen), batch_size)
            for variant in variants_
        ]
        quiet = not engine.state.is_local_main_process
        for variant, file, batch in tqdm(engine.share(work), desc="Editing", unit="batch", disable=quiet):
            if not _is_done(file, metrics_taken):
                opened = [examples[row["number"]] for row in batch]
                seeds = [row["seed"] for row in batch]
                _work_off(files, file, variant, built[variant.name], metrics_taken, opened, seeds)
        engine.wait()
        if not engine.is_main:
            return {}
        results = {
            "settings": config,
            "versions": {name: version(name) for name in VERSIONS},
            "hashes": {"data": examples.fingerprint, "models": weights},
            "baseline": variants[0].name,
        } | _results(files, metrics_taken, rows, work, variants, curves)
        write_json(results, files.results)
        report.write(results, output_dir)
    return results
