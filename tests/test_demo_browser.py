"""The page of `iedit demo` as people use it: in a browser, with mouse and keyboard, at two widths."""

import re
import shlex
from pathlib import Path

import browser
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from diffusers_iedit import demo, mini
from diffusers_iedit.demo import Demo


SCENE = mini.render(seed=22)  # an orange car and a red ball on green grass
PROMPT = "an orange car and a red cat on green grass"

SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

# Of one wait for the server, which may share its cores with other tests.
TIMEOUT = 40_000


@pytest.fixture(scope="module")
def edits():
    return Demo.load("mini", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(edits, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        blocks = demo.build(edits, demo.mini_examples())
        yield demo.launch(blocks)
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def chromium(address):
    expect.set_options(timeout=TIMEOUT)
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture(params=["desktop"])
def page(request, chromium, address):
    """The page in a new window, of which nothing but its own server may be asked."""
    page = chromium.new_page(viewport=SIZES[request.param])
    page.set_default_timeout(TIMEOUT)
    hosts, broken = set(), []
    page.on("request", lambda request: hosts.add(re.sub(r"^(\w+:/*[^/]*/?).*", r"\1", request.url)))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(address)
    page.locator("#prompt").wait_for()
    yield page
    page.close()
    assert {host for host in hosts if not host.startswith(("blob:", "data:"))} == {address}
    assert broken == []


both_widths = pytest.mark.parametrize("page", ["desktop", "phone"], indirect=True)
phone_is_slow = pytest.mark.parametrize(
    "page", ["desktop", pytest.param("phone", marks=pytest.mark.slow)], indirect=True
)


def open_picture(page, file):
    page.locator("#source input[type=file]").set_input_files(file)
    page.locator("#canvas canvas").first.wait_for()


def drop_picture(page, file):
    data = page.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            return data;
        }""",
        [list(Path(file).read_bytes()), Path(file).name],
    )
    page.locator("#source button").first.dispatch_event("drop", {"dataTransfer": data})
    page.locator("#canvas canvas").first.wait_for()


def write(page, name, text):
    page.locator(f"#{name} textarea, #{name} input").first.fill(text)


def choose_settings(page, **settings):
    unfold = page.get_by_role("button", name="More settings")
    if not page.get_by_label("Steps").is_visible():
        unfold.click()
    for label, value in settings.items():
        page.get_by_label(label).fill(str(value))


def choose_count(page, count):
    page.locator("#count input[type=number]").fill(str(count))
    page.locator("#count input[type=number]").press("Tab")


def edit(page):
    page.locator("#run").click()
    # Not the steps of the bar.
    expect(page.locator("#told")).to_contain_text(re.compile(r"\d s\b"))


def download(page, folder, button="download"):
    with page.expect_download() as waiting:
        page.locator(f"#{button}").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def show_mask(page):
    with page.expect_response(lambda response: "/gradio_api/file=" in response.url):
        page.locator("#show").click()


def stroke(page, start, end):
    """Draws on the canvas; positions are shares of the picture, which is square and in the middle of the canvas."""
    canvas = page.locator("#canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # Nothing says any more that the page waits for the server.
    centre = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    page.wait_for_function("([x, y]) => document.elementFromPoint(x, y)?.matches('canvas')", arg=centre)
    zoom = int(page.locator("#canvas").get_by_text(re.compile(r"^\d+%$")).inner_text().rstrip("%")) / 100
    left, top = box["x"] + (box["width"] - 512 * zoom) / 2, box["y"] + (box["height"] - 512 * zoom) / 2
    for number, (x, y) in enumerate((start, end)):
        page.mouse.move(left + 512 * zoom * x, top + 512 * zoom * y, steps=8)
        (page.mouse.up if number else page.mouse.down)()


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"), dtype=int)


@pytest.fixture
def ball(tmp_path):
    SCENE.image.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


@phone_is_slow
def test_drop_say_see_paint_edit_compare_go_on_and_download(page, ball, tmp_path):
    drop_picture(page, ball)
    write(page, "prompt", PROMPT)
    write(page, "words", "red ball")
    show_mask(page)
    # Below and left of the ball, so that the brush adds to what was found.
    stroke(page, (0.55, 0.85), (0.65, 0.85))
    expect(page.get_by_label("By brush")).to_be_checked()
    choose_settings(page, Steps=6, Seed=3)
    choose_count(page, 2)
    edit(page)
    expect(page.locator("#gallery button img")).to_have_count(2)
    page.locator("#gallery button").nth(1).click()
    expect(page.locator("#told")).to_contain_text("Result 2 of 2")

    # What is downloaded is the source to the byte where neither the words nor the brush were.
    file, mask = download(page, tmp_path), download(page, tmp_path, "download-mask")
    assert [file.name, mask.name] == ["ball-edit1-2.png", "ball-mask1.png"]
    outside, changed = np.asarray(Image.open(mask)) == 0, pixels(file) != pixels(ball)
    assert not changed[outside].any()
    assert changed[~outside].mean() > 0.5
    truth = np.asarray(SCENE.mask) > 0
    assert (~outside & truth).sum() > 0.9 * truth.sum()
    assert not outside[54, 36:41].any()
    command = page.locator("#command textarea").input_value()
    assert shlex.split(command)[:6] == ["iedit", "edit", "ball.png", PROMPT, "--mask", "ball-mask1.png"]

    # The slider follows the mouse.
    handle = page.locator("#slider .handle, #slider .inner").first
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] < box["x"] - 30

    page.locator("#use").click()
    expect(page.locator("#undo")).to_be_visible()
    expect(page.locator("#slider")).to_be_hidden()
    page.get_by_label("Everywhere").check()
    edit(page)
    assert page.locator("#command textarea").input_value().count("iedit edit") == 2
    page.locator("#undo").click()
    expect(page.locator("#undo")).to_be_hidden()
    page.locator("#another").click()
    expect(page.locator("#examples")).to_be_visible()


def test_with_the_keyboard_alone(page):
    # Of all that can be done, the brush and the file dialog alone need more than keys.
    example = page.locator("#examples td[tabindex='0']")
    example.focus()
    page.keyboard.press("Enter")
    page.locator("#canvas canvas").first.wait_for()
    expect(page.locator("#prompt textarea, #prompt input").first).to_have_value(PROMPT)
    page.locator("#prompt textarea, #prompt input").first.focus()
    reached = []
    while "run" not in reached and len(reached) < 30:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('.block[id], button[id]')?.id"))
    assert [name for name in dict.fromkeys(reached) if name] == ["where", "words", "show", "strength", "count", "run"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_label("Steps").fill("4")
    page.locator("#run").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#told")).to_contain_text("Result 1 of 4")


def test_how_far_an_edit_is_can_be_seen_and_it_can_be_stopped(page, ball):
    open_picture(page, ball)
    write(page, "prompt", PROMPT)
    write(page, "words", "red ball")
    choose_settings(page, Steps=1000)
    page.locator("#run").click()
    expect(page.locator("#told")).to_contain_text(re.compile(r"\d+/\d+ steps"))
    page.locator("#stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    choose_settings(page, Steps=4)
    edit(page)


def test_who_leaves_in_the_middle_of_an_edit_keeps_nobody_waiting(page, ball):
    for steps in (1000, 4):
        open_picture(page, ball)
        write(page, "prompt", PROMPT)
        write(page, "words", "red ball")
        choose_settings(page, Steps=steps)
        choose_count(page, 4)
        if steps == 1000:
            page.locator("#run").click()
            expect(page.locator("#told")).to_contain_text(re.compile(r"\d+/\d+ steps"))
            page.reload()
            page.locator("#prompt").wait_for()
    edit(page)


@phone_is_slow
def test_errors_are_sentences_on_the_page_which_stays_usable(page, ball, tmp_path):
    (tmp_path / "letter.png").write_text("Dear all")
    page.locator("#run").click()
    expect(page.get_by_text("There is no picture yet")).to_be_visible()
    page.locator("#source input[type=file]").set_input_files(tmp_path / "letter.png")
    expect(page.get_by_text("letter.png cannot be read as a picture")).to_be_visible()
    # Until it is emptied, the upload would drop what comes next.
    expect(page.locator("#source img")).to_have_count(0)
    open_picture(page, ball)
    page.locator("#run").click()
    expect(page.get_by_text("Name what is to be changed")).to_be_visible()
    write(page, "words", "red ball")
    page.locator("#run").click()
    expect(page.get_by_text("Say in the prompt what the picture shows after the edit.")).to_be_visible()
    assert "Traceback" not in page.content()
    write(page, "prompt", PROMPT)
    choose_settings(page, Steps=4)
    edit(page)


@both_widths
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_wider_than_the_window(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.locator("#examples").wait_for()
    choose_settings(page)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """(width) => [...document.querySelectorAll("#prompt, #where label, #run, #stop, #examples, #source, #show")]
            .filter((element) => element.getBoundingClientRect().right > width)
            .map((element) => element.outerHTML.slice(0, 100))""",
        width,
    )
    assert wide == []
