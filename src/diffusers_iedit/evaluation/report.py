"""Writes what an evaluation found: `results.md`, and `index.html`, one page with pictures, plots and tables."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..images import open_image
from ..markdown import escape as _markdown
from .statistics import RESAMPLES


THUMBNAIL_SIZE = 160
"""No picture on the page is wider or higher, in pixels."""

PICTURE_BYTES = 16_000_000
"""What the pictures on the page may weigh together, encoded as text."""

# The metrics that decide, of those that were taken: what changed, what was kept, and whether it looks real. The others
# are folded away.
_LEADING = ("success", "clip_score", "ssim_not_m", "ssim_not_m_region", "fid")
_COLUMNS = 6
"""No table has more, but for that of the names."""

# The axes of the trade-off plots: how well the background is kept (the first of these that was measured), and whether
# the edit shows (one plot each).
_KEPT = ("ssim_not_m_region", "ssim_not_m")
_CHANGED = ("success", "clip_score")
# Readable on paper and on black.
_COLOURS = ("#2f7fc1", "#d9622b", "#2a9d73", "#b565a7", "#c99a1b", "#6c7fd8", "#c4485a", "#8c8c86")
_MARKERS = "osD^vP"

_ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", None: ""}
_NOTHING = {"text": "–", "interval": "", "mark": ""}
_MARKS = {"better": "✓", "worse": "✗", "different": "≠"}


def write(results: dict, output_dir: str | os.PathLike) -> None:
    """Writes `results.md` and `index.html` into `output_dir`, each at once or not at all.

    Args:
        results (`dict`): What `results.json` holds.
        output_dir (`str` or `os.PathLike`): The folder with `images/source`, `images/mask`, `images/target` (where the
            true edited picture is known) and `images/SLUG` for each variant, with one `KEY.png` an example.
    """
    write_markdown(results, Path(output_dir) / "results.md")
    write_html(results, output_dir)


def write_markdown(results: dict, file: str | os.PathLike) -> None:
    """Writes the tables as Markdown: the values, and the paired differences from the baseline, for each group.

    The metrics that decide come first; the others, what they all are, and the settings are folded away.

    Args:
        results (`dict`): What `results.json` holds.
        file (`str` or `os.PathLike`): The file to write.
    """
    lines = ["# Evaluation", "", _markdown(_facts(results)), "", _markdown(_legend(results))]
    for section in _sections(results):
        lines += ["", f"## {_markdown(section['title'])}", *_markdown_tables(section["tables"])]
        if section["others"]:
            lines += _folded("The other metrics", _markdown_tables(section["others"]))
    if failed := _failed(results):
        rows = [[_markdown(part) for part in entry] for entry in failed]
        lines += ["", "## Failed edits", "", *_markdown_table(["Example", "Method", "Error"], rows)]
    lines += ["", "## How it was measured"]
    for sentence in results["left_out"]:
        lines += ["", f"Not measured: {_markdown(sentence)}"]
    rows = [[_markdown(metric["title"]), _markdown(metric["about"])] for metric in results["metrics"].values()]
    lines += _folded("Metrics", ["", *_markdown_table(["Metric", "What it is"], rows)])
    for title, entries in _records(results).items():
        rows = [[_markdown(name), _markdown(value)] for name, value in entries]
        lines += _folded(title, ["", *_markdown_table(["", ""], rows)])
    _replace(Path(file), "\n".join(lines) + "\n")


def write_html(results: dict, output_dir: str | os.PathLike) -> None:
    """Writes `index.html`: a sheet of pictures, trade-off plots and the tables, in one page that needs nothing else.

    The pictures are embedded, at most 160 pixels wide and high. Where they would weigh more than 16 MB, the page shows
    the worst and the best examples (by the first metric that has a better direction, mean over the methods) and says
    how many it leaves out.

    Args:
        results (`dict`): What `results.json` holds.
        output_dir (`str` or `os.PathLike`): Where the pictures lie (see `write`) and the page goes.

    Raises:
        FileNotFoundError: If the picture of an edit that did not fail is not there.
    """
    output_dir = Path(output_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        marks=_MARKS,
        thumbnail_size=THUMBNAIL_SIZE,
        facts=_facts(results),
        legend=_legend(results),
        sections=[section | {"plots": _plots(results, section["group"])} for section in _sections(results)],
        failed=_failed(results),
        left_out=results["left_out"],
        metrics=results["metrics"],
        records=_records(results),
        sheet=_sheet(results, output_dir / "images"),
    )
    _replace(output_dir / "index.html", page)


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _markdown_tables(tables: list[dict]) -> list[str]:
    lines = []
    for table in tables:
        lines += ["", f"### {_markdown(table['title'])}", ""]
        rows = []
        for row in table["rows"]:
            rows.append([_markdown(row["title"])])
            for cell in row["cells"]:
                text = f"**{cell['text']}**" if cell["mark"] == "best" else cell["text"]
                rows[-1].append(" ".join(filter(None, (text, cell["interval"], _MARKS.get(cell["mark"])))))
        lines += _markdown_table(["", *map(_markdown, table["columns"])], rows)
    return lines


def _folded(title: str, lines: list[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", *lines, "", "</details>"]


def _facts(results: dict) -> str:
    settings = results["settings"]
    names = ("data", "model", "base_model", "strength", "guidance_scale", "num_inference_steps")
    facts = [
        f"{name.removeprefix('num_inference_').replace('_', ' ')} {settings[name]}"
        for name in names
        if settings.get(name) is not None
    ]
    return " · ".join([f"{len(results['examples'])} examples", *facts])


def _legend(results: dict) -> str:
    sentences = [f"Means with 95 % bootstrap intervals ({RESAMPLES:,} resamples of the examples). The best is bold."]
    if results["baseline"] is not None:
        sentences.append(
            f"Differences from {results['variants'][results['baseline']]['title']} are taken example by"
            " example. A mark says that their interval excludes 0: ✓ better, ✗ worse, ≠ different where neither is"
            " better. Nothing corrects for the number of comparisons."
        )
    if any(variant["given_mask"] for variant in results["variants"].values()):
        sentences.append("† The method is given the example's own mask.")
    return " ".join(sentences)


def _failed(results: dict) -> list[tuple[str, str, str]]:
    return [
        (example["key"], results["variants"][variant]["title"], found["error"])
        for example in results["examples"]
        for variant, found in example["results"].items()
        if "error" in found
    ]


def _records(results: dict) -> dict[str, list[tuple[str, str]]]:
    return {
        name.capitalize(): [
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in results[name].items()
        ]
        for name in ("settings", "versions", "hashes")
    }


def _decimals(results: dict, metric: str) -> int:
    """As many as show the usual half interval by one digit from 3 to 9 or two digits, or else the value by three."""
    found = [entries.get(metric) for summary in results["summary"].values() for entries in summary.values()]
    found = [entry for entry in found if entry]
    halves = [(entry["high"] - entry["low"]) / 2 for entry in found if "low" in entry]
    halves = [half for half in halves if half > 1e-9]
    size = float(np.median(halves)) / 3 if halves else max(abs(_value(entry)) for entry in found) / 100
    return min(max(-math.floor(math.log10(size)), 0), 6) if size else 2


def _value(entry: dict) -> float:
    return entry["mean"] if "mean" in entry else entry["value"]


def _number(value: float, decimals: int, sign: str = "") -> str:
    # Adding 0 turns -0.0 into 0.0.
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}".replace("-", "−")


def _interval(entry: dict, decimals: int, sign: str = "") -> str:
    return f"[{_number(entry['low'], decimals, sign)}, {_number(entry['high'], decimals, sign)}]"


def _value_cells(entries: list[dict], better: str | None, decimals: int) -> list[dict]:
    rounded = [round(_value(entry), decimals) for entry in entries if entry]
    best = max(rounded) if better == "higher" else min(rounded)
    has_best = better is not None and len(set(rounded)) > 1
    return [
        {
            "text": _number(_value(entry), decimals),
            "interval": _interval(entry, decimals) if "low" in entry else "",
            "mark": "best" if has_best and round(_value(entry), decimals) == best else "",
        }
        if entry
        else _NOTHING
        for entry in entries
    ]


def _difference_cells(entries: list[dict], better: str | None, decimals: int) -> list[dict]:
    cells = []
    for entry in entries:
        if "difference" not in entry:
            cells.append(_NOTHING)
            continue
        difference, mark = entry["difference"], ""
        if difference["low"] > 0 or difference["high"] < 0:
            direction = "higher" if difference["low"] > 0 else "lower"
            mark = "different" if better is None else "better" if direction == better else "worse"
        text, interval = _number(difference["mean"], decimals, "+"), _interval(difference, decimals, "+")
        cells.append({"text": text, "interval": interval, "mark": mark})
    return cells


def _columns(results: dict) -> list[list[str]]:
    """The metrics of each table: first those that decide, or all if they are few."""
    metrics = list(results["metrics"])
    if len(metrics) <= _COLUMNS:
        return [metrics]
    leading = [name for name in metrics if name in _LEADING] or metrics[:_COLUMNS]
    others = [name for name in metrics if name not in leading]
    return [leading, *(others[start : start + _COLUMNS] for start in range(0, len(others), _COLUMNS))]


def _sections(results: dict) -> list[dict]:
    """The groups and their tables, as texts, in the order in which they are shown."""
    variants, sections = results["variants"], []
    leading, *others = _columns(results)
    for group, summary in results["summary"].items():
        examples = [example for example in results["examples"] if group in ("all", example["group"])]
        tables: list[dict] = []
        folded: list[dict] = []
        for title, titles in _rows(results):
            titles = dict(titles)
            for name in titles:
                failed = sum("error" in example["results"].get(name, {}) for example in examples)
                titles[name] += "\N{NO-BREAK SPACE}†" if variants[name]["given_mask"] else ""
                titles[name] += f" ({failed} failed)" if failed else ""
            compared = {
                name: titles[name]
                for name in titles
                if name != results["baseline"]
                and any("difference" in entry for entry in summary.get(name, {}).values())
            }
            baseline_title = variants[results["baseline"]]["title"] if results["baseline"] is not None else None
            for metrics in (leading, *others):
                for table_title, row_titles, key, make_cells in (
                    (title, titles, None, _value_cells),
                    (f"{title}: difference from {baseline_title}", compared, "difference", _difference_cells),
                ):
                    headings, columns = [], []
                    for metric in metrics:
                        about = results["metrics"][metric]
                        entries = [summary.get(name, {}).get(metric, {}) for name in row_titles]
                        if any(entry and (key is None or key in entry) for entry in entries):
                            headings.append(about["title"] + _ARROWS[about["better"]])
                            columns.append(make_cells(entries, about["better"], _decimals(results, metric)))
                    if columns:
                        rows = [
                            {"title": row_title, "cells": cells}
                            for row_title, *cells in zip(row_titles.values(), *columns, strict=True)
                        ]
                        table = {"title": table_title, "columns": headings, "rows": rows}
                        (tables if metrics is leading else folded).append(table)
        title = f"{group} ({len(examples)} examples)"
        sections.append({"group": group, "title": title, "tables": tables, "others": folded})
    return sections


def _setting(results: dict, variant: str, key: str):
    return results["variants"][variant]["settings"].get(key, results["settings"].get(key))


def _rows(results: dict) -> list[tuple[str, dict[str, str]]]:
    """The tables' titles, each with its rows (variants and their titles): the methods, then each changed setting."""
    variants = results["variants"]
    plain = {name: variant["title"] for name, variant in variants.items() if not variant["settings"]}
    found = [("Methods", plain)]
    for keys in dict.fromkeys(tuple(variant["settings"]) for variant in variants.values() if variant["settings"]):
        changed = [name for name, variant in variants.items() if tuple(variant["settings"]) == keys]
        titles = {}
        for method in dict.fromkeys(variants[name]["method"] for name in changed):
            # With the settings of all, the method is one more point of the series.
            mine = [name for name in [*plain, *changed] if variants[name]["method"] == method]
            values = {name: [_setting(results, name, key) for key in keys] for name in mine}
            if all(isinstance(value, (int, float)) for row in values.values() for value in row):
                mine.sort(key=values.__getitem__)
            for name in mine:
                titles[name] = variants[name]["title"]
                if name in plain:
                    titles[name] += "".join(f", {key} {results['settings'].get(key, 'as it is')}" for key in keys)
        found.append((f"By {' and '.join(keys)}".replace("_", " "), titles))
    return found


def _plots(results: dict, group: str) -> list[dict]:
    """Trade-off curves, one line a method and one point a strength, as SVG with text and axes of the page's colour."""
    summary, variants = results["summary"][group], results["variants"]
    kept = next((metric for metric in _KEPT if metric in results["metrics"]), None)
    plots = []
    for changed in _CHANGED:
        lines: dict[tuple[str, str], list[str]] = {}
        for name, variant in variants.items():
            if {kept, changed} <= set(summary.get(name, {})):
                others = {key: value for key, value in variant["settings"].items() if key != "strength"}
                lines.setdefault((variant["method"], json.dumps(others)), []).append(name)
        # Of what has other settings too, only a series of strengths is a line of its own.
        lines = {key: names for key, names in lines.items() if key[1] == "{}" or len(names) > 1}
        if not lines:
            continue
        with matplotlib.rc_context(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "iedit",
                "text.parse_math": False,
                "font.family": "sans-serif",
                "axes.spines.top": False,
                "axes.spines.right": False,
            }
        ):
            figure = Figure(figsize=(5, 4.2 + 0.2 * ((len(lines) + 1) // 2)), layout="constrained")
            axes = figure.add_subplot()
            for number, names in enumerate(lines.values()):
                names = sorted(names, key=lambda name: _setting(results, name, "strength") or 0)
                x, y = ([summary[name][metric] for name in names] for metric in (kept, changed))
                given_mask = variants[names[0]]["given_mask"]
                axes.errorbar(
                    [entry["mean"] for entry in x],
                    [entry["mean"] for entry in y],
                    xerr=_error_bars(x),
                    yerr=_error_bars(y),
                    color=_COLOURS[number % len(_COLOURS)],
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=5,
                    markerfacecolor="none" if given_mask else None,
                    linestyle="--" if given_mask else "-",
                    linewidth=1.2,
                    elinewidth=0.6,
                    label=min((variants[name]["title"] for name in names), key=len)
                    + ("\N{NO-BREAK SPACE}†" if given_mask else ""),
                )
                for end in (0, -1) if len(names) > 1 else ():
                    strength = str(_setting(results, names[end], "strength"))
                    where = (x[end]["mean"], y[end]["mean"])
                    axes.annotate(strength, where, (5, 5), textcoords="offset points", fontsize=8)
            axes.set_xlabel(results["metrics"][kept]["title"] + " (background kept)")
            axes.set_ylabel(results["metrics"][changed]["title"])
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
            drawing = io.StringIO()
            figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
        # Without the head of an XML file; black is what the page writes with.
        svg = drawing.getvalue()
        svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
        title = f"{results['metrics'][changed]['title']} over {results['metrics'][kept]['title']}"
        plots.append({"title": title, "svg": svg})
    return plots


def _error_bars(entries: list[dict]) -> list[list[float]]:
    # Rounding may put an end of an empty interval past its mean.
    return [
        [max(entry["mean"] - entry["low"], 0) for entry in entries],
        [max(entry["high"] - entry["mean"], 0) for entry in entries],
    ]


def _sheet(results: dict, images: Path) -> dict:
    """What the page's script shows: the examples with their pictures as data URIs, and their metrics."""
    variants, examples = results["variants"], results["examples"]
    # A series of strengths or steps says more as a curve; a model or a scheduler is something to look at.
    shown = [
        name
        for name, variant in variants.items()
        if not variant["settings"]
        or not all(isinstance(value, (int, float)) for value in variant["settings"].values())
    ] or list(variants)
    metrics = [
        {"name": name, **about, "decimals": _decimals(results, name)}
        for name, about in results["metrics"].items()
        if any(example["results"].get(variant, {}).get(name) is not None for example in examples for variant in shown)
    ]
    lead = next((metric for metric in metrics if metric["better"]), None)

    rows: dict[int, dict] = {}
    weight = 0
    for number in _worst_and_best(examples, shown, lead):
        example = examples[number]
        files = {name: images / name / f"{example['key']}.png" for name in ("source", "mask", "target")}
        if not files["target"].exists():
            del files["target"]
        for name in shown:
            found = example["results"].get(name)
            if found is not None and "error" not in found:
                files[name] = images / variants[name]["slug"] / f"{example['key']}.png"
        pictures = {name: _data_uri(file) for name, file in files.items()}
        weight += sum(map(len, pictures.values()))
        if weight > PICTURE_BYTES and rows:
            break
        rows[number] = {
            "key": example["key"],
            "group": example["group"],
            "caption": example["source_caption"],
            "prompt": example["edit_prompt"],
            "pictures": pictures,
            "results": {name: example["results"][name] for name in shown if name in example["results"]},
        }
    titles = {"source": "Source", "mask": "Mask", "target": "True edit"}
    if not any("target" in row["pictures"] for row in rows.values()):
        del titles["target"]
    titles |= {
        name: variants[name]["title"] + ("\N{NO-BREAK SPACE}†" if variants[name]["given_mask"] else "")
        for name in shown
    }
    return {
        "columns": [{"name": name, "title": title} for name, title in titles.items()],
        "methods": shown,
        "metrics": metrics,
        "rows": [rows[number] for number in sorted(rows)],
        "left_out": len(examples) - len(rows),
        "left_out_by": lead["title"] if lead else None,
        "other_variants": len(variants) - len(shown),
        "lead": lead["name"] if lead else None,
        "method": next((name for name in shown if name != results["baseline"]), shown[0]),
    }


def _worst_and_best(examples: list[dict], variants: list[str], metric: dict | None) -> list[int]:
    """The examples' numbers, by turns the worst and the best that is left; a failed edit is the worst there is."""
    if metric is None:
        return list(range(len(examples)))
    sign = 1 if metric["better"] == "higher" else -1
    goodness = []
    for example in examples:
        values = [example["results"].get(variant, {}).get(metric["name"]) for variant in variants]
        goodness.append(-math.inf if None in values else sign * sum(values))
    order = sorted(range(len(examples)), key=goodness.__getitem__)
    from_both_ends = zip(order, reversed(order), strict=True)
    return list(dict.fromkeys(number for pair in from_both_ends for number in pair))


def open_picture(file: Path) -> Image.Image:
    """One of the pictures in an evaluation's folder.

    Raises:
        ValueError: If it has been damaged since it was written; the message names it.
    """
    try:
        return open_image(file)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): take another folder.") from error


def _data_uri(file: Path) -> str:
    image = open_picture(file)
    unscaled = max(image.size) <= THUMBNAIL_SIZE
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    encoded = io.BytesIO()
    if image.mode == "L":
        image.save(encoded, "PNG", optimize=True)
    else:
        # A small picture has no colours to spare.
        image.convert("RGB").save(encoded, "JPEG", quality=85, subsampling=0 if unscaled else 2, optimize=True)
    kind = "png" if image.mode == "L" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"
