"""Regenerates the paper's Tables 1 and 2 in miniature, and how strength, masks, steps and schedulers matter.

    python training/mini/finetune.py        # the pairs; hours
    python training/mini/train_tables.py    # the rows of Table 2, three seeds each
    python training/mini/train_instruct.py  # the baseline InstructPix2Pix
    python benchmarks/tables.py             # evaluates them all, and writes benchmarks/tables

`--only shipped` needs no training: it compares what the package ships. The settings are those of tables/settings.json,
which were fixed on other examples (`--only choose`) before these were touched.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from diffusers_iedit.evaluation.statistics import interval


HERE = Path(__file__).parent / "tables"
PARTS = ("choose", "shipped", "trained", "curves", "masks", "steps")

# What the paper prints: CLIPScore in %, FID, SSIM-M and SSIM-notM in %.
PAPER_1 = {
    "generated": {
        "sdedit": (62.58, 171, 82.44, 50.64),
        "inpaint": (65.44, 143, 82.45, 94.76),
        "instruct-pix2pix": (65.12, 108, 88.62, 76.43),
        "iedit": (65.76, 158, 82.70, 52.02),
        "iedit-m": (66.36, 114, 83.08, 78.18),
    },
    "real": {
        "sdedit": (65.84, 180, 74.36, 64.60),
        "inpaint": (65.46, 162, 74.41, 93.97),
        "instruct-pix2pix": (66.91, 145, 80.59, 79.92),
        "iedit": (67.02, 166, 74.59, 70.09),
        "iedit-m": (67.44, 147, 74.98, 80.44),
    },
}
PAPER_2 = {
    "global + paired, captions": (65.95, 158, 78.84, 55.14),
    "global + LDM + loc": (65.62, 156, 79.61, 62.08),
    "global + LDM + loc + perc": (65.64, 153, 79.75, 62.20),
    "global + mask + loc + perc": (66.09, 146, 79.31, 59.54),
    "the same, masks at inference": (66.97, 128, 79.65, 77.99),
}
SHIPPED = ("sdedit", "sdedit-m", "sdedit-given", "iedit", "iedit-m", "iedit-given", "blended", "inpaint")
COLUMNS = {
    "success": "success",
    "clip_score": "CLIPScore",
    "fid": "FID",
    "ssim_m": "SSIM-M",
    "ssim_not_m": "SSIM-notM",
    "ssim_not_m_region": "background SSIM",
}
# FID is of a set, the others of each example.
OF_EXAMPLES = {column: title for column, title in COLUMNS.items() if column != "fid"}
SEEDS = (0, 1, 2)
SCHEDULERS = ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def evaluate(
    output_dir: Path, methods: list[str], processes: int, *options: object, settings: dict | None = None
) -> dict:
    """`iedit evaluate` with the mini models on the mini benchmark, by some processes. -> results.json"""
    for name, value in (json.loads((HERE / "settings.json").read_text()) if settings is None else settings).items():
        options += (f"--{name}", value)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", processes] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "diffusers_iedit.cli", "evaluate", "--data", "mini", "--model", "mini"]
    command += ["--output-dir", output_dir, "--methods", ",".join(methods), "--batch-size", 16, *options]
    print("$", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    return json.loads((output_dir / "results.json").read_text())


def cell(found: dict, column: str) -> str:
    value = found.get(column)
    if value is None:
        return "–"
    if "value" in value:
        return f"{value['value']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def table(header: tuple, rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def paper_cells(figures: tuple | None) -> list:
    return ["–"] * 3 if figures is None else [figures[0], figures[1], figures[3]]


def write_table_1(results: dict) -> str:
    text = ""
    for group in ("generated", "real"):
        rows = []
        for name, found in results["summary"][group].items():
            measured = [cell(found, column) for column in COLUMNS]
            rows.append([results["variants"][name]["title"], *measured, *paper_cells(PAPER_1[group].get(name))])
        header = ("method", *COLUMNS.values(), "paper: CLIPScore", "FID", "SSIM-notM")
        text += f"\n### {group.capitalize()} sources\n\n{table(header, rows)}"
    return text


def row_variants(work_dir: Path) -> dict[str, list[str]]:
    """Row of Table 2 -> its variants, one a seed."""
    rows = {}
    for number, name in enumerate(PAPER_2, start=1):
        method, trained = ("iedit-m", 4) if number == 5 else ("iedit", number)
        rows[name] = [f"{method}@model={work_dir / f'table2-row{trained}-{seed}'}" for seed in SEEDS]
    return rows


def over_seeds(results: dict, variants: list[str], column: str) -> np.ndarray:
    """The metric of each example, as the mean over the seeds: (examples,)."""
    return np.mean([[row["results"][v][column] for row in results["examples"]] for v in variants], axis=0)


def write_table_2(results: dict, rows: dict[str, list[str]]) -> str:
    lines = []
    for name, variants in rows.items():
        line = [name]
        for column in COLUMNS:
            by_seed = [results["summary"]["all"][v].get(column) for v in variants]
            values = [found.get("mean", found.get("value")) for found in by_seed]
            if column == "fid":
                line.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            else:
                mean, low, high = interval(over_seeds(results, variants, column))
                line.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]; seeds {min(values):.3f} to {max(values):.3f}")
        lines.append([*line, *paper_cells(PAPER_2[name])])
    text = table(("losses", *COLUMNS.values(), "paper: CLIPScore", "FID", "SSIM-notM"), lines)
    text += "\nPaired differences, row by row, over the same examples and the mean of the seeds:\n\n"
    names = list(rows)
    steps = ((1, 0), (2, 1), (3, 1), (3, 2), (4, 3))
    lines = []
    for after, before in steps:
        line = [f"row {after + 1} - row {before + 1}"]
        for column in OF_EXAMPLES:
            difference = over_seeds(results, rows[names[after]], column) - over_seeds(
                results, rows[names[before]], column
            )
            mean, low, high = interval(difference)
            line.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(line)
    return text + table(("difference", *OF_EXAMPLES.values()), lines)


def write_variants(results: dict, group: str = "all") -> str:
    rows = [
        [results["variants"][name]["title"], *(cell(found, column) for column in OF_EXAMPLES)]
        for name, found in results["summary"][group].items()
    ]
    return table(("variant", *OF_EXAMPLES.values()), rows)


def write_small(results: dict, file: Path) -> dict:
    """What the tables are made of: the summary as it is, and of each example the metrics shown, to five digits."""
    examples = [
        {
            "key": example["key"],
            "group": example["group"],
            "results": {
                variant: {column: round(found[column], 5) for column in COLUMNS if column in found}
                for variant, found in example["results"].items()
            },
        }
        for example in results["examples"]
    ]
    small = {name: results[name] for name in ("settings", "versions", "hashes", "variants", "baseline", "summary")}
    small["examples"] = examples
    file.write_text(json.dumps(small) + "\n")
    return small


def write_sheet(results: dict, output_dir: Path, file: Path) -> None:
    """Examples of both groups: source and mask, then each method; the first swaps of the thing and of the colour."""
    names = ["source", "mask", *(v["slug"] for v in results["variants"].values() if not v["settings"])]
    titles = ["source", "given mask", *(v["title"] for v in results["variants"].values() if not v["settings"])]
    keys = [f"{group}-{number:04}" for group in ("real", "generated") for number in range(5)]
    side, head = 96, 26
    sheet = Image.new("RGB", (side * len(names), head + side * len(keys)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, title) in enumerate(zip(names, titles, strict=True)):
        draw.multiline_text(
            (side * column + 3, 1),
            title.replace(", ", ",\n").replace(" Latent ", "\nLatent "),
            fill="black",
            font_size=9,
        )
        for row, key in enumerate(keys):
            image = Image.open(output_dir / "images" / name / f"{key}.png").convert("RGB")
            sheet.paste(
                image.resize((side - 2, side - 2), Image.Resampling.LANCZOS), (side * column + 1, head + side * row)
            )
    sheet.save(file)


def write_plot(results: dict, file: Path) -> None:
    """Success over how well the background is kept, one line a method and one point a strength."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method in (name for name in results["variants"] if "@" not in name):
        others = [name for name in results["variants"] if name.startswith(f"{method}@strength=")]
        strengths = {name: results["variants"][name]["settings"]["strength"] for name in others}
        # The settings of all are one more point.
        strengths = dict(
            sorted([(method, results["settings"]["strength"]), *strengths.items()], key=lambda pair: pair[1])
        )
        kept, changed = (
            [results["summary"]["all"][name][metric]["mean"] for name in strengths]
            for metric in ("ssim_not_m_region", "success")
        )
        axes.plot(kept, changed, marker="o", label=results["variants"][method]["title"])
        for name, x, y in zip(strengths, kept, changed, strict=True):
            axes.annotate(strengths[name], (x, y), xytext=(3, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="SSIM of the background", ylabel="success by the judge")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="of the trainings")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS[1:]))
    parser.add_argument("--processes", type=int, default=2, help="CPU processes that share the edits")
    args = parser.parse_args()

    out = args.work_dir / "tables"
    shared = (args.processes,)
    texts = {}
    if "choose" in args.only:
        sweep = [f"sdedit@strength={s}@guidance_scale={g}" for g in (1.5, 3.0, 7.5) for s in (0.3, 0.5, 0.7)]
        sweep += [f"sdedit-m@strength={s}@mask_dilation={d}" for s in (0.3, 0.5, 0.7) for d in (0, 2, 4)]
        options = ("--split", "choose", "--num-examples", 24)
        results = evaluate(out / "choose", sweep, *shared, *options, settings={"guidance-scale": 3.0, "steps": 25})
        texts["choose"] = write_variants(results)
    if "shipped" in args.only:
        methods, options = list(SHIPPED), ()
        instruct = args.work_dir / "instruct" / "instruct"
        if instruct.exists():
            methods, options = [*methods, "instruct-pix2pix"], ("--instruct-model", instruct)
        results = evaluate(out / "shipped", methods, *shared, *options)
        texts["table-1"] = write_table_1(write_small(results, HERE / "shipped.json"))
        write_sheet(results, out / "shipped", HERE / "sheet.png")
    if "trained" in args.only:
        rows = row_variants(args.work_dir)
        results = evaluate(out / "trained", ["sdedit", *(v for variants in rows.values() for v in variants)], *shared)
        texts["table-2"] = write_table_2(write_small(results, HERE / "trained.json"), rows)
    few = ("--num-examples", 40)
    if "curves" in args.only:
        methods = ["sdedit", "sdedit-m", "iedit", "iedit-m"]
        results = evaluate(out / "curves", methods, *shared, *few, "--strengths", "0.3,0.5,0.7,1.0")
        texts["strength"] = write_variants(results)
        write_plot(results, HERE / "strength.png")
    if "masks" in args.only:
        methods = [f"iedit-{mask}@mask_dilation={d}" for mask in ("given", "m") for d in (0, 2, 4, 8)]
        results = evaluate(out / "masks", methods, *shared, *few)
        texts["masks"] = write_variants(results, "real")
    if "steps" in args.only:
        methods = [f"iedit-m@num_inference_steps={steps}" for steps in (5, 10, 20, 50)]
        methods += [f"iedit-m@scheduler={scheduler}@num_inference_steps=20" for scheduler in SCHEDULERS]
        results = evaluate(out / "steps", methods, *shared, *few)
        texts["steps"] = write_variants(results)

    for name, text in texts.items():
        (HERE / f"{name}.md").write_text(text.lstrip() + "\n")


if __name__ == "__main__":
    main()
