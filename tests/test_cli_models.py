"""`iedit edit` and `iedit mask` on models of other families than Stable Diffusion: tiny random models, in process."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import DDIMInverseScheduler, FluxPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.utils import is_sentencepiece_available
from families import FAMILIES, small_conditions, t5_tokenizer  # noqa: F401
from hub_server import TOKEN, files_in
from huggingface_hub import constants
from PIL import Image
from transformers import T5Config, T5EncoderModel

from diffusers_iedit import IEditPipeline, LocalEditor, cli, loading
from diffusers_iedit.regions_iedit import read_photos


QUICK = ("--steps", "3", "--seed", "1")

# Of the others, the tiny stand-ins are no folders that load, or want arguments that the real ones do not.
SAVED = (
    "sdxl",
    "lcm",
    "instruct-pix2pix",
    "sd3",
    "flux",
    "chroma",
    "z-image",
    "qwen-image",
    "flux-kontext",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a family's tiny pipeline, by default saved as the class that edits with it."""
    folders = {}

    def save(name, cls=None):
        if (name, cls) not in folders:
            folders[name, cls] = tmp_path_factory.mktemp("models") / name
            pipe = FAMILIES[name].pipe()
            if name == "sd3":
                # A folder without the T5 encoder does not load.
                config = {"vocab_size": 128, "d_model": 64, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4}
                t5 = T5EncoderModel(T5Config(**config, is_encoder_decoder=False))
                pipe.register_modules(text_encoder_3=t5, tokenizer_3=t5_tokenizer())
            pipe = pipe if cls is None else cls.from_pipe(pipe)
            pipe.save_pretrained(folders[name, cls])
        return folders[name, cls]

    return save


@pytest.fixture
def iedit(capfd):
    """Run the command; returns its one line of output."""

    def run(*argv):
        capfd.readouterr()
        code = cli.main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        assert code == 0, err
        assert out.count("\n") == 1
        return out.rstrip("\n")

    return run


@pytest.fixture
def refused(folder, capfd):
    """Run the command; it has to exit with 2 and one line, and leave no file behind."""

    def run(*argv):
        before = sorted(folder.rglob("*"))
        capfd.readouterr()
        code = cli.main([str(arg) for arg in argv])
        out, err = capfd.readouterr()
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert sorted(folder.rglob("*")) == before
        return err

    return run


@pytest.fixture
def refused_unloaded(refused, monkeypatch):
    """As `refused`, and before any weights are read."""
    monkeypatch.setattr(loading, "load_pipeline", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    return refused


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def changed(first="in.png", second="out.png"):
    return (pixels(first) != pixels(second)).any(axis=-1)


# What it does


@pytest.mark.parametrize("name", SAVED)
def test_the_masked_part_changes_and_nothing_else(folder, saved, iedit, name):
    line = iedit("edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", "--model", saved(name), *QUICK)
    assert re.fullmatch(r"out\.png: \d+\.\d s, seed 1(, processed at \d+ px)?", line)
    marked = pixels("mask.png") > 0
    assert not changed()[~marked].any()
    assert changed()[marked].mean() > 0.5


def test_a_folder_of_text_to_image_models_is_edited_with_as_well(folder, saved, iedit):
    options = ("in.png", "car", "--mask", "mask.png", *QUICK)
    for cls, out in ((None, "by-img2img.png"), (FluxPipeline, "by-text.png")):
        iedit("edit", *options, "-o", out, "--model", saved("flux", cls))
    assert (folder / "by-img2img.png").read_bytes() == (folder / "by-text.png").read_bytes()
    assert changed("in.png", "by-text.png").any()


def test_it_is_the_edit_of_the_editor_with_the_strength_of_the_command(folder, saved, iedit, monkeypatch):
    calls = []
    run = LocalEditor.__call__
    monkeypatch.setattr(LocalEditor, "__call__", lambda self, **given: calls.append(given) or run(self, **given))
    options = "--steps 6 --guidance-scale 3 --negative-prompt tree --mask-dilation 2 --mask-feather 3".split()
    iedit("edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", *options, "--model", saved("sdxl"))
    iedit("edit", "in.png", "car", "-o", "out.png", *QUICK, "--strength", "0.4", "--model", saved("sdxl"))
    iedit("edit", "in.png", "car", "-o", "out.png", *QUICK, "--model", saved("flux-kontext"))
    for given in calls:
        for name in ("image", "mask_image", "generator"):
            given.pop(name, None)
    every = {"prompt": "car", "num_images_per_prompt": 1}
    assert calls == [
        every
        | {
            "strength": 0.7,
            "num_inference_steps": 6,
            "guidance_scale": 3.0,
            "negative_prompt": "tree",
            "mask_dilation": 2,
            "mask_feather": 3,
        },
        every | {"strength": 0.4, "num_inference_steps": 3},
        every | {"num_inference_steps": 3},
    ]


def test_several_results_have_the_seeds_that_give_each_alone(folder, saved, iedit):
    options = ("edit", "in.png", "car", "--mask", "mask.png", "--steps", "3", "--model", saved("flux"))
    line = iedit(*options, "-o", "out.png", "--num-images", "3", "--seed", "5")
    assert re.fullmatch(r"out-1\.png to out-3\.png: \d+\.\d s, seeds 5 to 7", line)
    iedit(*options, "-o", "alone.png", "--seed", "6")
    assert (folder / "out-2.png").read_bytes() == (folder / "alone.png").read_bytes()
    assert changed("out-1.png", "out-2.png").any()


def test_a_small_thing_in_a_large_picture_is_cut_out_at_the_models_size(folder, saved, iedit):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save("large.png")
    mask = Image.new("L", (400, 300))
    mask.paste(255, (200, 100, 220, 112))
    mask.save("small.png")
    options = ("edit", "large.png", "car", "-o", "out.png", "--mask", "small.png", *QUICK, "--model", saved("sdxl"))
    assert iedit(*options).endswith(", the 30x30 px around the mask edited at 64 px")
    assert not changed("large.png")[pixels("small.png") == 0].any()
    assert iedit(*options, "--whole-frame").endswith(", processed at 64 px")


@pytest.mark.usefixtures("small_conditions")
def test_a_model_that_wants_a_size_of_its_own_gets_it_for_whole_pictures():
    editor = LocalEditor(FAMILIES["qwen-image-edit"].pipe())
    photo = read_photos(Image.new("RGB", (64, 48)))[0]
    given = {}
    assert cli._settle_region(editor, photo, given, whole_frame=False) == ["processed at 1184 px"]
    assert given == {"processing_resolution": 1184}
    given = {"processing_resolution": 64}
    assert cli._settle_region(editor, photo, given, whole_frame=False) == []


# Masks by words


@pytest.fixture(scope="module")
def finding(saved, tmp_path_factory):
    """The folder of an SDXL that has a mask model and a captioner of its own, and a pipeline of these alone."""
    folder = tmp_path_factory.mktemp("models") / "finding"
    (mask_model, mask_processor), (captioner, caption_processor) = tiny_models.clipseg(), tiny_models.blip()
    parts = {
        "mask_model": mask_model,
        "mask_processor": mask_processor,
        "captioner": captioner,
        "caption_processor": caption_processor,
    }
    shutil.copytree(saved("sdxl"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = ["transformers", type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder, IEditPipeline(**dict.fromkeys(cli.EDITING), requires_safety_checker=False, **parts)


def test_the_mask_is_found_by_the_models_own_mask_model(folder, finding, iedit):
    model, finder = finding
    iedit("mask", "in.png", "-o", "found.png", "--mask-prompt", "car", "--mask-threshold", "0.4", "--model", model)
    (expected,) = finder.predict_mask(Image.open("in.png"), mask_prompt="car", mask_threshold=0.4)
    assert np.array_equal(pixels("found.png"), np.asarray(expected))
    words = ("--source-prompt", "auto", "--mask-threshold", "0.01")
    iedit("edit", "in.png", "a zebra", "-o", "out.png", *words, *QUICK, "--model", model)


def test_what_a_run_does_not_need_is_not_loaded(folder, finding, iedit, tmp_path_factory):
    light = tmp_path_factory.mktemp("light")
    needed = ("model_index.json", "mask_model", "mask_processor")
    for name in needed:
        (light / name).symlink_to(finding[0] / name)
    options = ("--mask-prompt", "car", "--mask-threshold", "0.1", "--model", light)
    iedit("mask", "in.png", "-o", "found.png", *options)
    without = tmp_path_factory.mktemp("without")
    for path in finding[0].iterdir():
        if path.name not in (*needed[1:], "captioner", "caption_processor"):
            (without / path.name).symlink_to(path)
    iedit("edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", *QUICK, "--model", without)


def test_without_one_the_mask_model_is_the_usual_one_from_the_hub(refused, saved, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    options = ("-o", "out.png", "--mask-prompt", "car", "--model", saved("sdxl"))
    for command in (["mask", "in.png"], ["edit", "in.png", "car"]):
        message = refused(*command, *options)
        assert f"the mask model '{loading.MASK_MODEL}': there is no such folder, and the Hugging Face Hub" in message


# Precision


def test_dtype_is_that_of_all_models(folder, finding, iedit, monkeypatch):
    seen = []
    to = LocalEditor.to
    monkeypatch.setattr(LocalEditor, "to", lambda self, *args: seen.append(self) or to(self, *args))
    options = ("--mask-prompt", "car", "--mask-threshold", "0.3", *QUICK, "--model", finding[0])
    iedit("edit", "in.png", "car", "-o", "single.png", *options)
    iedit("edit", "in.png", "car", "-o", "half.png", *options, "--dtype", "bfloat16")
    for editor, dtype in zip(seen, (torch.float32, torch.bfloat16), strict=True):
        assert {editor.dtype, editor.pipe.vae.dtype, editor.mask_model.dtype} == {dtype}
    assert changed("single.png", "half.png").any()


@pytest.mark.parametrize(
    ("device", "dtype", "of_transformer", "expected"),
    [
        ("cuda", "auto", False, torch.float16),
        ("cuda", "auto", True, torch.bfloat16),
        ("cuda", "float16", True, torch.float16),
        ("cpu", "auto", True, torch.float32),
        ("mps", "auto", False, torch.float32),
        ("cpu", "bfloat16", False, torch.bfloat16),
    ],
)
def test_the_usual_precision_is_that_which_does_not_overflow(monkeypatch, device, dtype, of_transformer, expected):
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: True)
    assert cli._choose_device(device, dtype, of_transformer) == (device, expected)


def test_float16_on_the_cpu_is_an_error_with_the_reason(refused_unloaded, saved):
    options = ("-o", "out.png", "--device", "cpu", "--dtype", "float16")
    for model in ("mini", saved("sdxl")):
        message = refused_unloaded("edit", "in.png", "car", *options, "--model", model)
        assert "--dtype float16: on the CPU, PyTorch lacks operations in it; take float32 or bfloat16" in message


def test_an_unknown_dtype_is_an_error(folder, capfd):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["edit", "in.png", "car", "-o", "out.png", "--dtype", "int8"])
    assert "argument --dtype: invalid choice: 'int8'" in capfd.readouterr().err


def test_nan_is_one_line_and_names_the_options_that_help(folder, saved, capfd, tmp_path_factory):
    pipe = StableDiffusionXLImg2ImgPipeline(**tiny_models.sdxl_components(), add_watermarker=False)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    model = tmp_path_factory.mktemp("models") / "nan"
    pipe.save_pretrained(model)
    assert cli.main(["edit", "in.png", "car", "-o", "out.png", *QUICK, "--model", str(model)]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("iedit edit: error: The edited picture holds NaN or infinity in result 0 of 1")
    assert "--dtype" not in line
    editor = LocalEditor(pipe.to(torch.float16))
    says = r"NaN\. `--dtype bfloat16` and `--dtype float32` have room"
    with pytest.raises(cli.UserError, match=says), cli._pipeline_errors(editor):
        raise FloatingPointError("NaN.")


# What is refused


def index_of(folder, class_name):
    """A folder of which nothing but the class of its pipeline is known."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    return folder


@pytest.mark.parametrize(
    ("class_name", "says"),
    [
        ("WanPipeline", "is a WanPipeline, which this editor does not serve; expected the models of an image-to-"),
        ("LTXConditionPipeline", "is a LTXConditionPipeline, which this editor does not serve"),
        ("NoSuchPipeline", "is a NoSuchPipeline, which this editor does not serve"),
        ("AutoencoderKL", "is a AutoencoderKL, which this editor does not serve"),
        ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline, which needs a `control_"),
        (["pipeline", "MyPipeline"], "gives no usable pipeline: model_index.json names no pipeline of diffusers"),
        (None, "gives no usable pipeline: model_index.json names no pipeline of diffusers (`_class_name`)"),
    ],
)
@pytest.mark.parametrize("command", [["edit", "in.png", "car"], ["mask", "in.png", "--mask-prompt", "car"]])
def test_a_pipeline_that_edits_no_pictures(refused_unloaded, tmp_path_factory, command, class_name, says):
    model = index_of(tmp_path_factory.mktemp("models") / "other", class_name)
    message = refused_unloaded(*command, "-o", "out.png", "--model", model)
    assert f"error: --model '{model}' " in message
    assert says in message
    if "does not serve" in says:
        assert "Z-Image" in message
        assert "FluxKontextPipeline" in message


@pytest.mark.skipif(is_sentencepiece_available(), reason="Kolors can be imported")
def test_a_pipeline_whose_libraries_are_not_installed_names_them(refused_unloaded, tmp_path_factory):
    model = index_of(tmp_path_factory.mktemp("models") / "kolors", "KolorsPipeline")
    message = refused_unloaded("edit", "in.png", "car", "-o", "out.png", "--model", model)
    assert "is a KolorsPipeline, which needs torch, transformers, sentencepiece: not all are installed" in message


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("flux-kontext", "--strength 0.5", "`strength` was passed, but FluxKontextPipeline has none: it starts from"),
        ("flux", "--negative-prompt ugly", "--negative-prompt: of FluxImg2ImgPipeline it changes nothing without"),
        ("lcm", "--negative-prompt tree", "`negative_prompt` is an argument of neither `LocalEditor` nor LatentCons"),
    ],
)
def test_an_option_that_the_model_does_not_have(refused_unloaded, saved, name, options, says):
    argv = ("edit", "in.png", "car", "-o", "out.png", *options.split(), "--model", saved(name))
    assert says in refused_unloaded(*argv)


def test_a_scheduler_that_cannot_be_masked(refused, tmp_path_factory):
    pipe = FAMILIES["sdxl"].pipe()
    pipe.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    model = tmp_path_factory.mktemp("models") / "inverse"
    pipe.save_pretrained(model)
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", model)
    assert "cannot mask DDIMInverseScheduler" in message


def test_a_damaged_part_is_named(refused, saved, tmp_path_factory):
    model = tmp_path_factory.mktemp("models") / "damaged"
    shutil.copytree(saved("flux"), model)
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = refused("edit", "in.png", "car", "-o", "out.png", "--model", model)
    assert f"--model '{model}' gives no usable FluxImg2ImgPipeline: transformer: {weights.name} is damaged" in message


# The Hub


EDIT = ["-m", "diffusers_iedit.cli", "edit", "in.png", "car", "-o", "out.png", "--mask", "mask.png", "--steps", "2"]


@pytest.mark.parametrize("status", [pytest.param(401, marks=pytest.mark.slow), 403])
def test_a_model_with_a_licence_says_how_to_get_it(folder, hub, saved, status):
    hub.add("models", "someone/gated", files_in(saved("flux")))
    # The Hub tells of a gated model, and gives none of its files.
    hub.fail("/someone/gated/resolve/", status=status, code="GatedRepo")
    process = hub.run([sys.executable, *EDIT, "--model", "someone/gated"])
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert (
        "--model 'someone/gated': there is no such folder, and the Hugging Face Hub gives it only to" in process.stderr
    )
    assert f"accept it on {hub.endpoint}/someone/gated, and log in with `hf auth login`" in process.stderr
    assert TOKEN not in process.stderr


@pytest.mark.slow
def test_a_model_from_the_hub_and_one_that_is_no_pipeline(folder, hub, saved):
    hub.add("models", "someone/flux", files_in(saved("flux")))
    hub.add("models", "someone/weights", {"flux.safetensors": b"\0"})
    process = hub.run([sys.executable, *EDIT, "--model", "someone/flux"])
    assert process.returncode == 0, process.stderr
    assert changed().any()
    process = hub.run([sys.executable, *EDIT, "--model", "someone/weights"])
    assert process.returncode == 2
    assert "what the Hugging Face Hub has lacks a file that is needed: " in process.stderr
    assert "model_index.json" in process.stderr


@pytest.mark.slow
def test_of_a_model_on_the_hub_a_mask_fetches_what_finds_it_alone(folder, hub, finding):
    hub.add("models", "someone/finding", files_in(finding[0]))
    argv = ["mask", "in.png", "-o", "found.png", "--mask-prompt", "car", "--mask-threshold", "0.1"]
    process = hub.run([sys.executable, "-m", "diffusers_iedit.cli", *argv, "--model", "someone/finding"])
    assert process.returncode == 0, process.stderr
    fetched = {
        request.path.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request.path
    }
    assert {path.split("/")[0] for path in fetched} == {"model_index.json", "mask_model", "mask_processor"}


def test_guidance_of_qwen_image_is_its_true_one(saved, iedit, folder):
    command = ("edit", "in.png", "a car", "--mask", "mask.png", "--model", saved("qwen-image"), *QUICK)
    for guidance in ("2", "9"):
        iedit(*command, "--guidance-scale", guidance, "-o", f"{guidance}.png")
    assert (folder / "2.png").read_bytes() != (folder / "9.png").read_bytes()
