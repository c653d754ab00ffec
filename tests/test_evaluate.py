"""`iedit evaluate`: the methods, the noise that they share, and runs that are stopped, that fail or do not fit."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_models
import torch
from accidents import free_port, two_ranks
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from small_pairs import make_rows, write_pairs, write_sdxl_base

from diffusers_iedit import IEditPipeline
from diffusers_iedit.cli import build_parser, main
from diffusers_iedit.evaluation.data import load_examples
from diffusers_iedit.evaluation.methods import METHODS, Method, Models, Settings, find_base, parse_variant
from diffusers_iedit.resuming import lock_folder


MINI = Settings(model="mini", base_model="mini-base", strength=0.5, guidance_scale=2.0, num_inference_steps=4)


@pytest.fixture(scope="module")
def models():
    return Models()


@pytest.fixture(scope="module")
def examples():
    return load_examples("mini", "choose")[:3]


def edit(name, examples, models, seeds=None):
    variant = parse_variant(name, MINI)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(examples))]
    return variant.method_class(models)(examples, variant.settings, generators)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def outside(examples, images):
    """The differences from the source outside the given masks."""
    masks = np.stack([np.asarray(example.mask) for example in examples]) > 0
    return np.abs(pixels(images) - pixels([example.image for example in examples]))[~masks]


# Methods


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    components = tiny_models.sd_components(vae_scale_factor=4, in_channels=8)
    folder = tmp_path_factory.mktemp("instruct") / "model"
    pipe = StableDiffusionInstructPix2PixPipeline(**components)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in METHODS if name != "instruct-pix2pix"])
def test_a_method_edits_pictures_alone_as_together(name, models, examples):
    together = edit(name, examples, models)
    assert [image.size for image in together] == [(64, 64)] * 3
    assert np.abs(pixels(together) - pixels([example.image for example in examples])).max() > 30
    alone = edit(name, examples[1:2], models, seeds=[1])
    assert np.abs(pixels(alone) - pixels(together[1:2])).max() <= 2


def test_without_fine_tuning_and_mask_iedit_is_sdedit_with_the_same_noise(models, examples):
    sdedit, iedit = edit("sdedit", examples, models), edit("iedit@model=mini-base", examples, models)
    assert np.abs(pixels(sdedit) - pixels(iedit)).max() <= 1
    assert np.abs(pixels(sdedit) - pixels(edit("iedit", examples, models))).max() > 10


def test_blended_diffusion_is_eq_13_with_the_base_but_for_the_pixels_outside(models, examples):
    blended = edit("blended", examples, models)
    # Blended Latent Diffusion does not bring the colours of its decode to the source's.
    with mock.patch("diffusers_iedit.regions_iedit.match_colours", lambda edited, *_: edited):
        ours = edit("sdedit-given", examples, models)
    masks = np.stack([np.asarray(example.mask) for example in examples]) > 0
    # Where the edge of a latent is not the edge of a pixel, the two differ.
    assert np.median(np.abs(pixels(blended) - pixels(ours))[masks]) <= 2
    assert outside(examples, ours).max() == 0
    assert outside(examples, blended).max() > 0


@pytest.mark.parametrize("name", ["sdedit-m", "iedit-m"])
def test_a_predicted_mask_keeps_pixels_and_a_dilated_one_fewer(name, models, examples):
    def kept(images):
        return (np.abs(pixels(images) - pixels([example.image for example in examples])).max(-1) == 0).mean()

    assert kept(edit(name, examples, models)) > kept(edit(f"{name}@mask_dilation=6", examples, models)) > 0.2


def test_without_a_term_an_edit_with_a_predicted_mask_goes_without_one(models, examples):
    nameless = [
        example.__class__(**{**vars(example), "source_term": None if number == 1 else example.source_term})
        for number, example in enumerate(examples)
    ]
    found, masked, plain = (
        edit(*what, models) for what in (("iedit-m", nameless), ("iedit-m", examples), ("iedit", examples))
    )
    assert np.abs(pixels(found)[1] - pixels(plain)[1]).max() <= 2
    assert np.abs(pixels(found)[[0, 2]] - pixels(masked)[[0, 2]]).max() <= 2


def test_inpainting_from_noise_forgets_what_was_in_the_mask(models, examples):
    black = [
        example.__class__(
            **{**vars(example), "image": Image.composite(Image.new("RGB", (64, 64)), example.image, example.mask)}
        )
        for example in examples
    ]
    masks = np.stack([np.asarray(example.mask) for example in examples]) > 0

    def differences(name):
        return np.abs(pixels(edit(name, examples, models)) - pixels(edit(name, black, models)))[masks].mean()

    assert differences("inpaint") < 0.5 * differences("blended")


def test_instruct_pix2pix_follows_the_instruction(models, examples, instruct):
    name = f"instruct-pix2pix@instruct_model={instruct}"
    other = [example.__class__(**{**vars(example), "edit_prompt": "a hat"}) for example in examples]
    instructed = [example.__class__(**{**vars(example), "instruction": "remove all"}) for example in examples]
    found = pixels(edit(name, examples, models))
    assert found.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(found, pixels(edit(name, other, models)))
    assert np.any(found != pixels(edit(name, instructed, models)))


# LocalEditor on models of any family


@pytest.mark.parametrize("name", ["editor:mini-sd3", "editor-m:mini-sd3", "editor:mini-base", "editor-m:mini-base"])
def test_an_editor_edits_pictures_alone_as_together(name, models, examples):
    together = edit(name, examples, models)
    assert [image.size for image in together] == [(64, 64)] * 3
    assert np.abs(pixels(together) - pixels([example.image for example in examples])).max() > 30
    assert np.array_equal(pixels(edit(name, examples[1:2], models, seeds=[1])), pixels(together[1:2]))


def test_an_editor_keeps_what_lies_outside_the_given_mask_or_the_predicted_one(models, examples):
    given, predicted = (edit(f"{name}:mini-sd3", examples, models) for name in ("editor", "editor-m"))
    assert outside(examples, given).max() == 0
    kept = (np.abs(pixels(predicted) - pixels([example.image for example in examples])).max(-1) == 0).mean()
    assert 0.2 < kept < 1
    wider = edit("editor-m:mini-sd3@mask_dilation=6", examples, models)
    assert kept > (np.abs(pixels(wider) - pixels([example.image for example in examples])).max(-1) == 0).mean()


@pytest.mark.parametrize("mask", ["given", "m"])
def test_on_the_same_models_an_editor_is_sdedit_with_the_same_noise(models, examples, mask):
    ours = edit("editor:mini-base" if mask == "given" else "editor-m:mini-base", examples, models)
    assert np.abs(pixels(ours) - pixels(edit(f"sdedit-{mask}", examples, models))).max() <= 2


def test_a_model_without_a_strength_is_told_the_instruction(models, examples, instruct):
    name = f"editor:{instruct}@num_inference_steps=2"
    other = [example.__class__(**{**vars(example), "edit_prompt": "a hat"}) for example in examples[:1]]
    instructed = [example.__class__(**{**vars(example), "instruction": "remove all"}) for example in examples[:1]]
    found = pixels(edit(name, examples[:1], models))
    np.testing.assert_array_equal(found, pixels(edit(name, other, models)))
    assert np.any(found != pixels(edit(name, instructed, models)))
    np.testing.assert_array_equal(found, pixels(edit(f"{name}@strength=0.2", examples[:1], models)))
    assert np.any(found != pixels(edit(f"{name}@guidance_scale=9", examples[:1], models)))


def test_a_scheduler_that_is_set_for_one_variant_is_no_other_ones(models, examples, instruct):
    for name in (f"editor:{instruct}", f"instruct-pix2pix@instruct_model={instruct}"):
        plain = pixels(edit(name, examples[:1], models))
        assert np.any(plain != pixels(edit(f"{name}@scheduler=EulerDiscreteScheduler", examples[:1], models)))
        np.testing.assert_array_equal(plain, pixels(edit(name, examples[:1], models)))


def test_an_evaluation_compares_backbones_and_goes_on(tmp_path, instruct):
    methods = f"sdedit-given,editor:mini-sd3,editor-m:mini-sd3,editor:{instruct}"
    options = ("--num-examples", 1, "--strengths", "0.3", "--metrics", "ssim_not_m,background_equal")
    assert run(tmp_path / "out", *options, methods=methods) == 0
    results = read(tmp_path / "out")
    assert set(results["hashes"]["models"]) == {"mini-base", "mini-sd3", str(instruct)}
    curves = [name for name in results["variants"] if "@" in name]
    assert curves == [f"{name}@strength=0.3" for name in ("sdedit-given", "editor:mini-sd3", "editor-m:mini-sd3")]
    variant = results["variants"]["editor:mini-sd3"]
    assert (variant["title"], variant["settings"]) == ("LocalEditor, given mask (mini-sd3)", {})
    assert variant["given_mask"]
    for example in results["examples"]:
        assert example["results"]["editor:mini-sd3"]["background_equal"] == 1
    assert run(tmp_path / "out", *options, methods=methods) == 0
    assert read(tmp_path / "out") == results


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("editor", "There is no method 'editor'. There are sdedit, "),
        ("editor:", "There is no method 'editor:'. There are sdedit, "),
        ("editor:mini-sd4", "The model of `editor` 'mini-sd4': there is no such folder or model"),
        ("editor:video", "The model of `editor` 'video' is a WanPipeline, which this editor does not serve; expected"),
        ("editor-m:control", "StableDiffusionControlNetImg2ImgPipeline, which needs a `control_image`"),
    ],
)
def test_an_editor_without_a_model_that_edits_is_an_error(tmp_path, monkeypatch, capsys, method, message):
    monkeypatch.chdir(tmp_path)
    for name, class_name in (("video", "WanPipeline"), ("control", "StableDiffusionControlNetPipeline")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    assert run(tmp_path / "out", methods=method) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("iedit evaluate: error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_a_picture_of_any_size_comes_back_in_its_size(models, examples):
    wide = [
        example.__class__(**{**vars(example), "image": example.image.resize((83, 70))}) for example in examples[:1]
    ]
    wide = [example.__class__(**{**vars(example), "mask": example.mask.resize((83, 70))}) for example in wide]
    for name in ("sdedit", "blended", "iedit-m", "editor:mini-sd3"):
        assert [image.size for image in edit(name, wide, models)] == [(83, 70)]


def test_a_scheduler_and_a_number_of_steps_can_be_set_for_a_variant(models, examples):
    plain = pixels(edit("iedit", examples, models))
    for name in ("iedit@scheduler=EulerDiscreteScheduler", "iedit@num_inference_steps=8"):
        assert np.abs(plain - pixels(edit(name, examples, models))).max() > 5
    np.testing.assert_array_equal(plain, pixels(edit("iedit", examples, models)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dall-e", "There is no method 'dall-e'. There are sdedit, .*, and module:Class."),
        ("iedit@colour=red", ".*there is no setting 'colour'. There are model, .*"),
        ("iedit@strength=much", ".*strength has to be a float, got 'much'."),
        ("iedit@strength=0", "`strength` has to be above 0 and at most 1, got 0.0."),
        ("iedit@num_inference_steps=0", "`num_inference_steps` has to be 1 or more, got 0."),
        ("iedit@mask_dilation=-1", "`mask_dilation` has to be 0 or more, got -1."),
        ("iedit@scheduler=Nonsense", "`scheduler` has to be the name of a class of diffusers, got 'Nonsense'."),
        ("instruct-pix2pix", "The method 'instruct-pix2pix' needs `instruct_model`, which was not given."),
        ("no_such_module:Method", "The method 'no_such_module:Method' cannot be imported: .*"),
        ("pathlib:Path", "'pathlib:Path' has to be a subclass of .*Method."),
    ],
)
def test_a_bad_variant_is_named_with_what_there_is(name, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_variant(name, MINI)


def test_variants_have_folders_of_their_own():
    names = [
        "iedit",
        "iedit@strength=0.3",
        "iedit@strength=0.30",
        "iedit@model=a/b",
        "iedit@model=a-b",
        "iedit-strength-0.3x",
    ]
    slugs = [parse_variant(name, MINI).slug for name in names if name != "iedit-strength-0.3x"]
    assert len(set(slugs)) == 5
    assert all(Path(slug).name == slug for slug in slugs)


# The base of a model


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Leaves a model's folder as a training in `tmp_path/project` does; work goes on in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def make(base, output_dir="runs/model"):
        folder = tmp_path / "project" / output_dir
        folder.mkdir(parents=True)
        (folder / "training_args.json").write_text(json.dumps({"model": str(base), "output_dir": str(output_dir)}))
        return str(folder)

    return make


@pytest.mark.parametrize("base", ["mini", "mini-base", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_the_base_is_what_the_training_was_given(trained, base):
    model = trained(base)
    assert find_base(model) == base
    assert Settings(model=model).base_model == base
    assert Settings(model=model, base_model="another").base_model == "another"


def test_a_base_in_a_folder_is_found_from_where_the_training_ran(trained, tmp_path):
    (tmp_path / "project/bases/first").mkdir(parents=True)
    assert Path(find_base(trained("bases/first"))).samefile(tmp_path / "project/bases/first")
    assert find_base(trained(tmp_path / "project/bases/first", "runs/other")) == str(tmp_path / "project/bases/first")


def test_where_the_training_ran_is_not_known_a_base_is_looked_for_here(trained, tmp_path):
    (tmp_path / "bases/first").mkdir(parents=True)
    assert find_base(trained("bases/first", tmp_path / "project/model")) == "bases/first"


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("mini", "mini-base"),
        ("someone/iedit", "CompVis/stable-diffusion-v1-4"),
        (".", "CompVis/stable-diffusion-v1-4"),
    ],
)
def test_without_a_training_s_options_the_base_is_the_paper_s_or_mini_s(tmp_path, monkeypatch, model, base):
    monkeypatch.chdir(tmp_path)
    assert find_base(model) == base


@pytest.mark.parametrize("content", ["{", "[]", '{"output_dir": "model"}'])
def test_options_that_do_not_tell_the_base_are_an_error(tmp_path, content):
    (tmp_path / "training_args.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"training_args.json does not tell from what .* was trained; `base_model` does"
    ):
        find_base(str(tmp_path))


def test_a_base_that_is_gone_is_named_with_who_names_it_and_only_if_it_is_needed(trained, models):
    settings = Settings(model=trained("/gone/base"))
    with pytest.raises(ValueError, match=r"^`base_model` '/gone/base'.* .*training_args.json names it\.$"):
        parse_variant("sdedit", settings).method_class(models).load(settings)
    assert parse_variant("iedit", settings).models == (settings.model,)


def test_a_model_of_another_family_is_told_how_it_is_compared(trained, models, tmp_path):
    for number, base in enumerate(("mini-sd3", str(write_sdxl_base(tmp_path / "sdxl")))):
        settings = Settings(model=trained(base, f"runs/{number}"))
        assert settings.base_model == base
        with pytest.raises(ValueError, match=rf"`base_model` '{base}' is a .* edits as editor:{base}\."):
            parse_variant("sdedit", settings).method_class(models).load(settings)


# A whole evaluation


class Sources(Method):
    """Gives the sources back: a method of a user's own. It fails, or gives nonsense, for the prompts named here."""

    title = "Sources"
    fails: set[str] = set()
    gives = None

    def __call__(self, examples, settings, generators):
        if any(example.edit_prompt in self.fails for example in examples):
            raise RuntimeError("no idea what this\nmeans")
        if self.gives is not None:
            return [self.gives] * len(examples)
        return [example.image for example in examples]


ARGUMENTS = (
    "--data",
    "mini",
    "--model",
    "mini",
    "--split",
    "choose",
    "--num-examples",
    "3",
    "--steps",
    "4",
    "--batch-size",
    "2",
)


def is_listening(port):
    with socket.socket() as other:
        return other.connect_ex(("127.0.0.1", port)) == 0


def run(output_dir, *arguments, methods="sdedit,iedit-m"):
    return main(["evaluate", "--output_dir", str(output_dir), "--methods", methods, *ARGUMENTS, *map(str, arguments)])


def read(output_dir):
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    methods = "sdedit,iedit-m,test_evaluate:Sources"
    assert run(output_dir, "--strengths", "0.3,0.9", "--num-curve-examples", 2, methods=methods) == 0
    return output_dir


def test_options_are_spelled_with_hyphens_or_underscores_and_steps_in_two_ways():
    common = ["evaluate", "--data", "a_set", "--output-dir=out_1"]
    expected = build_parser().parse_args([*common, "--steps", "7", "--base-model", "my_base"])
    for steps in ("--num-inference-steps", "--num_inference_steps"):
        assert build_parser().parse_args([*common, f"{steps}=7", "--base_model", "my_base"]) == expected
    edit = ["edit", "in_1.png", "a_prompt", "-o", "out_1.png"]
    found = build_parser().parse_args([*edit, "--num_inference_steps", "7", "--mask_prompt", "a_car"])
    assert found == build_parser().parse_args([*edit, "--steps", "7", "--mask-prompt", "a_car"])
    assert (str(found.image), found.prompt, found.mask_prompt) == ("in_1.png", "a_prompt", "a_car")


def test_results_hold_every_example_and_what_was_set(finished):
    results = read(finished)
    assert [example["key"] for example in results["examples"]] == [
        f"{group}-{number:04}" for group in ("real", "generated") for number in range(3)
    ]
    assert results["settings"]["num_inference_steps"] == 4
    assert results["settings"]["base_model"] == "mini-base"
    assert results["baseline"] == "sdedit"
    assert {"diffusers", "torch"} <= results["versions"].keys()
    assert set(results["hashes"]["models"]) == {"mini", "mini-base"}
    for example in results["examples"]:
        for variant in ("sdedit", "iedit-m", "test_evaluate:Sources"):
            assert 0 <= example["results"][variant]["clip_score"] <= 2.5


def test_sources_given_back_are_measured_as_such(finished):
    results = read(finished)
    for example in results["examples"]:
        found = example["results"]["test_evaluate:Sources"]
        assert found["background_equal"] == found["ssim_not_m"] == 1
        assert found["success"] == 0
    assert results["summary"]["all"]["test_evaluate:Sources"]["fid"]["value"] == pytest.approx(0, abs=1e-3)
    difference = results["summary"]["all"]["iedit-m"]["ssim_not_m"]["difference"]
    assert difference["mean"] > 0


def test_the_pictures_lie_beside_the_results(finished):
    results = read(finished)
    for example in results["examples"]:
        for folder in ("source", "mask", *(variant["slug"] for variant in results["variants"].values())):
            if "strength" not in folder or example["key"].endswith(("0000", "0001")):
                with Image.open(finished / "images" / folder / f"{example['key']}.png") as image:
                    assert image.size == (64, 64)
    assert len(list((finished / "images/target").iterdir())) == 3


def test_curves_have_each_strength_on_the_first_examples(finished):
    results = read(finished)
    curves = {name for name in results["variants"] if "@" in name}
    assert curves == {f"{m}@strength={s}" for m in ("sdedit", "iedit-m", "test_evaluate:Sources") for s in (0.3, 0.9)}
    for example in results["examples"]:
        assert (curves <= example["results"].keys()) == (not example["key"].endswith("0002"))


def test_tables_and_page_name_the_methods(finished):
    for file in ("results.md", "index.html"):
        text = (finished / file).read_text()
        assert "SDEdit" in text
        assert "iEdit-M" in text


def test_called_again_it_does_nothing_and_says_the_same_and_where_the_page_is(finished, capsys):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.png")}
    content = (finished / "results.json").read_text()
    methods = "sdedit,iedit-m,test_evaluate:Sources"
    assert run(finished, "--strengths", "0.3,0.9", "--num-curve-examples", 2, methods=methods) == 0
    assert (finished / "results.json").read_text() == content
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*.png")} == before
    said = capsys.readouterr().out
    assert said.startswith(f"{finished / 'index.html'}: ")
    assert said.endswith(" s, the page with the edits, plots and tables\n")


def test_a_method_and_a_metric_can_be_added(tmp_path):
    assert run(tmp_path / "out", "--metrics", "clip_score", methods="test_evaluate:Sources") == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}
    assert run(tmp_path / "out", "--metrics", "clip_score,psnr", methods="test_evaluate:Sources,sdedit") == 0
    for example in read(tmp_path / "out")["examples"]:
        assert [sorted(found) for found in example["results"].values()] == [["clip_score", "psnr"]] * 2
    assert before.items() <= {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}.items()


def test_pairs_of_the_builder_are_evaluated(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", make_rows(3))
    others = ("--model", "mini", "--steps", "4", "--networks", "clip=mini,fid=mini,lpips=mini,dino=mini")
    argv = [
        "evaluate",
        "--data",
        str(pairs),
        "--output-dir",
        str(tmp_path / "out"),
        "--methods",
        "sdedit,iedit-m",
        *others,
    ]
    assert main(argv) == 0
    results = read(tmp_path / "out")
    assert len(results["examples"]) == 3
    assert "success" not in results["summary"]["all"]["iedit-m"]


# What fails


def test_a_picture_on_which_a_method_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    prompts = [example.edit_prompt for example in load_examples("mini", "choose")[:2]]
    monkeypatch.setattr(Sources, "fails", {prompts[1]})
    methods = "sdedit,test_evaluate:Sources"
    assert run(tmp_path / "out", methods=methods) == 1
    assert "1 edits failed" in capsys.readouterr().err
    found = {example["key"]: example["results"] for example in read(tmp_path / "out")["examples"]}
    assert found["real-0001"]["test_evaluate:Sources"] == {"error": "RuntimeError: no idea what this means"}
    # Its neighbour in the batch too is edited.
    assert found["real-0000"]["test_evaluate:Sources"]["background_equal"] == 1
    assert sum("error" in values for results in found.values() for values in results.values()) == 1
    assert "no idea what this means" in (tmp_path / "out/results.md").read_text()

    # Once the cause is gone, calling again mends it.
    monkeypatch.setattr(Sources, "fails", set())
    assert run(tmp_path / "out", methods=methods) == 0


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (Image.new("RGB", (32, 32)), "RGB \\(64, 64\\), got RGB \\(32, 32\\)"),
        (Image.new("L", (64, 64)), "got L \\(64, 64\\)"),
        (np.zeros((64, 64, 3)), "got ndarray"),
    ],
)
def test_what_is_no_edited_picture_is_an_error_of_its_own(tmp_path, monkeypatch, gives, message):
    monkeypatch.setattr(Sources, "gives", gives)
    assert run(tmp_path / "out", "--num-examples", 1, methods="sdedit,test_evaluate:Sources") == 1
    for example in read(tmp_path / "out")["examples"]:
        assert example["results"]["test_evaluate:Sources"].keys() == {"error"}
        with pytest.raises(ValueError, match=message):
            raise ValueError(example["results"]["test_evaluate:Sources"]["error"])


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("iedit@model", "FloatingPointError: The denoised latents hold NaN or infinity in result 0 of 1"),
        (
            "sdedit@base_model",
            "FloatingPointError: the edited image holds NaN or infinity; float32 or bfloat16 may help",
        ),
    ],
)
def test_a_model_that_gives_no_numbers_fails_on_every_picture_and_the_others_go_on(tmp_path, variant, message):
    pipe = Models().load(IEditPipeline, "mini-base")
    pipe.unet.conv_out.bias.data[0] = float("nan")
    pipe.save_pretrained(tmp_path / "nan")
    assert run(tmp_path / "out", methods=f"sdedit,{variant}={tmp_path / 'nan'}") == 1
    for example in read(tmp_path / "out")["examples"]:
        sound, broken = example["results"].values()
        assert broken.keys() == {"error"}
        assert broken["error"].startswith(message)
        assert "clip_score" in sound


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "sdedit,dall-e"), "There is no method 'dall-e'. There are sdedit,"),
        (("--metrics", "beauty"), "There is no metric beauty. There are success,"),
        (("--data", "nowhere"), "nowhere"),
        (("--split", "validation"), "`split` of the mini benchmark has to be one of test, choose"),
        (("--base-model", "no-such-model"), "--base-model 'no-such-model': there is no such folder or model"),
        (("--methods", "iedit@model=mini-bass"), "`model` 'mini-bass': there is no such folder or model"),
        (("--networks", "clip=no-such-clip"), "The network for clip: `model` 'no-such-clip': there is no such folder"),
        (("--networks", "clip"), "argument --networks: has to be PART=NAME, as in clip=mini"),
        (("--strength", "0"), "has to be above 0 and at most 1"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, capsys, arguments, message):
    try:
        code = run(tmp_path / "out", *arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("iedit evaluate: error: ")
    assert message in printed
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "no rows|no data"),
        (lambda rows: rows[1].update(source_mask=Image.new("L", (64, 64))), "row 1.*black"),
        (lambda rows: rows[1].update(source_mask=Image.new("L", (32, 64), 255)), "row 1.*32 x 64"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(tmp_path, capsys, change, message):
    rows = make_rows(3)
    change(rows)
    pairs = write_pairs(tmp_path / "pairs", rows)
    assert run(tmp_path / "out", "--data", pairs, "--split", "train") == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)


def test_pairs_without_masks_are_refused(tmp_path, capsys):
    rows = make_rows(3)
    pairs = write_pairs(tmp_path / "pairs", rows, [name for name in rows[0] if name != "source_mask"])
    assert run(tmp_path / "out", "--data", pairs, "--split", "train") == 2
    assert "column `source_mask` is missing" in capsys.readouterr().err


def test_a_folder_of_another_configuration_names_every_difference_and_stays(finished, capsys):
    content = (finished / "results.json").read_text()
    assert run(finished, "--steps", 5, "--seed", 7, "--num-curve-examples", 2) == 2
    printed = capsys.readouterr().err
    assert "num_inference_steps was 4 and is 5" in printed
    assert "seed was 0 and is 7" in printed
    assert printed.count(" was ") == 2
    assert (finished / "results.json").read_text() == content


def test_a_model_whose_weights_have_changed_needs_another_folder(tmp_path, capsys):
    pipe = Models().load(IEditPipeline, "mini-base")
    pipe.save_pretrained(tmp_path / "model")
    method = f"iedit@model={tmp_path / 'model'}"
    assert run(tmp_path / "out", methods=method) == 0
    pipe.unet.conv_out.bias.data += 0.1
    pipe.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "out", methods=method) == 2
    assert f"the weights of {tmp_path / 'model'} have changed" in capsys.readouterr().err


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("all of it")
    assert run(tmp_path) == 2
    assert "is not empty, and what it holds is no evaluation" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def again(finished, tmp_path):
    """Cuts a file of a finished evaluation off, or gives it this content, and calls the evaluation again."""

    def call(name, content=None):
        shutil.copytree(finished, tmp_path / "out")
        file = tmp_path / "out" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
        methods = "sdedit,iedit-m,test_evaluate:Sources"
        return run(tmp_path / "out", "--strengths", "0.3,0.9", "--num-curve-examples", 2, methods=methods)

    return call


@pytest.mark.parametrize("content", [None, b""])
def test_a_batch_that_was_cut_off_is_worked_off_again(finished, tmp_path, again, content):
    assert again("batches/iedit-m/000000.json", content) == 0
    assert read(tmp_path / "out") == read(finished)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("images/source/real-0000.png", None),
        ("images/iedit-m/real-0000.png", b""),
    ],
)
def test_a_damaged_file_of_an_evaluation_is_named(tmp_path, again, capsys, name, content):
    assert again(name, content) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"iedit evaluate: error: {tmp_path / 'out' / name} is damaged")
    assert last.endswith("take another folder.")


@pytest.mark.parametrize("guidance_scale", ["nan", "inf"])
def test_a_guidance_scale_that_is_no_finite_number_is_refused(tmp_path, capsys, guidance_scale):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--guidance-scale", guidance_scale)
    assert "argument --guidance-scale: has to be a finite number" in capsys.readouterr().err


class Unforeseen(Sources):
    """Fails where nobody expects a method to."""

    def __init__(self, models):
        raise ZeroDivisionError("half of\nnothing")


def test_what_nobody_foresaw_is_one_line_too(tmp_path, capsys):
    assert run(tmp_path / "out", methods="test_evaluate:Unforeseen") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("iedit evaluate: error: ZeroDivisionError: half of nothing (test_evaluate.py, line ")
    assert line.endswith("). Run the same command again to go on.")


class Talks(Sources):
    """Logs a line an edit, as libraries do."""

    def __call__(self, *args):
        logging.getLogger("diffusers.some.pipeline").warning("The prompt was cut off.")
        return super().__call__(*args)


def test_what_is_logged_stands_on_lines_of_its_own(tmp_path, capfd, caplog):
    # A training in the same process has silenced it.
    caplog.set_level("WARNING", logger="diffusers")
    assert run(tmp_path / "out", methods="test_evaluate:Talks") == 0
    written = capfd.readouterr().err
    # What a terminal shows: a return to the start of the line writes over what stands there.
    shown = [line.rsplit("\r", 1)[-1].rstrip() for line in written.split("\n")]
    assert shown.count("The prompt was cut off.") == written.count("The prompt was cut off.") == 3


# Stopped, killed, twice at once, and in several processes


def test_two_evaluations_do_not_write_to_one_folder(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out", "evaluation"):
        assert run(tmp_path / "out") == 2
    message = f"Another evaluation is at work on {tmp_path / 'out'}: wait for it, or choose another folder."
    assert capsys.readouterr().err.splitlines()[-1] == f"iedit evaluate: error: {message}"
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_of_two_evaluations_with_several_processes_one_ends_whole(tmp_path):
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out", "evaluation"):
        assert [process.exitcode for process in start_two(tmp_path / "out")] == [2, 1]
    assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


class Waits(Sources):
    """Says that it is at work, and does not come back."""

    def __call__(self, *args):
        Path("at-work").touch()
        time.sleep(100)


@pytest.mark.parametrize(
    ("number", "name", "waits_for"), [(signal.SIGINT, "Ctrl-C", "an edit"), (signal.SIGTERM, "SIGTERM", "a process")]
)
def test_a_signal_ends_it_within_seconds_and_it_says_how_to_go_on(tmp_path, number, name, waits_for):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment, port = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, free_port()
    if waits_for == "a process":
        # Which is never started. PyTorch waits for it in C++, where no handler of Python's is called.
        environment |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "diffusers_iedit.cli", "evaluate", "--output-dir", "out", *ARGUMENTS]
    command += ["--methods", "test_evaluate:Waits"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    if waits_for == "an edit":
        while not (tmp_path / "at-work").exists():
            assert process.poll() is None
            time.sleep(0.1)
    else:
        # As soon as it listens for the other one.
        while not is_listening(int(port)):
            assert process.poll() is None
            time.sleep(0.1)
    process.send_signal(number)
    start = time.monotonic()
    _, written = process.communicate()
    assert time.monotonic() - start < 5
    assert process.returncode == 128 + number
    last = f"iedit evaluate: stopped by {name}. Run the same command again to go on."
    assert written.splitlines()[-1] == last


def in_a_process(output_dir, environment={}, kill_at=None):
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kill_at is not None:
        original, seen = Image.Image.save, 0

        def save(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        Image.Image.save = save
    sys.exit(run(output_dir))


def start(*args):
    process = multiprocessing.get_context("spawn").Process(target=in_a_process, args=args)
    process.start()
    return process


def start_two(output_dir):
    """Two processes of one evaluation, when both have ended."""
    processes = [start(output_dir, environment) for environment in two_ranks()]
    for process in processes:
        process.join(300)
    return processes


def same_results(one, other):
    assert (one / "results.json").read_text() == (other / "results.json").read_text()
    assert [file.name for file in one.rglob(".*")] == [".lock"]
    assert not [*one.rglob("*.partial")]
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed") / "out"
    process = start(output_dir)
    process.join()
    assert process.exitcode == 0
    return output_dir


# While the sources are written, in the first batch of edits, and in a later one.
@pytest.mark.parametrize("kill_at", [17, *(pytest.param(at, marks=pytest.mark.slow) for at in (5, 24))])
def test_killed_and_called_again_it_gives_the_same_results(tmp_path, undisturbed, kill_at):
    process = start(tmp_path / "out", {}, kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out/results.json").exists()
    process = start(tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert same_results(tmp_path / "out", undisturbed)


def test_two_processes_share_the_work_and_give_the_same_results(tmp_path, undisturbed):
    assert [process.exitcode for process in start_two(tmp_path / "out")] == [0, 0]
    assert same_results(tmp_path / "out", undisturbed)
