"""The `iedit` command: what it writes and prints, and how it refuses mistakes. Tiny random models, in process."""

import inspect
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import icc_profiles
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from huggingface_hub import constants
from PIL import Image, ImageDraw

from diffusers_iedit import IEditPipeline, __version__, cli, loading, mini
from diffusers_iedit.evaluation import runner


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved pipeline that can segment and caption."""
    mask_model, mask_processor = tiny_models.clipseg()
    captioner, caption_processor = tiny_models.blip()
    pipe = IEditPipeline(
        **tiny_models.sd_components(),
        mask_model=mask_model,
        mask_processor=mask_processor,
        captioner=captioner,
        caption_processor=caption_processor,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def iedit(model, capfd):
    """Run the command on the tiny model; returns its one line of output."""

    def run(line, *more):
        capfd.readouterr()
        assert cli.main([*line.split(), *more, "--model", str(model)]) == 0
        out, _ = capfd.readouterr()
        assert out.endswith("\n")
        assert out.count("\n") == 1
        return out.rstrip("\n")

    return run


@pytest.fixture
def refused(folder, capfd):
    """Run the command; it has to exit with 2, print one line on stderr alone and leave no file behind."""

    def run(*argv):
        before = sorted(folder.rglob("*"))
        capfd.readouterr()
        try:
            code = cli.main([str(arg) for arg in argv])
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capfd.readouterr()
        assert code == 2
        assert out == ""
        lines = [line for line in err.splitlines() if ": error: " in line]
        assert len(lines) == 1
        assert "Traceback" not in err
        assert err.endswith(lines[0] + "\n")
        assert sorted(folder.rglob("*")) == before
        return lines[0]

    return run


@pytest.fixture
def refused_at_once(refused, monkeypatch):
    """As `refused`, and no model may be loaded for it."""

    def load(*args, **kwargs):
        pytest.fail("a model was loaded before the mistake was noticed")

    monkeypatch.setattr(cli, "_load_pipeline", load)
    return refused


@pytest.fixture
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(path):
    return np.asarray(Image.open(path))


QUICK = "--steps 4 --strength 0.75"


# What it does


def test_edit_changes_the_masked_part_alone_and_prints_where_seconds_and_seed(folder, iedit):
    line = iedit(f"edit in.png car -o out.png --mask mask.png --seed 7 {QUICK}")
    assert re.fullmatch(r"out\.png: \d+\.\d s, seed 7", line)
    changed = (pixels("out.png") != pixels("in.png")).any(axis=-1)
    assert changed.any()
    assert not changed[pixels("mask.png") == 0].any()


def test_edit_with_the_printed_seed_gives_the_same_file(folder, iedit):
    line = iedit(f"edit in.png car -o first.png {QUICK}")
    seed = re.search(r"seed (\d+)$", line)[1]
    iedit(f"edit in.png car -o second.png --seed {seed} {QUICK}")
    iedit(f"edit in.png car -o third.png {QUICK}")
    assert (folder / "first.png").read_bytes() == (folder / "second.png").read_bytes()
    assert (folder / "first.png").read_bytes() != (folder / "third.png").read_bytes()


@pytest.mark.parametrize(
    "where",
    [
        ("--mask-prompt", "car"),
        ("--source-prompt", "a blue car"),
        ("--source-prompt", "auto"),
    ],
)
def test_edit_finds_the_mask_by_words(folder, iedit, where):
    iedit(f"edit in.png -o out.png --mask-threshold 0.01 {QUICK}", "a zebra in a hat", *where)
    assert Image.open("out.png").size == (64, 48)


def test_num_images_writes_numbered_files_with_consecutive_seeds(folder, iedit):
    line = iedit(f"edit in.png car -o out.png --num-images 3 --seed 5 {QUICK}")
    assert re.fullmatch(r"out-1\.png to out-3\.png: \d+\.\d s, seeds 5 to 7", line)
    assert not (folder / "out.png").exists()
    iedit(f"edit in.png car -o alone.png --seed 6 {QUICK}")
    assert np.abs(pixels("out-2.png").astype(int) - pixels("alone.png")).max() <= 1


def test_every_option_reaches_the_pipeline(folder, iedit, monkeypatch):
    calls = []
    run = IEditPipeline.__call__
    monkeypatch.setattr(IEditPipeline, "__call__", lambda self, **given: calls.append(given) or run(self, **given))
    iedit(
        "edit in.png car -o out.png --mask mask.png --strength 0.5 --steps 6 --guidance-scale 3 --negative-prompt tree"
        " --mask-dilation 2 --mask-feather 3 --mask-threshold 0.4 --processing-resolution 32"
    )
    (given,) = calls
    for name in ("image", "mask_image", "generator"):
        del given[name]
    assert given == {
        "prompt": "car",
        "strength": 0.5,
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "negative_prompt": "tree",
        "num_images_per_prompt": 1,
        "mask_dilation": 2,
        "mask_feather": 3,
        "mask_threshold": 0.4,
        "processing_resolution": 32,
    }


@pytest.mark.parametrize(
    ("command", "method"), [("edit", IEditPipeline.__call__), ("mask", IEditPipeline.predict_mask)]
)
def test_help_names_the_defaults_of_the_pipeline(command, method, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = {"num_inference_steps": "steps"}
    defaults = {name: parameter.default for name, parameter in inspect.signature(method).parameters.items()}
    for name in (
        "strength",
        "num_inference_steps",
        "guidance_scale",
        "mask_threshold",
        "mask_dilation",
        "mask_feather",
    ):
        if name in defaults:
            option = "--" + options.get(name, name).replace("_", "-")
            assert re.search(rf"{option} [A-Z]+ [^-]*\(default: {re.escape(str(defaults[name]))}\)", text)


def test_a_picture_over_twice_the_models_size_is_processed_at_the_models_size(folder, iedit):
    noise = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save("large.png")
    Image.new("L", (130, 100), 0).save("mask.png")
    mask = Image.open("mask.png")
    ImageDraw.Draw(mask).rectangle((40, 40, 80, 70), fill=255)
    mask.save("mask.png")
    line = iedit(f"edit large.png car -o out.png --mask mask.png --whole-frame --seed 1 {QUICK}")
    assert line.endswith(", seed 1, processed at 64 px")
    assert (pixels("out.png") == noise)[pixels("mask.png") == 0].all()
    assert iedit(f"edit large.png car -o out.png --seed 1 --processing-resolution 130 {QUICK}").endswith("seed 1")


def test_mask_writes_what_the_pipeline_predicts(folder, iedit, model):
    options = "--mask-threshold 0.4 --mask-dilation 1 --mask-feather 2"
    line = iedit(f"mask in.png -o found.png --mask-prompt car {options}")
    assert re.fullmatch(r"found\.png: \d+\.\d s", line)
    (expected,) = IEditPipeline.from_pretrained(model).predict_mask(
        Image.open("in.png"), mask_prompt="car", mask_threshold=0.4, mask_dilation=1, mask_feather=2
    )
    assert Image.open("found.png").mode == "L"
    assert np.array_equal(pixels("found.png"), np.asarray(expected))


def test_mask_takes_the_words_that_two_prompts_differ_in(folder, iedit):
    iedit("mask in.png -o named.png --mask-threshold 0.4 --mask-prompt", "red car")
    iedit("mask in.png -o differing.png --mask-threshold 0.4 --source-prompt", "a red car", "--prompt", "a blue car")
    assert (folder / "named.png").read_bytes() == (folder / "differing.png").read_bytes()


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        ("mask in.png -o out.png --mask-threshold 0.1 --mask-prompt car", [*cli.EDITING, *cli.CAPTIONING]),
        (f"edit in.png car -o out.png --mask mask.png {QUICK}", [*cli.MASKING, *cli.CAPTIONING]),
    ],
)
def test_what_a_run_does_not_need_is_not_loaded(folder, model, tmp_path_factory, command, unneeded):
    light = tmp_path_factory.mktemp("light")
    for path in model.iterdir():
        if path.name not in unneeded:
            (light / path.name).symlink_to(path)
    assert cli.main([*command.split(), "--model", str(light)]) == 0


@pytest.mark.parametrize("extension", ["png", "webp", "tif", "tiff", "bmp", "jpg", "jpeg", "PNG"])
def test_the_format_follows_the_extension(folder, iedit, extension):
    iedit(f"edit in.png car -o out.{extension} --seed 1 {QUICK}")
    with Image.open(f"out.{extension}") as image:
        assert image.format == {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension.upper())
        assert image.size == (64, 48)


@pytest.mark.parametrize("extension", ["png", "webp", "tif", "bmp"])
def test_formats_that_can_keep_the_background_exact_do(folder, iedit, extension):
    iedit(f"edit in.png car -o out.{extension} --mask mask.png {QUICK}")
    assert (pixels(f"out.{extension}") == pixels("in.png"))[pixels("mask.png") == 0].all()


def test_alpha_is_kept_and_flattened_onto_white_for_jpeg(folder, iedit):
    image = Image.open("in.png").convert("RGBA")
    image.putalpha(Image.open("mask.png"))
    image.save("in.png")
    iedit(f"edit in.png car -o out.png {QUICK}")
    assert np.array_equal(pixels("out.png")[..., 3], pixels("mask.png"))
    iedit(f"edit in.png car -o out.jpg {QUICK}")
    assert Image.open("out.jpg").mode == "RGB"
    assert pixels("out.jpg")[:8, :8].min() > 250


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif", "avif"])
def test_of_the_metadata_colour_profile_and_dpi_are_kept_and_the_picture_is_upright(folder, iedit, extension):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees to see it upright.
    exif[0x010F] = "a camera"
    profile = icc_profiles.display_p3()
    Image.open("in.png").save("in.jpg", exif=exif, icc_profile=profile, comment=b"a comment", dpi=(300, 300))
    iedit(f"edit in.jpg car -o out.{extension} {QUICK}")
    data = (folder / f"out.{extension}").read_bytes()
    assert b"a camera" not in data
    assert b"a comment" not in data
    with Image.open(f"out.{extension}") as image:
        assert image.size == (48, 64)
        assert 0x0112 not in image.getexif()
        assert image.info["icc_profile"] == profile
        if extension in ("png", "jpg", "tif"):
            assert [round(value) for value in image.info["dpi"]] == [300, 300]


@pytest.mark.parametrize("extension", ["jpg", "avif"])
def test_what_compresses_the_background_is_said(folder, iedit, extension):
    line = iedit(f"edit in.png car -o out.{extension} --mask mask.png {QUICK}")
    assert "compresses what was not edited anew (PNG keeps every byte)" in line
    assert "compresses" not in iedit(f"edit in.png car -o out.png --mask mask.png {QUICK}")


def test_sixteen_bits_and_further_frames_are_said(folder, iedit):
    grey = np.linspace(0, 65535, 64 * 48, dtype=np.uint16).reshape(48, 64)
    Image.fromarray(grey).save("deep.png")
    assert ", reduced to 8 bits" in iedit(f"edit deep.png car -o out.png {QUICK}")
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
    frames[0].save("moving.webp", save_all=True, append_images=frames[1:])
    assert ", the first of 3 frames" in iedit(f"edit moving.webp car -o out.png {QUICK}")
    line = iedit(f"edit in.png car -o out.png {QUICK}")
    assert "bits" not in line
    assert "frames" not in line


def test_a_format_that_keeps_no_colour_profile_is_said(folder, iedit):
    Image.open("in.png").save("p3.png", icc_profile=icc_profiles.display_p3())
    assert line_says_no_profile(iedit(f"edit p3.png car -o out.bmp {QUICK}"))
    assert not line_says_no_profile(iedit(f"edit p3.png car -o out.png {QUICK}"))
    assert not line_says_no_profile(iedit(f"edit in.png car -o out.bmp {QUICK}"))


def line_says_no_profile(line):
    return line.endswith(", BMP keeps no colour profile (PNG does)")


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_colour_profile_that_cannot_be_used_is_said_once(folder, model, capfd, mode):
    Image.open("in.png").convert(mode).save("in.tif", icc_profile=b"broken")
    argv = ["edit", "in.tif", "car", "-o", "out.png", "--mask-prompt", "car", "--mask-threshold", "0", *QUICK.split()]
    assert cli.main([*argv, "--model", str(model)]) == 0
    assert capfd.readouterr().err.count("colour profile cannot be used") == 1


def test_heic_names_the_package_that_reads_it(folder, model, capfd):
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    assert cli.main(["edit", "photo.heic", "car", "-o", "out.png", "--model", str(model)]) == 2
    assert "photo.heic: cannot be read as an image" in (message := capfd.readouterr().err)
    assert "pip install pillow-heif" in message


# Small things in large pictures


def large_picture(folder, box=(200, 100, 220, 112), size=(400, 300)):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    mask.save(folder / "small.png")


def test_a_small_thing_in_a_large_picture_is_cut_out_with_some_of_its_length_around_it(folder, iedit):
    large_picture(folder)
    line = iedit(f"edit large.png car -o out.png --mask small.png --seed 1 {QUICK}")
    assert line.endswith(", the 30x30 px around the mask edited at 64 px")
    iedit(f"edit large.png car -o by-hand.png --mask small.png --crop-padding 5 --seed 1 {QUICK}")
    assert (folder / "out.png").read_bytes() == (folder / "by-hand.png").read_bytes()
    assert (pixels("out.png") == pixels("large.png"))[pixels("small.png") == 0].all()


def test_whole_frame_and_crop_padding_decide_otherwise(folder, iedit):
    large_picture(folder)
    line = iedit(f"edit large.png car -o out.png --mask small.png --whole-frame {QUICK}")
    assert line.endswith(", processed at 64 px")
    line = iedit(f"edit large.png car -o out.png --mask small.png --crop-padding 20 --mask-dilation 5 {QUICK}")
    assert line.endswith(", the 70x70 px around the mask edited at 64 px")


def test_a_picture_of_the_models_size_or_all_marked_is_edited_whole(folder, iedit):
    assert "around the mask" not in iedit(f"edit in.png car -o out.png --mask mask.png {QUICK}")
    large_picture(folder, box=(0, 0, 400, 300))
    assert iedit(f"edit large.png car -o out.png --mask small.png {QUICK}").endswith(", processed at 64 px")


def test_a_strip_whose_region_would_be_too_thin_is_edited_whole(folder, iedit):
    large_picture(folder, box=(100, 40, 180, 44), size=(1000, 100))
    assert iedit(f"edit large.png car -o out.png --mask small.png {QUICK}").endswith(", processed at 64 px")


def test_crop_padding_without_a_mask_is_an_error(folder, model, capfd):
    assert cli.main(["edit", "in.png", "car", "-o", "out.png", "--crop-padding", "8", "--model", str(model)]) == 2
    assert "--crop-padding needs a mask" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["edit", "in.png", "car", "-o", "out.png", "--crop-padding", "-1", "--model", str(model)])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["edit", "in.png", "car", "-o", "out.png", "--crop-padding", "1", "--whole-frame"])


def test_a_result_of_an_earlier_run_is_replaced(folder, iedit):
    Image.new("RGB", (2, 2)).save("out.png")
    iedit(f"edit in.png car -o out.png {QUICK}")
    assert Image.open("out.png").size == (64, 48)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"iedit {__version__}\n"


@pytest.mark.parametrize(
    ("source_prompt", "looked_for"),
    [("a blue car", "'blue car': what the prompt changes in 'a blue car'"), ("auto", "")],
)
@pytest.mark.parametrize("command", [["edit", "in.png", "a zebra in a hat"], ["mask", "in.png"]])
def test_the_caption_and_the_term_that_is_looked_for_are_said(
    folder, model, capfd, command, source_prompt, looked_for
):
    prompt = ["--prompt", "a zebra in a hat"] if command[0] == "mask" else QUICK.split()
    options = ["-o", "out.png", "--mask-threshold", "0.01", "--model", str(model), "--source-prompt", source_prompt]
    assert cli.main([*command, *prompt, *options]) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    assert re.search(r"^Looking for '[a-z ]+': what the prompt changes in '[a-z ]+'\.$", err, re.MULTILINE)
    assert looked_for in err


def test_the_caption_is_said_where_nothing_is_found(folder, model, capfd):
    Image.new("RGB", (64, 48), "red").save("in.png")
    options = ["-o", "o.png", "--source-prompt", "auto", "--mask-threshold", "0.9999", "--model", str(model)]
    assert cli.main(["edit", "in.png", "a zebra", *options]) == 2
    assert "what the prompt changes in '" in capfd.readouterr().err


def test_device(folder, iedit, model, capfd):
    iedit(f"edit in.png car -o chosen.png --device cpu --seed 1 {QUICK}")
    iedit(f"edit in.png car -o default.png --seed 1 {QUICK}")
    if not torch.cuda.is_available():
        assert (folder / "chosen.png").read_bytes() == (folder / "default.png").read_bytes()


def test_lists_of_an_evaluation_that_are_given_twice_add_up(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "evaluate", lambda **given: calls.append(given) or {})
    argv = ["evaluate", "--data", "mini", "--output-dir", str(tmp_path / "out"), "--model", "mini"]
    assert cli.main(argv) == 0
    twice = [
        "--networks",
        "clip=mini",
        "--networks",
        "fid=mini,dino=my/dino",
        "--metrics",
        "ssim",
        "--metrics",
        "psnr",
    ]
    twice += ["--methods", "iedit", "--methods", "sdedit", "--strengths", "0.3,0.5", "--strengths", "0.7"]
    assert cli.main([*argv, *twice]) == 0
    once, added = calls
    assert once["networks"] is None
    assert once["methods"] == ["sdedit", "sdedit-m", "iedit", "iedit-m"]
    assert "metrics" not in once
    assert added["networks"] == {"clip": "mini", "fid": "mini", "dino": "my/dino"}
    assert added["metrics"] == ["ssim", "psnr"]
    assert added["methods"] == ["iedit", "sdedit"]
    assert added["strengths"] == [0.3, 0.5, 0.7]


@pytest.mark.parametrize("command", ["edit", "mask"])
def test_help_names_the_models_of_the_package(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert "`mini`" in text
    assert "`mini-base`" in text
    assert "`mini-sd3-iedit`" in text


def test_help_names_the_values_of_networks(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "PART is clip, fid, lpips or dino; NAME is a Hub id, a folder, or, for clip and fid, `mini`" in text


# Files that cannot be read or written


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "EPS"])
@pytest.mark.parametrize("place", ["IMAGE", "--mask"])
def test_unreadable_image(folder, refused_at_once, kind, place):
    bad = folder / "bad.png"
    if kind == "folder":
        bad.mkdir()
    elif kind == "text":
        bad.write_text("no picture")
    elif kind == "EPS":
        # Whatever its name is, PIL would have Ghostscript draw it.
        Image.new("RGB", (8, 8)).save(bad, "EPS")
    elif kind != "missing":
        bad.write_bytes((folder / "in.png").read_bytes()[: 3000 if kind == "truncated" else 0])
    argv = [bad, "car", "-o", "out.png"] if place == "IMAGE" else ["in.png", "car", "-o", "out.png", "--mask", bad]
    assert "bad.png: " in refused_at_once("edit", *argv)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("out.xyz", "extension has to be one of .png"),
        ("out", "extension has to be one of .png"),
        ("no/out.png", "there is no folder no"),
        ("taken.png", "is a folder"),
        ("in.png/out.png", "there is no folder in.png"),
        (f"{'n' * 300}.png", "cannot be written (File name too long)"),
        (f"{'n' * 300}/out.png", "cannot be written (File name too long)"),
    ],
)
def test_unwritable_output(folder, refused_at_once, out, says):
    (folder / "taken.png").mkdir()
    assert says in refused_at_once("edit", "in.png", "car", "-o", out)
    assert says in refused_at_once("mask", "in.png", "--mask-prompt", "car", "-o", out)


def test_unwritable_numbered_output(folder, refused_at_once):
    (folder / "out-2.png").mkdir()
    assert "out-2.png: is a folder" in refused_at_once("edit", "in.png", "car", "-o", "out.png", "--num-images", "2")


def test_the_longest_name_can_be_written(folder, iedit):
    out = folder / f"{'n' * 251}.png"
    iedit("edit in.png car --mask-prompt car --mask-threshold 0 --steps 2 -o", str(out))
    assert out.exists()


@pytest.mark.parametrize(("out", "longest"), [("out.webp", 16383), ("out.jpg", 65500), ("out.jpeg", 65500)])
def test_a_picture_that_the_format_cannot_hold_is_refused_before_the_work(folder, refused_at_once, out, longest):
    Image.new("L", (longest + 1, 8)).save(folder / "wide.png")
    says = f"takes at most {longest} pixels a side, and the picture has {longest + 1}x8; choose another extension"
    assert says in refused_at_once("edit", "wide.png", "car", "-o", out)
    assert says in refused_at_once("mask", "wide.png", "--mask-prompt", "car", "-o", out)
    # At the limit, it is written.
    Image.new("L", (longest, 8)).save(folder / out)


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_a_failed_write_leaves_nothing_half_done(folder, model, monkeypatch, capfd, error, code):
    def save(self, path, **options):
        path.write_bytes(b"half a")
        raise error

    (folder / "out.png").write_bytes(b"what was there before")
    before = sorted(folder.iterdir())
    monkeypatch.setattr(Image.Image, "save", save)
    assert cli.main(["edit", "in.png", "car", "-o", "out.png", "--model", str(model), *QUICK.split()]) == code
    _, err = capfd.readouterr()
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("iedit edit: ")
    assert sorted(folder.iterdir()) == before
    assert (folder / "out.png").read_bytes() == b"what was there before"


@pytest.mark.parametrize("out", ["in.png", "./in.png", "link.png", "hard.png"])
@pytest.mark.parametrize("command", [["edit", "in.png", "car"], ["mask", "in.png", "--mask-prompt", "car"]])
def test_the_picture_itself_is_not_replaced(folder, refused_at_once, out, command):
    (folder / "link.png").symlink_to("in.png")
    (folder / "hard.png").hardlink_to("in.png")
    assert f"{Path(out)}: is in.png, which is read and would be lost" in refused_at_once(*command, "-o", out)


def test_what_is_read_is_replaced_by_no_numbered_result_and_no_mask_either(folder, refused_at_once):
    (folder / "in.png").rename(folder / "photo-2.png")
    message = refused_at_once("edit", "photo-2.png", "car", "-o", "photo.png", "--num-images", "2")
    assert "photo-2.png: is photo-2.png, which is read" in message
    message = refused_at_once("edit", "photo-2.png", "car", "--mask", "mask.png", "-o", "mask.png")
    assert "mask.png: is mask.png, which is read" in message


# Arguments that make no sense


@pytest.mark.parametrize(
    "options",
    [
        "--strength 0",
        "--strength -0.5",
        "--strength 1.1",
        "--strength nan",
        "--strength inf",
        "--strength much",
        "--steps 0",
        "--steps -3",
        "--steps 2.5",
        "--guidance-scale nan",
        "--num-images 0",
        "--seed -1",
        "--seed 9223372036854775808",
        "--mask-dilation -1",
        "--mask-feather -1",
        "--mask-threshold 1",
        "--mask-threshold -0.1",
        "--processing-resolution -64",
        "--processing-resolution 7",
    ],
)
def test_number_out_of_range(refused_at_once, options):
    option = options.split()[0]
    assert f"argument {option}: " in refused_at_once("edit", "in.png", "car", "-o", "out.png", *options.split())


@pytest.mark.parametrize(
    "options",
    [
        "--mask mask.png --mask-prompt car",
        "--mask mask.png --source-prompt car",
        "--mask-prompt car --source-prompt car",
    ],
)
def test_two_masks(refused_at_once, options):
    assert "not allowed with" in refused_at_once("edit", "in.png", "car", "-o", "out.png", *options.split())


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "edit",
        "edit in.png -o out.png",
        "edit in.png car",
        "mask in.png -o out.png",
        "mask in.png -o out.png --prompt car",
        "mask in.png -o out.png --source-prompt car",
        "mask in.png -o out.png --mask-prompt car --prompt car",
        "paint in.png",
    ],
)
def test_arguments_missing_or_unknown(refused_at_once, argv):
    refused_at_once(*argv.split())


# What the pipeline refuses


def test_mask_of_another_size(folder, refused, model):
    Image.new("L", (32, 32), 255).save("mask.png")
    message = refused("edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", "--model", model)
    assert "`mask_image` has to have the image's size, 64x48 pixels" in message


def test_black_mask(folder, refused, model):
    Image.new("L", (64, 48), 0).save("mask.png")
    message = refused("edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", "--model", model)
    assert "`mask_image` is zero everywhere" in message


def test_picture_of_one_pixel(folder, refused, model):
    Image.new("RGB", (1, 1)).save("in.png")
    assert "at least 8 pixels" in refused("edit", "in.png", "car", "-o", "out.png", "--model", model)


def test_too_little_strength_for_a_step(refused, model):
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", model, "--strength", "0.1", "--steps", "4")
    assert "smallest" in message


def test_more_steps_than_the_model_was_trained_with(refused, model):
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", model, "--steps", "5000")
    assert "5000" in message


def test_an_error_inside_of_diffusers_is_one_line(refused):
    # The noise of the first step is that of a time step after the last.
    options = ("--model", "mini", "--steps", "1000", "--strength", "1")
    message = refused("edit", "in.png", "car", "-o", "out.png", *options)
    assert "diffusers.schedulers.scheduling_ddim fails: IndexError: index 1000 is out of bounds" in message


@pytest.mark.parametrize("command", [["edit", "in.png", "car"], ["mask", "in.png"]])
def test_nothing_found(folder, refused, model, command):
    Image.new("RGB", (64, 48), "red").save("in.png")
    options = ["--mask-prompt", "car", "--mask-threshold", "0.9999", "--model", model]
    assert "'car'" in refused(*command, "-o", "out.png", *options)


def test_prompts_that_do_not_differ(refused, model):
    message = refused("mask", "in.png", "-o", "o.png", "--source-prompt", "a", "--prompt", "the", "--model", model)
    assert "differ in no word" in message


@pytest.mark.parametrize("device", [name for name in ("cuda", "mps") if not getattr(torch, name).is_available()])
def test_a_device_that_is_not_there(refused, device):
    message = refused("edit", "in.png", "car", "-o", "o.png", "--model", "mini", "--device", device)
    assert f"--device {device}: PyTorch finds no such device here" in message


def test_an_edit_that_comes_out_as_nan(refused, model, tmp_path_factory):
    pipe = IEditPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1, clip_sample=False
    )
    folder = tmp_path_factory.mktemp("zero-snr")
    pipe.save_pretrained(folder)
    argv = ["edit", "in.png", "car", "-o", "out.png", "--model", folder, "--steps", "4"]
    assert "The denoised latents hold NaN or infinity" in refused(*argv, "--strength", "1")
    assert cli.main([*map(str, argv), "--strength", "0.75"]) == 0


def test_a_gpu_without_enough_memory(refused, model, monkeypatch):
    def run(self, **given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(IEditPipeline, "__call__", run)
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", model)
    assert "too little memory: take a smaller --processing-resolution" in message


def test_an_unexpected_error_keeps_its_traceback(folder, model, monkeypatch):
    monkeypatch.setattr(IEditPipeline, "check_inputs", lambda *args: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["edit", "in.png", "car", "-o", "out.png", "--model", str(model)])


# Models that cannot be loaded


@pytest.fixture
def broken(model, tmp_path_factory):
    """Copies of the tiny model with one file replaced."""

    def make(name, content):
        folder = tmp_path_factory.mktemp("broken")
        for path in model.rglob("*"):
            copy = folder / path.relative_to(model)
            if path.is_dir():
                copy.mkdir()
            else:
                copy.symlink_to(path)
        (folder / name).unlink()
        (folder / name).write_bytes(content((model / name).read_bytes()))
        return folder

    return make


@pytest.mark.parametrize(
    "name",
    ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "mask_model/model.safetensors"],
)
@pytest.mark.parametrize("content", [lambda data: data[:5000], lambda data: b"\xff" * 5000, lambda data: b""])
def test_corrupted_weights(refused, broken, name, content):
    folder = broken(name, content)
    argv = ["edit", "in.png", "car", "-o", "out.png", "--mask-prompt", "car"]
    said = refused(*argv, "--model", folder)
    assert (
        f"--model '{folder}' gives no usable Stable Diffusion 1.x or 2.x: {name.replace('/', ': ')} is damaged" in said
    )


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}"])
def test_corrupted_model_index(refused, broken, content):
    folder = broken("model_index.json", lambda data: content)
    said = refused("edit", "in.png", "car", "-o", "out.png", "--model", folder)
    assert f"--model '{folder}' gives no usable pipeline: model_index.json " in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (".", "--model '.' is no folder of a diffusers pipeline, as it has no model_index.json"),
        ("in.png", "--model 'in.png' is a file, and has to be a folder or a Hub id"),
    ],
)
def test_model_that_is_no_pipeline_folder(refused_at_once, name, says):
    assert says in refused_at_once("edit", "in.png", "car", "-o", "out.png", "--model", name)


def test_model_of_another_kind(refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    StableDiffusionInpaintPipeline(**tiny_models.sd_components(in_channels=9)).save_pretrained(folder)
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", folder)
    assert f"--model '{folder}' gives no usable Stable Diffusion 1.x or 2.x: `unet` has to" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere/", "a model", "a-model", 300 * "m"])
def test_model_that_is_neither_a_folder_nor_an_id(refused_at_once, name):
    said = refused_at_once("edit", "in.png", "car", "-o", "o.png", "--model", name)
    assert f"--model '{name}': there is no such folder or model (it takes a folder, a Hub id" in said


@pytest.mark.parametrize(
    ("name", "near"), [("mini-bass", "mini-base"), ("tiney/", "tiny"), ("./sub/tiney", "sub/tiny"), ("sub/x", None)]
)
def test_model_whose_name_is_mistyped(refused, offline, model, folder, name, near):
    (folder / "sub").mkdir()
    for link in (folder / "tiny", folder / "sub/tiny"):
        link.symlink_to(model)
    said = refused("edit", "in.png", "car", "-o", "o.png", "--model", name)
    assert f"--model '{name}': there is no such folder" in said
    assert (f"did you mean '{near}'?" in said) if near else ("did you mean" not in said)


@pytest.mark.parametrize("option", ["--model", "--base-model", "--instruct-model"])
def test_an_evaluation_names_the_option_of_a_model_that_is_not_there(refused_at_once, option):
    said = refused_at_once("evaluate", "--data", "mini", "--output-dir", "out", option, "mini-bass")
    assert f"{option} 'mini-bass': there is no such folder or model" in said
    assert "did you mean 'mini-base'?" in said


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["edit", "in.png", "car"], cli.DEFAULT_MODEL),
        (["mask", "in.png", "--mask-prompt", "car"], cli.DEFAULT_MODEL),
        (["edit", "in.png", "car", "--model", "someone/something"], "someone/something"),
    ],
)
def test_unreachable_hub(refused, offline, command, missing):
    message = refused(*command, "-o", "out.png")
    assert f"--model '{missing}': there is no such folder, and the Hugging Face Hub cannot be reached" in message
    assert "--model mini" in message


@pytest.mark.parametrize("source_prompt", ["a blue car", "auto"])
def test_unreachable_hub_for_a_model_without_mask_model(refused, offline, tmp_path_factory, source_prompt):
    stock = tmp_path_factory.mktemp("stock")
    IEditPipeline(**tiny_models.sd_components()).save_pretrained(stock)
    message = refused("edit", "in.png", "car", "-o", "out.png", "--source-prompt", source_prompt, "--model", stock)
    assert (
        f"the mask model '{loading.MASK_MODEL}': there is no such folder, and the Hugging Face Hub cannot be"
        in message
    )
    assert "--model mini" in message


# The command as a process


def run_process(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "diffusers_iedit.cli", *argv],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_help_imports_no_library():
    code = "import sys; from diffusers_iedit import cli; cli.build_parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "numpy", "huggingface_hub"}.intersection(modules)


def test_process_without_a_hub(folder):
    result = run_process(
        *["edit", "in.png", "car", "-o", "out.png"],
        HF_HUB_OFFLINE="1",
        HF_HOME=str(folder / "cache"),
        HF_TOKEN="hf_secret",
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "--model mini" in result.stderr
    assert "hf_secret" not in result.stderr


def cpu_seconds(run):
    """What `run` returns, and the CPU seconds of the processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_process_with_the_mini_models_is_quick_and_says_only_what_matters(folder):
    mini.render(seed=0).image.save("in.png")
    code = "import diffusers_iedit.pipeline"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    _, imports = cpu_seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, env=environment))
    result, seconds = cpu_seconds(
        lambda: run_process(
            *["edit", "in.png", "a blue car on green grass " * 20, "-o", "out.png", "--mask-prompt", "car"],
            *["--model", "mini", "--mask-threshold", "0"],
            OMP_NUM_THREADS="1",
        )
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"out\.png: \d+\.\d s, seed \d+\n", result.stdout)
    assert "truncated" in result.stderr
    assert "torchvision" not in result.stderr
    assert "Loading" not in result.stderr
    # On one thread, an edit takes little more than importing the libraries, however fast the machine is.
    assert seconds < 1.5 * imports
