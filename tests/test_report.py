"""The report of an evaluation: its Markdown, and its page as a browser shows it."""

import base64
import copy
import functools
import io
import json
import re

import browser
import numpy as np
import pytest
from PIL import Image

from diffusers_iedit import mini
from diffusers_iedit.evaluation import report
from diffusers_iedit.evaluation.statistics import summarise


METRICS = {
    "success": {"title": "Success", "better": "higher", "about": "The judge sees what was asked for."},
    "clip_score": {"title": "CLIPScore", "better": "higher", "about": "2.5 x cosine."},
    "fid": {"title": "FID", "better": "lower", "about": "Of all pictures together."},
    "ssim_m": {"title": "SSIM-M", "better": None, "about": "Of the edited area."},
    "ssim_not_m_region": {"title": "SSIM-notM", "better": "higher", "about": "Of the background."},
    "shift": {"title": "Shift", "better": "lower", "about": "In pixels."},
    "seconds": {"title": "Seconds", "better": "lower", "about": "An edit."},
}

# How often each method succeeds here, and how well it keeps the background.
METHODS = {"sdedit": ("SDEdit", 0.5, 0.7), "iedit": ("iEdit", 0.9, 0.65), "blended": ("Blended", 0.6, 0.95)}

COUNT = 60


def make_evaluation(folder):
    """Scenes of the mini world, "edited" by mixing each with another one, and numbers as they might be."""
    variants, truth = {}, {}
    for method, (title, success, kept) in METHODS.items():
        for strength in (None, 0.3, 0.9):
            name = method if strength is None else f"{method}@strength={strength}"
            variants[name] = {
                "title": title if strength is None else f"{title}, strength {strength}",
                "method": method,
                "settings": {} if strength is None else {"strength": strength},
                "given_mask": method == "blended",
                "slug": re.sub(r"\W", "-", name),
            }
            truth[name] = success + 0.3 * ((strength or 0.5) - 0.5), kept - 0.3 * ((strength or 0.5) - 0.5)
    random, examples = np.random.default_rng(0), []
    for number in range(COUNT):
        key = f"{('real', 'generated')[number % 2]}-{number:04}"
        source, target = mini.render(number), mini.render(1_000 + number)
        pictures = {"source": source.image, "mask": source.mask, "target": target.image}
        pictures |= {variant["slug"]: Image.blend(source.image, target.image, 0.7) for variant in variants.values()}
        results = {}
        for name in variants:
            success, kept = truth[name]
            results[name] = {
                "success": float(random.random() < success),
                "clip_score": random.normal(1 + success / 2, 0.05),
                "ssim_m": random.normal(0.8, 0.02),
                "ssim_not_m_region": random.normal(kept, 0.02),
                "shift": random.uniform(0, 3),
                "seconds": 0.5,
            }
        if number == 7:
            results["iedit"] = {"error": "ValueError: the edit | holds <NaN>"}
            del pictures["iedit"]
        for name, picture in pictures.items():
            file = folder / "images" / name / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
        prompt = target.caption if number else 'a <script>window.broken = 1</script> | "red" car & </script> *tree*'
        examples.append(
            {
                "key": key,
                "group": key.split("-")[0],
                "source_caption": source.caption,
                "edit_prompt": prompt,
                "seed": number,
                "results": results,
            }
        )
    summary = summarise(examples, METRICS, variants, "sdedit")
    for number, group in enumerate(summary.values()):
        for name, entries in group.items():
            entries["fid"] = {
                "value": {"sdedit": 171.2, "iedit": 158.4, "blended": 114.0}[name.split("@")[0]] + number
            }
    return {
        "settings": {"model": "mini", "strength": 0.5, "seed": 0, "networks": {"clip": "mini's own"}},
        "versions": {"diffusers": "0.42.1"},
        "hashes": {"data": "3f1a0c"},
        "left_out": ["LPIPS: there is no network. --networks lpips=NAME brings them in."],
        "metrics": METRICS,
        "variants": variants,
        "baseline": "sdedit",
        "examples": examples,
        "summary": summary,
    }


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A folder with the pictures and the report of an evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    results = make_evaluation(folder)
    report.write(results, folder)
    return folder, results


@pytest.fixture(scope="module")
def visit():
    with browser.chromium() as chromium:
        yield functools.partial(browser.visit, chromium)


@pytest.fixture(scope="module")
def page(evaluation):
    return evaluation[0] / "index.html"


def table(markdown, title, section="all", folded=False):
    """The cells of a Markdown table by row and column; the first of that title, or the first that is folded away."""
    markdown = markdown.replace("\N{NO-BREAK SPACE}", " ")
    text = markdown[markdown.index(f"## {section}") :]
    text = text[text.index("<details>") if folded else 0 :]
    lines = text[text.index(f"### {title}\n") :].split("\n\n")[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def markdown_of(results, folder):
    report.write_markdown(results, folder / "results.md")
    return (folder / "results.md").read_text()


def summary_of(**entries):
    """Results whose only metric is Success, with these (mean, low, high, difference) for each method."""
    return {
        method: {
            "success": {
                **dict(zip(("mean", "low", "high"), numbers, strict=True)),
                "count": COUNT,
                "difference": dict(zip(("mean", "low", "high"), difference, strict=True)),
            }
        }
        for method, (numbers, difference) in entries.items()
    }


def test_methods_are_rows_and_metrics_columns_that_show_which_way_is_better(evaluation):
    found = table((evaluation[0] / "results.md").read_text(), "Methods")
    assert list(found) == ["SDEdit", "iEdit (1 failed)", "Blended †"]
    assert list(found["SDEdit"]) == ["Success ↑", "CLIPScore ↑", "FID ↓", "SSIM-notM ↑"]


def test_the_metrics_that_decide_are_shown_and_the_others_folded_away(evaluation):
    markdown = (evaluation[0] / "results.md").read_text()
    assert list(table(markdown, "Methods", folded=True)["SDEdit"]) == ["SSIM-M", "Shift ↓", "Seconds ↓"]
    assert list(table(markdown, "Methods: difference from SDEdit")["Blended †"]) == [
        *("Success ↑", "CLIPScore ↑", "SSIM-notM ↑")
    ]


def test_few_metrics_are_all_shown(tmp_path, evaluation):
    metrics = {name: METRICS[name] for name in ("ssim_m", "shift", "clip_score")}
    markdown = markdown_of(evaluation[1] | {"metrics": metrics}, tmp_path)
    assert list(table(markdown, "Methods")["SDEdit"]) == ["SSIM-M", "Shift ↓", "CLIPScore ↑"]
    assert "The other metrics" not in markdown


def test_no_table_is_wider_than_six_metrics(tmp_path, evaluation):
    results = copy.deepcopy(evaluation[1])
    for number in range(20):
        results["metrics"][f"more-{number}"] = METRICS["shift"] | {"title": f"More {number}"}
        for entries in results["summary"].values():
            for found in entries.values():
                found[f"more-{number}"] = found["shift"]
    lines = markdown_of(results, tmp_path).split("## How it was measured")[0].splitlines()
    headers = [line for line in lines if line.startswith("|  |")]
    assert max(header.count(" | ") for header in headers) == 6
    for number in range(20):
        assert sum(f"More {number}\N{NO-BREAK SPACE}" in header for header in headers) == 12


def test_what_could_not_be_measured_is_named(visit, evaluation, page):
    sentence = "Not measured: LPIPS: there is no network. --networks lpips=NAME brings them in."
    assert sentence in (evaluation[0] / "results.md").read_text()
    assert sentence in visit(page, "return document.body.innerText")["value"]


def test_a_cell_is_the_mean_and_its_interval(tmp_path, evaluation):
    results = evaluation[1] | {"summary": {"all": summary_of(sdedit=((0.51234, 0.46, 0.56), (0, 0, 0)))}}
    assert table(markdown_of(results, tmp_path), "Methods")["SDEdit"]["Success ↑"] == "0.51 [0.46, 0.56]"


def test_a_metric_of_all_pictures_together_has_no_interval(evaluation):
    assert table((evaluation[0] / "results.md").read_text(), "Methods")["SDEdit"]["FID ↓"] == "171"


def test_the_best_is_bold_where_one_way_is_better(evaluation):
    markdown = (evaluation[0] / "results.md").read_text()
    found = table(markdown, "Methods")
    bold = {column: [row for row in found if found[row][column].startswith("**")] for column in found["SDEdit"]}
    assert bold["Success ↑"] == ["iEdit (1 failed)"]
    assert bold["FID ↓"] == ["Blended †"]
    assert "**" not in "".join(row["SSIM-M"] for row in table(markdown, "Methods", folded=True).values())


def test_nothing_is_bold_where_all_are_equal(evaluation):
    found = table((evaluation[0] / "results.md").read_text(), "Methods", folded=True)
    assert len(found) == 3
    assert not any("**" in row["Seconds ↓"] for row in found.values())


def test_those_that_look_equally_good_are_both_bold(tmp_path, evaluation):
    nothing = (0, 0, 0)
    summary = summary_of(
        sdedit=((0.2, 0.1, 0.3), nothing), iedit=((0.801, 0.7, 0.9), nothing), blended=((0.799, 0.7, 0.9), nothing)
    )
    found = table(markdown_of(evaluation[1] | {"summary": {"all": summary}}, tmp_path), "Methods")
    assert [row["Success ↑"].startswith("**0.80**") for row in found.values()] == [False, True, True]


@pytest.mark.parametrize(
    ("better", "difference", "mark"),
    [
        ("higher", (0.1, 0.02, 0.2), "✓"),
        ("higher", (-0.1, -0.2, -0.02), "✗"),
        ("lower", (-0.1, -0.2, -0.02), "✓"),
        ("lower", (0.1, 0.02, 0.2), "✗"),
        (None, (0.1, 0.02, 0.2), "≠"),
        ("higher", (0.1, -0.02, 0.2), None),
    ],
)
def test_a_difference_has_a_mark_where_its_interval_excludes_0(tmp_path, evaluation, better, difference, mark):
    results = copy.deepcopy(evaluation[1])
    results["metrics"]["success"]["better"] = better
    summary = summary_of(sdedit=((0.5, 0.4, 0.6), (0, 0, 0)), iedit=((0.6, 0.5, 0.7), difference))
    markdown = markdown_of(results | {"summary": {"all": summary}}, tmp_path)
    found = table(markdown, "Methods: difference from SDEdit")
    assert list(found) == ["iEdit (1 failed)"]
    (cell,) = found["iEdit (1 failed)"].values()
    written = [f"{number:+.2f}".replace("-", "−") for number in difference]
    assert cell == f"{written[0]} [{written[1]}, {written[2]}]" + (f" {mark}" if mark else "")


def test_changed_settings_have_a_table_of_their_own_in_their_order(evaluation):
    found = table((evaluation[0] / "results.md").read_text(), "By strength")
    assert [name for name in found if name.startswith("SDEdit")] == [
        "SDEdit, strength 0.3",
        "SDEdit, strength 0.5",
        "SDEdit, strength 0.9",
    ]
    assert len(found) == 9


def test_each_group_has_its_tables(evaluation):
    markdown = (evaluation[0] / "results.md").read_text()
    assert re.findall("^## (.*examples.*)", markdown, re.MULTILINE) == [
        "all (60 examples)",
        "real (30 examples)",
        "generated (30 examples)",
    ]
    assert [table(markdown, "Methods", group)["SDEdit"]["FID ↓"] for group in ("all", "real", "generated")] == [
        *("171", "172", "173")
    ]


def test_failed_edits_settings_versions_and_hashes_are_listed(evaluation):
    markdown = (evaluation[0] / "results.md").read_text()
    assert r"| generated-0007 | iEdit | ValueError: the edit \| holds &lt;NaN&gt; |" in markdown
    for line in ("| strength | 0.5 |", "| diffusers | 0.42.1 |", "| data | 3f1a0c |", "mini's own"):
        assert line in markdown


def test_what_was_not_measured_is_a_dash(tmp_path, evaluation):
    summary = summary_of(sdedit=((0.5, 0.4, 0.6), (0, 0, 0))) | {"iedit": {}}
    found = table(markdown_of(evaluation[1] | {"summary": {"all": summary}}, tmp_path), "Methods")
    assert found["iEdit (1 failed)"] == {"Success ↑": "–"}


def test_without_a_baseline_nothing_is_compared(tmp_path, evaluation):
    results = copy.deepcopy(evaluation[1]) | {"baseline": None}
    results["summary"] = summarise(results["examples"], METRICS, results["variants"], None)
    markdown = markdown_of(results, tmp_path)
    assert "difference" not in markdown.lower()
    assert table(markdown, "Methods")


def test_the_same_results_make_the_same_files(tmp_path, evaluation):
    folder, results = evaluation
    (tmp_path / "images").symlink_to(folder / "images")
    # As they come from the file.
    report.write(json.loads(json.dumps(results)), tmp_path)
    for name in ("results.md", "index.html"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_a_page_that_cannot_be_written_leaves_the_old_one_as_it_was(tmp_path, evaluation):
    (tmp_path / "index.html").write_text("the old one")
    with pytest.raises(FileNotFoundError, match="images/source"):
        report.write_html(evaluation[1], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "the old one"


def test_a_file_that_cannot_be_finished_leaves_the_old_one_as_it_was(tmp_path, evaluation):
    (tmp_path / "results.md").write_text("the old one")
    (tmp_path / "results.md.tmp").mkdir()
    with pytest.raises(IsADirectoryError):
        report.write_markdown(evaluation[1], tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == "the old one"


def sheet_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL).group(1))


def decode(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_small_pictures_keep_their_size_and_large_ones_are_scaled(tmp_path, evaluation):
    folder, results = evaluation
    results = results | {"examples": results["examples"][:2]}
    for file in (folder / "images").glob("*/*-000[01].png"):
        scaled = tmp_path / file.relative_to(folder)
        scaled.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((512, 384) if file.stem == "real-0000" else image.size).save(scaled)
    report.write_html(results, tmp_path)
    large, small = sheet_of(tmp_path / "index.html")["rows"]
    assert {decode(uri).size for uri in large["pictures"].values()} == {(160, 120)}
    assert {decode(uri).size for uri in small["pictures"].values()} == {(64, 64)}


def test_too_many_pictures_leave_the_worst_and_the_best_and_say_so(visit, tmp_path, evaluation, monkeypatch):
    folder, results = evaluation
    results = copy.deepcopy(results)
    for number, example in enumerate(results["examples"]):
        # From the worst to the best.
        example["results"] = {name: {"success": number / COUNT} for name in example["results"]}
    (tmp_path / "images").symlink_to(folder / "images")
    monkeypatch.setattr(report, "PICTURE_BYTES", 100_000)
    report.write_html(results, tmp_path)
    page = tmp_path / "index.html"
    kept = [int(row["key"][-4:]) for row in sheet_of(page)["rows"]]
    worst = len([number for number in kept if number < COUNT / 2])
    assert 4 < len(kept) < COUNT
    assert kept == [*range(worst), *range(COUNT - (len(kept) - worst), COUNT)]
    assert abs(worst - len(kept) / 2) <= 0.5
    said = visit(page, "return document.body.innerText")["value"]
    assert f"{COUNT - len(kept)} are left out" in said
    assert f"{len(kept)} of {len(kept)} examples" in said


def test_variants_that_only_change_a_number_are_plotted_instead_of_shown(page):
    sheet = sheet_of(page)
    assert [column["name"] for column in sheet["columns"]] == ["source", "mask", "target", *METHODS]
    assert sheet["other_variants"] == 6


def test_the_page_runs_without_faults_and_loads_nothing(visit, page):
    found = visit(page, "return document.querySelectorAll('.example').length > 0")
    assert found == {"value": True, "faults": [], "requests": []}


def test_a_browser_would_tell_of_faults_and_of_loading(visit, tmp_path):
    page = tmp_path / "index.html"
    page.write_text('<html><head></head><body><img src="picture.png"><script>nothing.at.all</script></body></html>')
    found = visit(page, "return 1")
    assert any("nothing is not defined" in fault for fault in found["faults"])
    assert any("not loaded" in fault for fault in found["faults"])


def test_pictures_are_decoded(visit, page):
    script = "return [...document.querySelectorAll('#sheet img')].map((image) => image.naturalWidth)"
    widths = visit(page, script)["value"]
    assert len(widths) == 5 * 6
    assert set(widths) == {64}


def test_a_prompt_is_text_and_never_code(visit, page):
    script = """
        const tool = document.getElementById("text");
        tool.value = "<SCRIPT>"; tool.dispatchEvent(new window.Event("input"));
        document.querySelector("#sheet button").click();
        await settle();
        return [window.broken, ...["sheet", "detail"].map((id) => document.getElementById(id).innerText)];
    """
    broken, *texts = visit(page, script)["value"]
    assert broken is None
    for text in texts:
        assert 'a <script>window.broken = 1</script> | "red" car & </script> *tree*' in text


def test_an_error_is_text_in_the_list_of_failed_edits(visit, page):
    script = "return [...document.querySelectorAll('#failures td')].map((cell) => cell.innerText)"
    assert visit(page, script)["value"] == ["generated-0007", "iEdit", "ValueError: the edit | holds <NaN>"]


def test_one_group_is_shown_at_a_time(visit, page):
    script = """
        const sections = [...document.querySelectorAll("section.group")];
        const seen = () => sections.filter((section) => section.offsetHeight).map((section) => section.dataset.group);
        const first = seen();
        document.querySelector("#groups [value=generated]").click();
        return [first, seen(), document.querySelectorAll("section.group[data-group=all] > .scroll table").length];
    """
    assert visit(page, script)["value"] == [["all"], ["generated"], 4]


def test_a_table_reads_as_in_the_markdown(visit, page):
    script = "return document.querySelector('section.group table tbody tr').innerText"
    cells = visit(page, script)["value"].split()
    assert cells[0] == "SDEdit"
    assert re.fullmatch(r"0\.\d\d", cells[1])


def test_each_plot_names_the_methods_and_strengths_in_the_colour_of_the_text(visit, page):
    script = """
        const plots = [...document.querySelectorAll("section.group:not([hidden]) .plots svg")];
        const colourOf = (plot) => window.getComputedStyle(plot.querySelector("text")).fill;
        return plots.map((plot) => [plot.textContent, colourOf(plot), window.getComputedStyle(document.body).color]);
    """
    plots = visit(page, script)["value"]
    assert len(plots) == 2
    for text, colour, colour_of_page in plots:
        assert all(title in text for title, _, _ in METHODS.values())
        assert "0.3" in text
        assert colour == colour_of_page


def set_tools(**values):
    """Sets controls of the sheet, each as a reader would."""
    return "".join(
        f"""{{
            const tool = document.getElementById("{name}");
            tool.value = {json.dumps(value)}; tool.checked = {json.dumps(value is True)};
            tool.dispatchEvent(new window.Event("input"));
        }}"""
        for name, value in values.items()
    )


SHOWN = """return {
    keys: [...document.querySelectorAll(".example > p")].map((p) => p.innerText.match(/\\w+-\\d{4}/)[0]),
    count: document.getElementById("count").innerText,
};"""


@pytest.mark.parametrize(
    ("metric", "order", "from_low"),
    [
        ("clip_score", "first", True),
        ("clip_score", "last", False),
        ("shift", "first", False),
        ("ssim_m", "first", True),
    ],
)
def test_pictures_are_sorted_by_any_metric_of_any_method(visit, evaluation, page, metric, order, from_low):
    keys = visit(page, set_tools(metric=metric, method="blended", order=order) + SHOWN)["value"]["keys"]
    values = {example["key"]: example["results"]["blended"][metric] for example in evaluation[1]["examples"]}
    expected = sorted(values, key=values.get, reverse=not from_low)
    assert keys == expected[: len(keys)]
    assert len(keys) == 5


def test_what_failed_is_the_worst_and_is_marked(visit, page):
    script = set_tools(metric="clip_score", method="iedit", order="first") + SHOWN.replace(
        "return {", 'return { text: document.querySelector(".example").innerText,'
    )
    found = visit(page, script)["value"]
    assert found["keys"][0] == "generated-0007"
    assert "failed" in found["text"]
    assert "ValueError: the edit | holds <NaN>" in found["text"]


def test_pictures_are_filtered_by_group_prompt_and_failure(visit, evaluation, page):
    examples = evaluation[1]["examples"]
    for tools, wanted in (
        ({"group": "real"}, [example for example in examples if example["group"] == "real"]),
        ({"text": "BUS"}, [e for e in examples if "bus" in f"{e['source_caption']} {e['edit_prompt']}"]),
        ({"failed": True}, [examples[7]]),
        ({"text": "no such thing"}, []),
    ):
        found = visit(page, set_tools(**tools) + SHOWN)["value"]
        assert found["count"] == f"{len(wanted)} of {COUNT} examples"
        assert set(found["keys"]) <= {example["key"] for example in wanted}
        assert bool(found["keys"]) == bool(wanted)


def test_the_first_rows_are_those_of_the_set_and_more_come_on_demand(visit, evaluation, page):
    script = """
        const more = document.getElementById("more");
        const counts = [];
        for (let turn = 0; turn < 4; turn++) {
          counts.push([document.querySelectorAll(".example").length, more.offsetHeight > 0]);
          more.click();
        }
    """
    found = visit(page, script + SHOWN.replace("return {", "return { counts,"))["value"]
    assert found["counts"] == [[5, True], [25, True], [45, True], [60, False]]
    assert found["keys"] == [example["key"] for example in evaluation[1]["examples"]]


def test_people_see_edits_first_then_the_plot_then_tables_and_fold_out_the_settings(visit, page):
    script = """
        const top = (selector) => document.querySelector(selector).getBoundingClientRect().top;
        const shown = (text) => document.body.innerText.includes(text);
        const before = shown("3f1a0c");
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        return [top(".example"), top(".plots"), top("table"), before, shown("3f1a0c")];
    """
    *tops, before, after = visit(page, script)["value"]
    assert tops == sorted(tops)
    assert tops[0] < 500
    assert [before, after] == [False, True]


def test_a_picture_opens_its_example_from_the_keyboard_and_arrows_go_on(visit, page):
    script = """
        const detail = document.getElementById("detail");
        const button = document.querySelectorAll("#sheet .example button")[3];
        button.focus();
        const focused = document.activeElement === button;
        button.click();
        const first = detail.querySelector("p").innerText;
        const rows = detail.querySelectorAll("tbody tr").length;
        detail.dispatchEvent(new window.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        const second = detail.querySelector("p").innerText;
        [...detail.querySelectorAll("button")].find((other) => other.innerText === "Close").click();
        return { focused, rows, first, second, open: detail.open,
                 expected: [...document.querySelectorAll(".example > p")].slice(0, 2).map((p) => p.innerText) };
    """
    found = visit(page, script)["value"]
    assert found["focused"]
    # FID has no number for one picture.
    assert found["rows"] == len(METRICS) - 1
    assert [found["first"], found["second"]] == found["expected"]
    assert not found["open"]


def test_nothing_is_wider_than_a_phone_or_scrolls_sideways(visit, page):
    script = """
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        document.querySelectorAll("#sheet button")[3].click();
        await settle();
        const scrolls = (box) =>
            box.scrollWidth > box.clientWidth && window.getComputedStyle(box).overflowX === "auto";
        return [document.documentElement.scrollWidth, document.getElementById("detail").getBoundingClientRect().right,
                [...document.querySelectorAll("*")].filter(scrolls).map((box) => box.outerHTML.slice(0, 200))];
    """
    *widths, scrolling = visit(page, script, width=360)["value"]
    assert max(widths) <= 360
    assert scrolling == []


def test_on_a_phone_every_number_stands_under_its_metric(visit, page):
    script = """
        const cells = [...document.querySelectorAll("section.group:not([hidden]) td")].slice(0, 4);
        return cells.map((cell) => window.getComputedStyle(cell, "::before").content);
    """
    labels = [label.replace("\N{NO-BREAK SPACE}", " ") for label in visit(page, script, width=360)["value"]]
    assert labels == ['"Success ↑"', '"CLIPScore ↑"', '"FID ↓"', '"SSIM-notM ↑"']
