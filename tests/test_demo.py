"""The page of `iedit demo`: its handlers, called as the page calls them, and its API over HTTP."""

import inspect
import io
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gradio as gr
import gradio_client
import httpx
import icc_profiles
import numpy as np
import pytest
import yaml
from gradio.route_utils import delete_files_created_by_app
from PIL import Image, ImageDraw

from diffusers_iedit import cli, demo, mini
from diffusers_iedit.demo import BY_BRUSH, BY_CHANGES, BY_WORDS, EVERYWHERE, Demo, Page, Session


SCENE = mini.render(seed=22)  # an orange car and a red ball on green grass
PROMPT = "an orange car and a red cat on green grass"
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def folder_of_gradio(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("gradio")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def edits():
    return Demo.load("mini", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def blocks(edits):
    blocks = demo.build(edits, demo.mini_examples())
    yield blocks
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def address(blocks):
    return demo.launch(blocks)


@pytest.fixture
def page(edits):
    return Page(edits, demo.mini_examples())


def settings(**given):
    """The values of all settings, in the order of the page."""
    given = {"strength": 0.7, "steps": STEPS, "seed": 5, "mask_dilation": 2} | given
    return [given.get(name.replace("-", "_")) for name in demo.SETTINGS]


def saved(tmp_path, name="ball.png", image=SCENE.image, **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def painted(box, size=(512, 512)):
    """What the canvas holds after a stroke of the brush."""
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).rectangle(box, fill=(*demo.MASK_COLOUR, round(255 * demo.MASK_OPACITY)))
    return {"background": None, "layers": [layer], "composite": None}


def edit(page, session, where=BY_WORDS, prompt=PROMPT, words="red ball", caption="", canvas=None, count=1, **given):
    page.begin(session)
    return page.run(session, where, prompt, words, caption, canvas, count, gr.Progress(), *settings(**given))


def downloaded(page, session):
    """The file that is downloaded."""
    return Path(page._results(session, session.selected)[3]["value"])


def command(page, session):
    return page._results(session, session.selected)[2]["value"]


def run_commands(lines, monkeypatch, folder):
    monkeypatch.chdir(folder)
    for line in lines.splitlines():
        program, *argv = shlex.split(line)
        assert program == "iedit"
        assert cli.main(argv) == 0


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"), dtype=int)


# Edits


def test_the_command_that_is_shown_makes_the_very_file_that_is_downloaded(page, tmp_path, monkeypatch):
    photo = SCENE.image.resize((96, 64))
    exif = Image.Exif()
    exif[274] = 6
    session = Session()
    profile = icc_profiles.display_p3()
    page.open_file(session, saved(tmp_path, "my photo.jpg", photo, quality=95, exif=exif, icc_profile=profile))
    edit(page, session, count=2, negative_prompt="a dog", mask_feather=1)
    page.select(session, gr.SelectData(None, {"index": 1, "value": None}))
    file = downloaded(page, session)
    run_commands(command(page, session), monkeypatch, tmp_path)
    assert file.name == "my photo-edit1-2.jpg"
    assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    with Image.open(file) as result:
        assert result.format == "JPEG"
        assert result.size == (64, 96)
        assert result.info["icc_profile"] == profile


def test_what_goes_on_from_a_result_is_shown_as_commands_from_the_first_picture_on(page, tmp_path, monkeypatch):
    session = Session()
    page.open_file(session, saved(tmp_path))
    edit(page, session)
    page.use_result(session)
    edit(page, session, BY_BRUSH, "a blue bus and a red cat on green grass", canvas=painted((0, 200, 250, 420)))
    file, lines = downloaded(page, session), command(page, session)
    session.results.painted.save(tmp_path / "ball-mask2.png")
    run_commands(lines, monkeypatch, tmp_path)
    assert lines.count("iedit edit") == 2
    assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_the_command_is_whole_for_a_picture_named_like_an_option(page, tmp_path, monkeypatch):
    session = Session()
    page.open_file(session, saved(tmp_path, "-o.png"))
    edit(page, session)
    file = downloaded(page, session)
    run_commands(command(page, session), monkeypatch, tmp_path)
    assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_outside_of_the_mask_no_byte_changes(page, tmp_path):
    session = Session()
    page.open_file(session, saved(tmp_path))
    edit(page, session, BY_BRUSH, canvas=painted((300, 200, 500, 400)))
    outside = np.asarray(session.results.painted) == 0
    changed = pixels(downloaded(page, session)) != np.asarray(SCENE.image, dtype=int)
    assert not changed[outside].any()
    assert changed[~outside].mean() > 0.5


def test_everywhere_needs_no_mask(page, tmp_path):
    session = Session()
    page.open_file(session, saved(tmp_path))
    edit(page, session, EVERYWHERE)
    assert session.results.mask is None
    assert "--mask" not in command(page, session)


def test_a_caption_is_written_and_what_the_prompt_changes_is_found(page, tmp_path):
    session = Session()
    page.open_file(session, saved(tmp_path))
    caption = page.write_caption(session)
    assert caption == SCENE.caption
    edit(page, session, BY_CHANGES, caption=caption)
    mask = np.asarray(session.results.mask) > 0
    truth = np.asarray(SCENE.mask) > 0
    assert (mask & truth).sum() > 0.9 * truth.sum()


def test_the_fast_setting_is_the_commands(page, tmp_path):
    session, counts = Session(), []
    page.open_file(session, saved(tmp_path))
    page.begin(session)
    values = page.demo.values(EVERYWHERE, PROMPT, "", "", "", settings(steps=None, fast=True))
    page.demo.edit(session.source, values, None, 1, lambda done, of: counts.append(of) is None)
    assert set(counts) == {8}
    assert values["fast"] is True


def test_every_option_of_an_edit_is_on_the_page(page):
    options = {name.removeprefix("--") for action in cli._job_parser()._actions for name in action.option_strings}
    settled = {"image", "prompt", "output", "mask", "mask-prompt", "source-prompt"}
    assert options - settled == set(demo.SETTINGS)
    over_http = inspect.signature(page.api_edit).parameters
    assert [name for name in over_http if name.replace("_", "-") in options - settled - {"mask"}] == [
        name.replace("-", "_") for name in demo.SETTINGS
    ]


# The brush


def test_a_mask_that_was_found_is_where_the_brush_begins(page, tmp_path):
    session, side = Session(), 1600
    page.open_file(session, saved(tmp_path, image=SCENE.image.resize((side, side))))
    found = SCENE.mask.resize((side, side), Image.Resampling.NEAREST)
    # On a canvas of 1024 pixels.
    canvas = page._overlay(session, session.source, found)["value"]
    assert np.array_equal(np.asarray(page._mask(session, canvas)), np.asarray(found))
    ImageDraw.Draw(canvas["layers"][0]).rectangle((0, 0, 511, 255), fill=(*demo.MASK_COLOUR, 140))
    expected = np.array(found)
    expected[: side // 4, : side // 2] = 255
    assert (np.asarray(page._mask(session, canvas)) != expected).mean() < 0.002
    # The eraser takes all of it away.
    canvas["layers"][0].putalpha(0)
    with pytest.raises(gr.Error, match="Nothing is painted"):
        edit(page, session, BY_BRUSH, canvas=canvas)


# What goes wrong is said in a sentence, and the page goes on


def bomb():
    """200 megapixels in a few bytes."""
    file = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def encoded(size, image_format="PNG"):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, image_format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"<html>no picture</html>", "photo.png cannot be read as a picture: it is damaged, or none of JPEG"),
        (encoded((64, 64))[:1500], "photo.png cannot be read as a picture: "),
        (encoded((64, 7)), "photo.png: `image` has to be at least 8 pixels a side, but is 64x7"),
        (bomb(), "photo.png cannot be read as a picture: it is larger than 40 megapixels"),
        (encoded((8_000, 5_001), "BMP")[:1000], "photo.png cannot be read as a picture: it is larger than 40 mega"),
    ],
    ids=["no picture", "truncated", "too small", "200 megapixels", "refused by the header"],
)
def test_a_file_that_cannot_be_edited_is_refused_and_the_picture_before_stays(page, tmp_path, content, sentence):
    session = Session()
    page.open_file(session, saved(tmp_path))
    (tmp_path / "photo.png").write_bytes(content)
    with pytest.raises(gr.Error) as raised:
        page.open_file(session, str(tmp_path / "photo.png"))
    assert raised.value.message.startswith(sentence)
    assert "\n" not in raised.value.message
    assert session.source.name == "ball.png"


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"prompt": " "}, "Say in the prompt what the picture shows after the edit."),
        ({"words": ""}, "Name what is to be changed"),
        ({"words": "blue house"}, "The predicted mask is empty: nothing .* looks like 'blue house'"),
        ({"where": BY_BRUSH, "canvas": painted((600, 600, 700, 700))}, "Nothing is painted"),
        ({"where": BY_BRUSH}, "Nothing is painted"),
        ({"where": BY_CHANGES, "caption": PROMPT}, "differ in no word that names a thing"),
        ({"strength": 0}, "strength.* above 0 and at most 1"),
        ({"steps": 1, "strength": 0.5}, "would run no step"),
        ({"mask_dilation": -1}, "mask-dilation"),
        ({"processing_resolution": 6325}, "processing-resolution has to be at most 6324"),
        ({"where": EVERYWHERE, "crop_padding": 4}, "crop-padding needs a mask"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused_and_the_next_one_runs(page, tmp_path, told, sentence):
    session = Session()
    page.open_file(session, saved(tmp_path))
    with pytest.raises(gr.Error, match=sentence) as raised:
        edit(page, session, **told)
    assert "\n" not in raised.value.message
    assert session.results is None
    if told == {"prompt": " "}:
        edit(page, session)
        assert len(session.results.images) == 1


def test_without_a_picture_everything_says_so(page):
    for act in (edit, lambda page, session: page.write_caption(session)):
        with pytest.raises(gr.Error, match="There is no picture yet"):
            act(page, Session())


def test_what_nobody_foresaw_is_a_sentence_too(page, tmp_path, monkeypatch):
    session = Session()
    page.open_file(session, saved(tmp_path))
    monkeypatch.setattr(cli, "_settle", lambda *args: 1 / 0)
    with pytest.raises(gr.Error, match="no fault of yours: ZeroDivisionError: division by zero"):
        edit(page, session)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--model", "nowhere"], "--model 'nowhere': there is no such folder or model"),
        (
            ["--model", "mini", "--port", "PORT"],
            "--port PORT: cannot be listened at on 127.0.0.1 (Address already in use)",
        ),
        (["--model", "mini", "--port", "70000"], "argument --port: has to be in [1, 65535], but is 70000"),
    ],
    ids=["no such model", "port in use", "no port"],
)
def test_the_command_refuses_in_one_line_before_a_model_is_loaded(monkeypatch, capsys, argv, sentence):
    monkeypatch.setattr(cli, "_load_pipeline", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        try:
            code = cli.main(["demo", *(port if arg == "PORT" else arg for arg in argv)])
        except SystemExit as stop:
            code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence.replace("PORT", port) in line


def test_without_gradio_the_command_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "diffusers_iedit.demo")
    assert cli.main(["demo", "--model", "mini"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'pip install "diffusers-iedit[demo]"' in line


# Several people, and what is kept of them


def test_nobody_sees_what_another_one_does(page, tmp_path):
    mine, theirs = Session(), Session()
    page.open_file(mine, saved(tmp_path))
    page.open_file(theirs, saved(tmp_path, "tree.png", mini.render(seed=5).image))
    edit(page, mine)
    assert theirs.results is None
    assert theirs.source.name == "tree.png"


def test_undo_goes_back_through_everything_that_was_edited(page, tmp_path):
    session = Session()
    page.open_file(session, saved(tmp_path))
    for _ in range(2):
        edit(page, session, steps=2)
        page.use_result(session)
    names = []
    while session.sources:
        names.append(session.source.name)
        if len(session.sources) == 1:
            break
        page.undo(session)
    assert names == ["ball-edit2.png", "ball-edit1.png", "ball.png"]
    assert np.array_equal(pixels(tmp_path / "ball.png"), np.asarray(session.source.photo.image(), dtype=int))


def test_of_many_large_pictures_those_in_between_are_forgotten(page, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "KEPT_MEGAPIXELS", 3 * 64 * 64 / 1e6)
    session = Session()
    page.open_file(session, saved(tmp_path))
    for number in range(5):
        session.add(demo.replace(session.source, name=f"{number}.png"))
    assert [source.name for source in session.sources] == ["ball.png", "3.png", "4.png"]


def test_a_run_is_stopped_within_a_step_also_while_it_waits(page, tmp_path):
    session, steps = Session(), []
    page.open_file(session, saved(tmp_path))

    def progress(done, **_):
        steps.append(done)
        if len(steps) == 3:
            page.stop(session)

    page.begin(session)
    where = (BY_WORDS, PROMPT, "red ball", "", None, 1)
    page.run(session, *where, progress, *settings(steps=50))
    assert len(steps) == 3
    assert session.results is None
    page.begin(session)
    page.stop(session)
    page.run(session, *where, progress, *settings(steps=50))
    assert len(steps) == 3


def test_a_picture_that_is_changed_meanwhile_gets_no_results_of_another(page, tmp_path):
    session = Session()
    page.open_file(session, saved(tmp_path))
    page.begin(session)
    page.run(
        session,
        BY_WORDS,
        PROMPT,
        "red ball",
        "",
        None,
        1,
        lambda *_, **__: page.open_example(session, 1),
        *settings(),
    )
    assert session.results is None


# Over HTTP


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


def test_a_client_edits_a_picture_in_one_call(client, tmp_path, monkeypatch):
    picture = gradio_client.handle_file(saved(tmp_path))
    files, line = client.predict(
        picture, PROMPT, words="red ball", num_images=2, steps=str(STEPS), seed="5", api_name="/edit"
    )
    assert [Path(file).name for file in files] == ["ball-edit1-1.png", "ball-edit1-2.png"]
    run_commands(line, monkeypatch, tmp_path)
    assert [Path(file).read_bytes() for file in files] == [(tmp_path / Path(file).name).read_bytes() for file in files]


def test_a_client_passes_a_mask_or_asks_for_one(client, tmp_path):
    picture = gradio_client.handle_file(saved(tmp_path))
    mask = client.predict(picture, PROMPT, words="red ball", api_name="/mask")
    found = np.asarray(Image.open(mask)) > 0
    files, _ = client.predict(
        picture, PROMPT, mask=gradio_client.handle_file(mask), steps=str(STEPS), api_name="/edit"
    )
    assert not (pixels(files[0]) != np.asarray(SCENE.image, dtype=int))[~found].any()
    for name in ("/edit", "/mask"):
        with pytest.raises(gradio_client.exceptions.AppError, match="only one of"):
            client.predict(picture, PROMPT, words="ball", caption="a ball", api_name=name)


def test_only_edit_and_mask_are_offered_over_http(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/edit", "/mask"}
    assert client.view_api(return_format="dict")["unnamed_endpoints"] == {}


@pytest.mark.parametrize("path", [str(Path(__file__).parents[1] / "pyproject.toml"), "/etc/hostname"])
@pytest.mark.parametrize("called", [{"meta": {"_type": "gradio.FileData"}}, {"meta": {}}, {}])
def test_a_path_of_the_server_is_no_picture(address, path, called):
    given = {"path": path} | called
    settings = [1, 0.7, *[""] * 9, False, False]
    for data in ([given, PROMPT, "red ball", "", None, *settings], [None, PROMPT, "", "", given, *settings]):
        event = httpx.post(f"{address}gradio_api/call/edit", json={"data": data}).json()["event_id"]
        answer = httpx.get(f"{address}gradio_api/call/edit/{event}").text
        assert "event: error" in answer
        assert "was not uploaded by a user" in answer
    assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403


def test_what_was_uploaded_and_made_is_removed_and_the_examples_stay(blocks, client, tmp_path, folder_of_gradio):
    def names():
        return {file.name for file in folder_of_gradio.rglob("*") if file.is_file()}

    picture = gradio_client.handle_file(saved(tmp_path, "mine.png"))
    client.predict(picture, PROMPT, num_images=1, steps=str(STEPS), api_name="/edit")
    assert {"mine.png", "mine-edit1.png", "ball.png"} <= names()
    assert blocks.delete_cache == (demo.CLEANED_SECONDS, demo.KEPT_SECONDS)
    delete_files_created_by_app(blocks, age=-1)
    assert not {"mine.png", "mine-edit1.png"} & names()
    assert {"ball.png", "large.png"} <= names()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_space_starts_and_ends_cleanly(tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"MODEL_ID": "mini", "MAX_MEGAPIXELS": "0.01", "GRADIO_SERVER_PORT": str(port), "TMPDIR": str(tmp_path)}
    settings |= {"GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONPATH": str(Path(demo.__file__).parents[1])}
    space = Path(__file__).parents[1] / "examples/space"
    server = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=os.environ | settings, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout.readline() == f"http://127.0.0.1:{port}/: Ctrl-C ends it\n"
        client = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False)
        picture = gradio_client.handle_file(saved(tmp_path))
        files, _ = client.predict(picture, PROMPT, words="red ball", num_images=1, steps="2", api_name="/edit")
        assert Image.open(files[0]).size == (64, 64)
        large = gradio_client.handle_file(saved(tmp_path, "large.png", SCENE.image.resize((101, 100))))
        with pytest.raises(gradio_client.exceptions.AppError, match=r"larger than 0\.01 megapixels"):
            client.predict(large, PROMPT, api_name="/edit")
    finally:
        server.send_signal(number)
    assert server.wait(timeout=60) == 0
    assert not list(tmp_path.glob("iedit-demo-*"))


def test_a_space_says_what_the_hub_reads(tmp_path):
    header = yaml.safe_load((Path(__file__).parents[1] / "examples/space/README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio"
    assert header["app_file"] == "app.py"
    assert header["sdk_version"] == gr.__version__
    assert len(header["short_description"]) <= 60
