"""train_iedit.py: what a training leaves, which weights it changes, its options, and bad input."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderTiny,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.optimization import SchedulerType
from hub_server import TOKEN, USER, files_in
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pairs import (
    SCRIPT,
    UNET,
    arguments,
    command,
    losses,
    make_rows,
    same_end,
    train,
    train_iedit,
    weights,
    write_base,
    write_pairs,
    write_sd3_base,
    write_sdxl_base,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_iedit import IEditPipeline, cli, mini
from diffusers_iedit.finetuning.data import open_pairs
from diffusers_iedit.finetuning.families import (
    FAMILIES,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    find_family,
    load_base,
    load_family,
)
from diffusers_iedit.finetuning.models import parameter_groups
from diffusers_iedit.finetuning.options import LOSS_TERMS, LR_SCHEDULERS, PRESETS, TRAIN_BLOCKS, parse_args
from diffusers_iedit.losses import IEditLoss
from diffusers_iedit.pairs.schema import FEATURES, OPTIONAL, validate


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("made") / "pairs", make_rows())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("made") / "base")


def four_steps(tmp_path_factory, pairs, base, *options):
    output_dir = tmp_path_factory.mktemp("trained") / "model"
    train(arguments(pairs, base, output_dir, "--checkpointing_steps", 1, *options))
    return output_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pairs, base):
    """Four steps with the default objective, and a checkpoint after each: not to be changed."""
    return four_steps(tmp_path_factory, pairs, base)


@pytest.fixture(scope="module")
def sd3_base(tmp_path_factory):
    return write_sd3_base(tmp_path_factory.mktemp("made") / "sd3-base")


@pytest.fixture(scope="module")
def sd3_plain(tmp_path_factory, pairs, sd3_base):
    """As `plain`, of a Stable Diffusion 3: not its LoRA but its blocks themselves."""
    return four_steps(tmp_path_factory, pairs, sd3_base, "--lora_rank", 0)


def changed(one, other):
    """The names of the weights that differ."""
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def close(one, other, base, tolerance=0.002):
    """Whether two trainings have the same losses and, next to what they changed in the base, the same weights."""
    for line, expected in zip(losses(one), losses(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-3)
    trained, expected, before = weights(one), weights(other), weights(base)
    # Adam takes full steps from the smallest gradients, so single weights may well differ.
    difference = sum((trained[name] - values).square().sum() for name, values in expected.items()).sqrt()
    return (
        difference
        < tolerance * sum((before[name] - values).square().sum() for name, values in expected.items()).sqrt()
    )


def lora_edits_as_the_pipeline_it_lies_beside(pipeline_class, output_dir, base, atol):
    edits = []
    for folder, lora in ((output_dir, None), (base, output_dir / "lora"), (base, None)):
        pipe = pipeline_class.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(lora)
        what = {"image": make_rows(1)[0]["source_image"], "prompt": "a blue car", "output_type": "np"}
        edits.append(pipe(**what, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images)
    np.testing.assert_allclose(edits[0], edits[1], atol=atol)
    assert np.abs(edits[0] - edits[2]).max() > 1e-2


def all_but_the_trained_model_is_the_base_s(pipeline_class, output_dir, base):
    assert json.loads((output_dir / "model_index.json").read_text())["_class_name"] == pipeline_class.__name__
    ours, theirs = map(pipeline_class.from_pretrained, (output_dir, base))
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert changed(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict()) == set()
    assert ours.scheduler.config == theirs.scheduler.config


def the_grid_of_a_pair_keeps_what_lies_outside_its_mask(pairs, base, output_dir):
    options = ("--max_train_steps", 1, "--loss", "ldm", "--num_validation_pairs", 1, "--num_inference_steps", 2)
    train(arguments(pairs, base, output_dir, *options))
    # Source, mask, SDEdit, iEdit and iEdit-M, which keeps it.
    pixels = np.asarray(Image.open(output_dir / "images/step-000001.png")).astype(int)
    source, mask, _, _, masked = np.split(pixels, 5, axis=1)
    np.testing.assert_array_equal(masked[mask == 0], source[mask == 0])


# A training of the mini model


@pytest.fixture(scope="module")
def mini_model(tmp_path_factory, pairs):
    """What a training with the mini model leaves, with everything it reports."""
    output_dir = tmp_path_factory.mktemp("mini") / "model"
    options = ("--max_train_steps", 2, "--resolution", 64, "--num_validation_pairs", 2, "--num_inference_steps", 3)
    train(arguments(pairs, "mini", output_dir, *options, "--validation_steps", 1, "--report_to", "tensorboard"))
    return output_dir


def test_a_training_of_the_mini_model_leaves_a_pipeline_that_edits(mini_model):
    pipe = IEditPipeline.from_pretrained(mini_model)
    pipe.set_progress_bar_config(disable=True)
    scene = mini.render(300_000, things=1)
    edited = pipe(scene.image, "a red car on green grass", mask_image=scene.mask, num_inference_steps=3).images[0]
    assert edited.size == (64, 64)
    assert np.any(np.asarray(edited) != np.asarray(scene.image))


def test_only_the_input_and_middle_blocks_of_the_unet_differ_from_the_base(mini_model):
    base = mini.model_path()
    ours, theirs = IEditPipeline.from_pretrained(mini_model), IEditPipeline.from_pretrained(base)
    for name, component in theirs.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        different = changed(getattr(ours, name).state_dict(), component.state_dict())
        if name != "unet":
            assert different == set(), name
            continue
        parts = {name.split(".")[0] for name in different}
        assert parts == {"conv_in", "down_blocks", "mid_block"}


def test_the_rest_of_the_pipeline_is_the_base_s(mini_model):
    ours, theirs = files_in(mini_model), files_in(mini.model_path())
    assert json.loads(ours["model_index.json"]) == json.loads(theirs["model_index.json"])
    for path in ("scheduler/scheduler_config.json", "unet/config.json", "tokenizer/tokenizer.json"):
        ours_, theirs_ = json.loads(ours[path]), json.loads(theirs[path])
        for config in (ours_, theirs_):
            config.pop("_diffusers_version", None)
            config.pop("_name_or_path", None)
        assert ours_ == theirs_
    assert {"pipeline.py", "masking_iedit.py", "scheduling_iedit.py"} <= ours.keys()


def test_the_end_leaves_card_curve_arguments_and_grids(mini_model, pairs):
    assert "2" in (mini_model / "README.md").read_text()
    settings = json.loads((mini_model / "training_args.json").read_text())
    assert settings["train_data"] == str(pairs)
    assert (settings["max_train_steps"], settings["clip_model"]) == (2, "mini")
    with Image.open(mini_model / "loss.png") as curve:
        assert curve.width > curve.height
    assert sorted(file.name for file in (mini_model / "images").iterdir()) == ["step-000001.png", "step-000002.png"]
    assert "images/step-000002.png" in (mini_model / "README.md").read_text()
    assert not [path for path in mini_model.rglob("*") if "partial" in path.name]


def test_each_term_is_a_curve_of_its_own_in_tensorboard(mini_model):
    events = EventAccumulator(str(mini_model / "logs/iedit"), {"images": 0, "scalars": 0}).Reload()
    curves = {"loss", "loss/loc", "loss/global", "loss/mask", "loss/perc", "learning_rate"}
    assert curves == set(events.Tags()["scalars"])
    for line in losses(mini_model):
        for curve in curves:
            (seen,) = [event.value for event in events.Scalars(curve) if event.step == line["step"]]
            assert seen == pytest.approx(line[curve.removeprefix("loss/")], rel=1e-5)
    assert [image.step for image in events.Images("validation")] == [1, 2]


def grid(file, row):
    """The pictures of one row of a grid: source, mask, SDEdit, iEdit, iEdit-M."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert pixels.shape[1] == 5 * 64
    return np.split(pixels[64 * row : 64 * (row + 1)], 5, axis=1)


def test_a_grid_has_a_row_for_each_pair_and_shows_what_it_says(mini_model):
    rows = make_rows(2)
    for number, row in enumerate(rows):
        source, mask, sdedit, iedit, masked = grid(mini_model / "images/step-000001.png", number)
        later = grid(mini_model / "images/step-000002.png", number)
        np.testing.assert_array_equal(source, row["source_image"])
        np.testing.assert_array_equal(mask[..., 0], row["source_mask"])
        # The base's edit stays as it was before the training, and the model's moves away from it.
        np.testing.assert_array_equal(sdedit, later[2])
        assert np.any(iedit != sdedit)
        assert np.any(iedit != later[3])
        np.testing.assert_array_equal(masked[mask == 0], source[mask == 0])
        assert np.any(masked != source)
    assert Image.open(mini_model / "images/step-000001.png").height == 2 * 64


def test_the_grid_starts_at_the_base(tmp_path, pairs):
    """With weights that cannot move, iEdit is SDEdit: the noise is the same."""
    options = ("--max_train_steps", 1, "--resolution", 64, "--num_validation_pairs", 1, "--num_inference_steps", 2)
    train(arguments(pairs, "mini", tmp_path / "model", *options, "--learning_rate", 0))
    _, _, sdedit, iedit, _ = grid(tmp_path / "model/images/step-000001.png", 0)
    np.testing.assert_array_equal(sdedit, iedit)


def test_an_evaluation_at_the_end_fills_the_card(tmp_path, pairs):
    others = ("--evaluation_data", pairs, "--num_evaluation_examples", 2, "--num_inference_steps", 2)
    options = ("--max_train_steps", 1, "--resolution", 64, "--loss", "mask", *others)
    train(arguments(pairs, "mini", tmp_path / "model", *options))
    card = (tmp_path / "model/README.md").read_text()
    assert "Means over 2 examples, with 95 % bootstrap intervals; strength 0.7" in card
    results = json.loads((tmp_path / "model/evaluation/step-000001/results.json").read_text())
    for variant, title in (("sdedit", "SDEdit"), ("iedit", "iEdit"), ("iedit-m", "iEdit-M")):
        mean = results["summary"]["all"][variant]["clip_score"]["mean"]
        assert re.search(rf"^\| {title} \| {mean:.3f} \\?\[", card, re.MULTILINE)


def test_evaluation_data_that_is_not_there_is_an_error_before_the_training(tmp_path, pairs, base, capsys):
    message = error(arguments(pairs, base, tmp_path / "model", "--evaluation_data", "pie-bench:nowhere"), capsys)
    assert message.startswith("nowhere is no PIE-Bench folder")
    assert not (tmp_path / "model/losses.csv").exists()


def test_evaluation_data_with_a_bad_row_is_an_error_before_the_training(tmp_path, pairs, base, capsys):
    rows = make_rows()
    rows[10]["source_mask"] = Image.new("L", (64, 64))
    data = write_pairs(tmp_path / "data", rows)
    message = error(arguments(pairs, base, tmp_path / "model", "--evaluation_data", data), capsys)
    assert re.search("(?i)row 10.* black", message)
    assert not (tmp_path / "model/losses.csv").exists()


def test_an_evaluation_that_fails_leaves_the_model_with_its_card_and_says_so(tmp_path, pairs, base):
    output_dir = tmp_path / "model"
    options = ("--max_train_steps", 1, "--loss", "ldm", "--evaluation_data", pairs, "--push_to_hub")
    failing = mock.patch("small_pairs.train_iedit.evaluate_model", side_effect=KeyError("lpips"))
    hub = mock.patch("small_pairs.train_iedit.check_hub", return_value="me/model")
    with failing, hub, pytest.raises(RuntimeError) as failed:
        train(arguments(pairs, base, output_dir, *options))
    said = str(failed.value)
    assert said.startswith(f"KeyError: 'lpips'. The model in {output_dir} is whole. What is left: iedit evaluate ")
    assert said.endswith(f"; python -m diffusers_iedit.finetuning.hub {output_dir} me/model")
    assert "ldm" in (output_dir / "README.md").read_text()
    IEditPipeline.from_pretrained(output_dir)


def test_the_command_that_evaluates_a_finished_model_does_what_the_training_would_have(tmp_path, pairs):
    others = ("--evaluation_data", pairs, "--num_evaluation_examples", 1, "--num_inference_steps", 2)
    options = ("--max_train_steps", 1, "--loss", "ldm", *others)
    argv = arguments(pairs, "mini-base", tmp_path / "model", *options)
    train(argv)
    results = tmp_path / "model/evaluation/step-000001/results.json"
    before = json.loads(results.read_text())
    cli.main(shlex.split(train_iedit.evaluation_command(parse_args(argv), StableDiffusion))[1:])
    # Of the same settings, or the folder would be refused.
    assert json.loads(results.read_text())["summary"] == before["summary"]


# What is saved


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(tmp_path, pairs, base):
    before = os.umask(0o027)
    try:
        options = ("--lora_rank", 2, "--use_ema", "--cache_latents", "--checkpointing_steps", 1)
        train(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 1, *options))
        IEditPipeline.from_pretrained(base).save_pretrained(tmp_path / "saved")
        mini_run = runpy.run_path(str(SCRIPT.parent / "mini/common.py"))["Run"]
        with mini_run.finished(SimpleNamespace(folder=tmp_path), "part") as folder:
            save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    finally:
        os.umask(before)
    for folder, count in (("model", 9), ("saved", 3), ("part", 1)):
        files = [file for file in (tmp_path / folder).rglob("*") if file.suffix in (".safetensors", ".bin", ".pkl")]
        assert len(files) >= count
        assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {
            file.name: "0o640" for file in files
        }


def test_stock_diffusers_opens_what_is_saved_without_a_word(plain):
    code = f"import diffusers; diffusers.StableDiffusionImg2ImgPipeline.from_pretrained({str(plain)!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ignored" not in process.stderr
    IEditPipeline.from_pretrained(plain)


# The command


def test_a_run_says_where_the_model_is_and_nothing_that_is_no_news(tmp_path, pairs, base):
    argv = arguments(pairs, base, tmp_path / "model", "--max_train_steps", 1, "--loss", "ldm")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "torchvision" not in process.stderr
    said = f"The model is in {tmp_path}/model. To edit with it: iedit edit PICTURE PROMPT --model {tmp_path}/model "
    assert said in process.stderr.splitlines()[-1]


def test_to_import_the_pipeline_says_nothing():
    code = "import diffusers_iedit; diffusers_iedit.IEditPipeline"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr == ""


def test_help_comes_before_the_libraries_and_shows_the_defaults_that_are_values():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    assert not re.search(r"\| +(torch|transformers|diffusers|datasets|accelerate)$", process.stderr, re.MULTILINE)
    text = " ".join(process.stdout.split())
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    assert "--learning_rate LEARNING_RATE of Adam (default: 0.0002)" in text


def test_the_choices_are_those_of_the_libraries():
    assert set(LOSS_TERMS) == set(IEditLoss.NEEDS)
    assert {kind.value for kind in SchedulerType} - set(LR_SCHEDULERS) == {"piecewise_constant"}


def test_without_a_resolution_a_small_base_is_trained_at_its_own(tmp_path, pairs, caplog):
    options = ("--max_train_steps", 1, "--loss", "ldm")
    argv = arguments(pairs, "mini", tmp_path / "model", *options)
    at = argv.index("--resolution")
    del argv[at : at + 2]
    train(argv)
    assert json.loads((tmp_path / "model/training_args.json").read_text())["resolution"] == 64
    with caplog.at_level("WARNING"):
        train(arguments(pairs, "mini", tmp_path / "larger", *options, "--resolution", 128))
    assert "`resolution` 128 is more than the 64 pixels that mini was made for." in caplog.text


@pytest.mark.slow
def test_mini_pairs_are_right_and_keep_what_is_held_out():
    pairs = open_pairs("mini")
    assert validate(pairs) == []
    assert len(pairs) == 256
    assert not set(pairs["source_caption"]) & set(mini.held_out_captions())
    assert not set(pairs["edit_prompt"]) & set(mini.held_out_captions())
    assert pairs._fingerprint == open_pairs("mini")._fingerprint


# Which weights are trained


def test_steps_train_the_input_and_the_middle_blocks_in_turn(plain, base):
    names = weights(base)
    names = {
        "input": {name for name in names if name.startswith(("conv_in.", "down_blocks."))},
        "middle": {name for name in names if name.startswith("mid_block.")},
    }
    before = {name: values for name, values in weights(base).items() if name in names["input"] | names["middle"]}
    for step, group in enumerate(("input", "middle", "input", "middle"), start=1):
        after = load_file(plain / f"checkpoint-{step}/trained.safetensors")
        assert changed(before, after) == names[group]
        before = after
    assert changed(weights(plain), weights(base)) == names["input"] | names["middle"]


@pytest.mark.parametrize(
    ("train_blocks", "pattern"),
    [
        ("input", r"(conv_in|down_blocks)\."),
        ("middle", r"mid_block\."),
        ("all", r""),
        ("attention", r".*\.attn[12]\."),
    ],
)
def test_train_blocks_chooses_what_is_trained(tmp_path, pairs, base, train_blocks, pattern):
    options = ("--max_train_steps", 2, "--loss", "paired", "--train_blocks", train_blocks)
    train(arguments(pairs, base, tmp_path / "model", *options))
    before = weights(base)
    assert changed(weights(tmp_path / "model"), before) == {name for name in before if re.match(pattern, name)}


def test_the_choices_of_train_blocks_are_those_of_the_families():
    assert set(StableDiffusion.train_blocks) == {"alternate", "input", "middle", "all", "attention"}
    assert StableDiffusionXL.train_blocks == StableDiffusion.train_blocks
    assert set(StableDiffusion3.train_blocks) == {"alternate", "first", "middle", "all", "attention"}
    assert set(TRAIN_BLOCKS) == {choice for family in FAMILIES for choice in family.train_blocks}


# Stable Diffusion 3


def blocks(names):
    """Of the names of weights, which blocks they are in, or else in which part."""
    return {".".join(name.split(".")[: 2 if name.startswith("transformer_blocks.") else 1]) for name in names}


def test_steps_train_the_first_and_the_middle_blocks_of_a_transformer_in_turn(sd3_plain, sd3_base):
    first = {"pos_embed", "time_text_embed", "context_embedder", "transformer_blocks.0"}
    names, before = weights(sd3_base), load_file(sd3_plain / "checkpoint-1/trained.safetensors")
    assert blocks(before) == first | {"transformer_blocks.1"}
    assert blocks(changed(before, {name: names[name] for name in before})) == first
    for step, expected in ((2, {"transformer_blocks.1"}), (3, first), (4, {"transformer_blocks.1"})):
        after = load_file(sd3_plain / f"checkpoint-{step}/trained.safetensors")
        assert blocks(changed(before, after)) == expected
        before = after
    # The last third is the base's, as are the output blocks of a UNet.
    assert blocks(changed(weights(sd3_plain), weights(sd3_base))) == first | {"transformer_blocks.1"}


@pytest.mark.parametrize(
    ("train_blocks", "parts"),
    [
        ("first", r"(pos_embed|time_text_embed|context_embedder|transformer_blocks\.0)\."),
        ("middle", r"transformer_blocks\.1\."),
        ("all", ""),
        ("attention", r"transformer_blocks\.\d\.attn\."),
    ],
)
def test_train_blocks_chooses_what_of_a_transformer_is_trained(sd3_base, train_blocks, parts):
    family = find_family(str(sd3_base))(StableDiffusion3Img2ImgPipeline.from_pretrained(sd3_base))
    (group,) = parameter_groups(family, train_blocks)
    assert group.keys() == {name for name, _ in family.model.named_parameters() if re.match(parts, name)}


@pytest.mark.parametrize(("train_blocks", "rank"), [("alternate", 0), ("middle", 4)])
def test_a_transformer_with_a_single_block_has_no_middle_one(tmp_path, pairs, capsys, train_blocks, rank):
    base = write_sd3_base(tmp_path / "base", layers=1)
    argv = arguments(pairs, base, tmp_path / "model", "--train_blocks", train_blocks, "--lora_rank", rank)
    message = error(argv, capsys)
    assert message == f"`train_blocks` {train_blocks}: the transformer has no such blocks; all trains it."


def test_a_stable_diffusion_3_is_trained_by_lora_unless_told_otherwise(tmp_path, pairs, sd3_base):
    output_dir = tmp_path / "model"
    train(arguments(pairs, sd3_base, output_dir, "--learning_rate", 0.05))
    assert json.loads((output_dir / "training_args.json").read_text())["lora_rank"] == 16
    different = changed(weights(output_dir), weights(sd3_base))
    assert blocks(different) == {"transformer_blocks.0", "transformer_blocks.1"}
    assert all(re.search(r"\.attn\.(to|add)_\w+(\.0)?\.weight$", name) for name in different)

    lora_edits_as_the_pipeline_it_lies_beside(StableDiffusion3Img2ImgPipeline, output_dir, sd3_base, atol=1e-3)


def test_what_is_saved_of_a_stable_diffusion_3_is_its_stock_pipeline_with_a_card(sd3_plain, sd3_base):
    all_but_the_trained_model_is_the_base_s(StableDiffusion3Img2ImgPipeline, sd3_plain, sd3_base)
    assert not list(sd3_plain.glob("*.py"))
    configs = [file.read_text() for file in [*sd3_plain.glob("*/*.json"), *sd3_plain.glob("*.json")]]
    assert not [text for text in configs if str(sd3_base) in text and "train_data" not in text]
    card = (sd3_plain / "README.md").read_text()
    assert "LocalEditor.from_pretrained(repo)" in card
    assert "IEditPipeline" not in card
    assert "sd3-diffusers" in card
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "LocalEditor" in code]
    scene = mini.render(300_000, things=1)
    said = example.replace(f'repo = "{sd3_plain.name}"', f'repo = "{sd3_plain}"').replace(
        'load_image("photo.png"), load_image("mask.png")', "photo, mask"
    )
    said = said.replace("strength=0.7", "strength=0.7, num_inference_steps=2").replace('edited.save("edited.png")', "")
    names = {"photo": scene.image, "mask": scene.mask}
    exec(said, names)
    outside = np.asarray(scene.mask) == 0
    np.testing.assert_array_equal(np.asarray(names["edited"])[outside], np.asarray(scene.image)[outside])


def test_the_text_to_image_pipeline_of_a_stable_diffusion_3_is_a_base_too(tmp_path, pairs, sd3_base):
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(sd3_base)
    parts = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path / "base")
    the_grid_of_a_pair_keeps_what_lies_outside_its_mask(pairs, tmp_path / "base", tmp_path / "model")
    StableDiffusion3Img2ImgPipeline.from_pretrained(tmp_path / "model")


def test_a_stable_diffusion_3_without_its_t5_is_a_base_too(tmp_path):
    StableDiffusion3Img2ImgPipeline(**tiny_models.sd3_components(vae_scale_factor=4)).save_pretrained(
        tmp_path / "base"
    )
    pipe = load_base(str(tmp_path / "base"))
    assert pipe.text_encoder_3 is None
    assert pipe.text_encoder_2 is not None


def test_cached_latents_and_prompts_of_a_stable_diffusion_3_give_the_same_losses(tmp_path, pairs, sd3_base, sd3_plain):
    options = ("--lora_rank", 0, "--cache_latents")
    train(arguments(pairs, sd3_base, tmp_path / "model", *options))
    assert close(tmp_path / "model", sd3_plain, sd3_base)


def test_a_weighting_scheme_weighs_the_losses_on_what_is_predicted_alone(tmp_path, pairs, sd3_base):
    # Both draw timesteps alike; sigma_sqrt also weighs by 1 / sigma^2, which is more than 1.
    for scheme in ("none", "sigma_sqrt"):
        options = ("--max_train_steps", 1, "--lora_rank", 0, "--weighting_scheme", scheme, "--caption_dropout", 0)
        train(arguments(pairs, sd3_base, tmp_path / scheme, *options))
    (plain_line,), (weighted,) = losses(tmp_path / "none"), losses(tmp_path / "sigma_sqrt")
    for term in ("loc", "global", "mask", "perc"):
        assert weighted[term] == pytest.approx(plain_line[term], rel=1e-5)
    assert weighted["loss"] > 1.01 * plain_line["loss"]


# Stable Diffusion XL


@pytest.fixture(scope="module")
def sdxl_base(tmp_path_factory):
    return write_sdxl_base(tmp_path_factory.mktemp("made") / "sdxl-base")


@pytest.fixture(scope="module")
def sdxl_plain(tmp_path_factory, pairs, sdxl_base):
    """As `plain`, of a Stable Diffusion XL: not its LoRA but its blocks themselves."""
    return four_steps(tmp_path_factory, pairs, sdxl_base, "--lora_rank", 0)


def test_what_is_trained_of_a_stable_diffusion_xl_is_its_unet_in_a_stock_pipeline(sdxl_plain, sdxl_base):
    trained = {name.split(".")[0] for name in changed(weights(sdxl_plain), weights(sdxl_base))}
    assert trained == {"conv_in", "down_blocks", "mid_block"}
    all_but_the_trained_model_is_the_base_s(StableDiffusionXLImg2ImgPipeline, sdxl_plain, sdxl_base)
    card = (sdxl_plain / "README.md").read_text()
    assert card.index("A Stable Diffusion XL image-to-image model")
    assert "stable-diffusion-xl-diffusers" in card
    assert "LocalEditor.from_pretrained(repo)" in card


def test_a_stable_diffusion_xl_is_called_as_its_pipeline_calls_it(sdxl_base):
    family = load_family(str(sdxl_base))
    calls, forward = [], family.model.forward

    def listen(*args, **kwargs):
        calls.append((args, kwargs))
        return forward(*args, **kwargs)

    with mock.patch.object(family.model, "forward", listen), torch.no_grad():
        pipe = family.pipe
        pipe.set_progress_bar_config(disable=True)
        pipe("a blue car", image=Image.new("RGB", (48, 32)), strength=0.5, num_inference_steps=2, guidance_scale=3)
        # The pipeline stacks the empty prompt on the other one.
        ((noisy, timestep), theirs) = calls.pop()
        prompt = family.encode_prompts(["", "a blue car"])
        family.predict(family.model, noisy, timestep.repeat(2), **prompt)
    ((_, _, states), ours) = calls.pop()
    torch.testing.assert_close(states, theirs["encoder_hidden_states"])
    for name, values in theirs["added_cond_kwargs"].items():
        torch.testing.assert_close(ours["added_cond_kwargs"][name], values)


def test_an_empty_prompt_of_a_stable_diffusion_xl_is_what_its_config_says(tmp_path, sdxl_base):
    assert not any(values.any() for values in load_family(str(sdxl_base)).encode_prompts([""]).values())
    other = write_sdxl_base(tmp_path / "base", force_zeros_for_empty_prompt=False)
    assert all(values.any() for values in load_family(str(other)).encode_prompts([""]).values())


def test_a_stable_diffusion_xl_is_trained_by_lora_unless_told_otherwise(tmp_path, pairs, sdxl_base):
    output_dir = tmp_path / "model"
    train(arguments(pairs, sdxl_base, output_dir, "--learning_rate", 0.05, "--cache_latents"))
    assert json.loads((output_dir / "training_args.json").read_text())["lora_rank"] == 16
    lora_edits_as_the_pipeline_it_lies_beside(StableDiffusionXLImg2ImgPipeline, output_dir, sdxl_base, atol=1e-3)


@pytest.mark.slow
def test_an_evaluation_of_a_stable_diffusion_xl_names_no_folders_and_can_be_done_of_another_share(
    tmp_path, pairs, sdxl_base
):
    options = ("--max_train_steps", 1, "--loss", "ldm", "--checkpointing_steps", 1, "--evaluation_data", "mini")
    options += ("--num_evaluation_examples", 1, "--num_inference_steps", 1)
    argv = arguments(pairs, sdxl_base, tmp_path / "model", *options)
    train(argv)
    first = (tmp_path / "model/README.md").read_text()
    assert "LocalEditor, given mask (sdxl-base)" in first
    assert "LocalEditor, given mask (model)" in first
    train([*argv, "--base_share", "0.5", "--resume_from_checkpoint", "latest"])
    assert "LocalEditor, given mask (model)" in (tmp_path / "model/README.md").read_text()
    for card in (first, (tmp_path / "model/README.md").read_text()):
        assert str(tmp_path) not in card
        assert str(sdxl_base.parent) not in card
    assert {path.name for path in (tmp_path / "model/evaluation").iterdir()} == {"step-000001", "step-000001-base-0.5"}


def test_the_text_to_image_pipeline_of_a_stable_diffusion_xl_is_a_base_too(tmp_path, pairs, sdxl_base):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_base)
    pipe.save_pretrained(tmp_path / "base")
    the_grid_of_a_pair_keeps_what_lies_outside_its_mask(pairs, tmp_path / "base", tmp_path / "model")


def test_a_training_of_a_stable_diffusion_xl_goes_on_to_the_same_weights(tmp_path, pairs, sdxl_base, sdxl_plain):
    shutil.copytree(sdxl_plain, tmp_path / "model")
    options = ("--lora_rank", 0, "--resume_from_checkpoint", "checkpoint-1")
    train(arguments(pairs, sdxl_base, tmp_path / "model", *options))
    assert same_end(tmp_path / "model", sdxl_plain)


def test_a_stable_diffusion_xl_for_another_task_or_with_other_latents_is_refused(tmp_path, pairs, capsys):
    components = tiny_models.sdxl_components(vae_scale_factor=4)
    config = dict(components["unet"].config) | {"in_channels": 9}
    unet = type(components["unet"]).from_config(config)
    StableDiffusionXLInpaintPipeline(**components | {"unet": unet}).save_pretrained(tmp_path / "inpaint")
    components["vae"].register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path / "playground")
    components = tiny_models.sdxl_components(vae_scale_factor=4) | {"tokenizer_2": None}
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path / "part")
    for name, said in (
        ("inpaint", "its UNet takes 9 channels"),
        ("playground", "its latents are normalised"),
        ("part", "`model` has no tokenizer_2"),
    ):
        assert said in error(arguments(pairs, tmp_path / name, tmp_path / "model"), capsys)


def test_the_vae_of_a_stable_diffusion_xl_stays_in_fp32(tmp_path, pairs, sdxl_base):
    vae = load_family(str(sdxl_base)).pipe.vae
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).latent_dist.mode()
        assert latents.dtype == vae.decode(latents.bfloat16()).sample.dtype == torch.float32
    # Its pipeline casts it, if it is let.
    for count in (0, 1):
        options = ("--mixed_precision", "bf16", "--num_validation_pairs", count, "--num_inference_steps", 2)
        train(arguments(pairs, sdxl_base, tmp_path / str(count), *options, "--max_train_steps", 2))
    assert losses(tmp_path / "1") == losses(tmp_path / "0")
    assert changed(weights(tmp_path / "1"), weights(tmp_path / "0")) == set()


# Pairs of other sizes, and few of them


def vanish(row, name="source_mask"):
    """Makes a mask of one pixel, which is less than a tenth of a latent."""
    row[name] = Image.new("L", (64, 64))
    row[name].putpixel((30, 30), 255)


def test_a_pair_whose_mask_vanishes_has_no_part_in_a_step_and_is_counted(tmp_path, base, caplog):
    rows = make_rows(4)
    for row in rows[:2]:
        vanish(row, "target_mask")
    options = ("--max_train_steps", 6, "--loss", "mask", "--train_batch_size", 1, "--caption_dropout", 0)
    for name, colour in (("model", None), ("other", "black")):
        for row in rows[:2]:
            # What has no part may as well be another picture.
            row["target_image"] = Image.new("RGB", (64, 64), colour) if colour else row["target_image"]
        data = write_pairs(tmp_path / f"{name} pairs", rows)
        with caplog.at_level("WARNING"):
            train(arguments(data, base, tmp_path / name, *options))
    left_out = sum(line["left_out"] for line in losses(tmp_path / "model"))
    assert 2 <= left_out <= 4
    assert f"{left_out:.0f} of 6 samples were left out" in caplog.text
    assert changed(weights(tmp_path / "model"), weights(tmp_path / "other")) == set()
    assert changed(weights(tmp_path / "model"), weights(base))


@pytest.mark.parametrize("options", [(), ("--cache_latents",)])
def test_pairs_whose_masks_all_vanish_are_an_error(tmp_path, base, capsys, options):
    rows = make_rows(3)
    for row in rows:
        vanish(row, "target_mask")
    data = write_pairs(tmp_path / "pairs", rows)
    options = ("--loss", "mask", "--train_batch_size", 2, *options)
    message = error(arguments(data, base, tmp_path / "model", *options), capsys)
    assert "`train_data`: all of the 4 samples of steps 1 to 2 were left out" in message
    assert not (tmp_path / "model/model_index.json").exists()


def test_pairs_whose_masks_all_vanish_are_an_error_in_less_than_an_epoch_and_after_a_stop(tmp_path, base, capsys):
    rows = make_rows(3)
    for row in rows:
        vanish(row)
    data = write_pairs(tmp_path / "pairs", rows)
    options = ("--loss", "mask", "--train_batch_size", 1)
    argv = arguments(data, base, tmp_path / "model", *options, "--max_train_steps", 1)
    assert "all of the 1 samples of steps 1 to 1 were" in error(argv, capsys)
    argv = arguments(data, base, tmp_path / "stopped", *options, "--checkpointing_steps", 2)
    assert "all of the 3 samples of steps 1 to 3 were" in error(argv, capsys)
    argv += ["--resume_from_checkpoint", "latest"]
    assert "all of the 3 samples of steps 1 to 3 were" in error(argv, capsys)


def test_a_training_that_goes_on_remembers_that_a_pair_was_not_left_out(tmp_path, base):
    rows = make_rows(6)
    for row in rows[:3] + rows[4:]:
        vanish(row)
    data = write_pairs(tmp_path / "pairs", rows)
    options = ("--loss", "mask", "--train_batch_size", 1, "--max_train_steps", 14, "--checkpointing_steps", 1)
    train(arguments(data, base, tmp_path / "model", *options))
    used = [line["step"] for line in losses(tmp_path / "model") if not line["left_out"]]
    # Of the six steps after it, which begin within an epoch, none uses it.
    last = int(
        max(step for step in used if step + 7 <= 14 and not set(used) & set(range(int(step) + 1, int(step) + 7)))
    )
    train(arguments(data, base, tmp_path / "model", *options, "--resume_from_checkpoint", f"checkpoint-{last}"))
    assert [line["step"] for line in losses(tmp_path / "model") if not line["left_out"]] == used


@pytest.mark.parametrize("model", ["base", "sdxl_base", "sd3_base"])
def test_one_pair_of_pictures_of_other_aspects_is_enough_for_a_batch_and_for_buckets(tmp_path, model, request):
    row = make_rows(1)[0]
    for side, size in (("source", (96, 48)), ("target", (48, 64))):
        for kind in ("image", "mask"):
            row[f"{side}_{kind}"] = row[f"{side}_{kind}"].resize(size)
    data = write_pairs(tmp_path / "pairs", [row])
    options = (
        "--max_train_steps",
        1,
        "--train_batch_size",
        3,
        "--aspect_ratio_buckets",
        "32,32;24,48",
        "--loss",
        "mask",
    )
    train(arguments(data, request.getfixturevalue(model), tmp_path / "model", *options))
    (line,) = losses(tmp_path / "model")
    assert line["mask"] > 0
    assert line["left_out"] == 0


# The objective


@pytest.mark.parametrize(
    "loss", ["global+paired", "global+ldm+loc", "global+ldm+loc+perc", "loc+global+mask+perc", "ldm", "mask"]
)
def test_a_row_of_table_2_is_trained_by_its_name_and_each_term_is_logged(tmp_path, pairs, base, loss):
    train(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 2, "--loss", loss))
    lines = losses(tmp_path / "model")
    assert [line["step"] for line in lines] == [1, 2]
    assert list(lines[0]) == ["step", "loss", *loss.split("+"), "learning_rate", "left_out"]
    assert all(line[term] > 0 for line in lines for term in loss.split("+"))
    assert changed(weights(tmp_path / "model"), weights(base))


def test_terms_that_two_rows_share_start_with_the_same_values(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 1, "--loss", "global+ldm+loc"))
    (line,) = losses(tmp_path / "model")
    for term in ("global", "loc"):
        assert line[term] == pytest.approx(losses(plain)[0][term], rel=1e-5)


def test_lambda_perc_weighs_the_perceptual_loss(tmp_path, pairs, base):
    first = []
    for weight in (0.0, 1.0, 3.0):
        options = ("--max_train_steps", 1, "--lambda_perc", weight, "--caption_dropout", 0)
        train(arguments(pairs, base, tmp_path / f"{weight}", *options))
        first += losses(tmp_path / f"{weight}")
    assert len({line["perc"] for line in first}) == 1
    assert first[1]["loss"] - first[0]["loss"] == pytest.approx(first[0]["perc"], rel=1e-3)
    assert first[2]["loss"] - first[0]["loss"] == pytest.approx(3 * first[0]["perc"], rel=1e-3)


def test_background_weight_and_overlap_change_the_masked_loss_alone(tmp_path, pairs, base, plain):
    options = {"heavier": ("--background_weight", 3), "overlap": ("--overlap_masks",)}
    without = losses(plain)[0]
    for name, option in options.items():
        train(arguments(pairs, base, tmp_path / name, "--max_train_steps", 1, *option))
        (line,) = losses(tmp_path / name)
        assert all(line[term] == pytest.approx(without[term], rel=1e-5) for term in ("loc", "global", "perc"))
    assert losses(tmp_path / "heavier")[0]["mask"] > 1.1 * without["mask"]
    assert losses(tmp_path / "overlap")[0]["mask"] < 0.99 * without["mask"]


def test_below_min_edit_timestep_the_source_is_trained_on_its_own_caption(tmp_path, pairs, base):
    rows = make_rows()
    for row in rows:
        row["target_image"], row["edit_prompt"] = row["source_image"], "a purple cow"
    other = write_pairs(tmp_path / "pairs", rows)
    for name, data, limit in (("all", pairs, 1000), ("others", other, 1000), ("none", pairs, 0), ("some", pairs, 500)):
        options = ("--loss", "paired", "--caption_dropout", 0, "--min_edit_timestep", limit)
        train(arguments(data, base, tmp_path / name, *options))
    # Where no sample is an edit, the target and its prompt do not matter.
    assert changed(weights(tmp_path / "all"), weights(tmp_path / "others")) == set()
    for name in ("none", "some"):
        assert changed(weights(tmp_path / "all"), weights(tmp_path / name))
    assert changed(weights(tmp_path / "none"), weights(tmp_path / "some"))


def test_a_preset_gives_other_defaults_and_options_prevail(tmp_path, pairs, base):
    argv = arguments(pairs, base, tmp_path / "model", "--preset", "tuned", "--snr_gamma", 7, "--max_train_steps", 1)
    train(argv)
    settings = json.loads((tmp_path / "model/training_args.json").read_text())
    for name, value in PRESETS["tuned"].items():
        assert settings[name] == (7 if name == "snr_gamma" else value)
    assert PRESETS["paper"] == {}


@pytest.mark.parametrize("option", ["--steps", "--num_inference_steps"])
def test_the_steps_of_an_edit_are_spelled_as_in_the_command_or_in_the_pipeline(option):
    assert parse_args(["--train_data", "pairs", "--output_dir", "model", option, "7"]).num_inference_steps == 7


def test_samples_without_caption_are_trained_by_eq_1_whatever_the_loss_is(tmp_path, pairs, base):
    for loss in ("ldm", "paired"):
        train(arguments(pairs, base, tmp_path / loss, "--caption_dropout", 1, "--loss", loss))
        train(arguments(pairs, base, tmp_path / f"{loss} with captions", "--caption_dropout", 0, "--loss", loss))
    assert changed(weights(tmp_path / "ldm"), weights(tmp_path / "paired")) == set()
    assert changed(weights(tmp_path / "ldm with captions"), weights(tmp_path / "paired with captions"))
    assert changed(weights(tmp_path / "ldm"), weights(tmp_path / "ldm with captions"))


def test_min_snr_weighs_the_terms_of_the_noise_alone(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--snr_gamma", 0.01))
    line, without = losses(tmp_path / "model")[0], losses(plain)[0]
    for term in ("loc", "global", "mask", "perc"):
        assert line[term] == pytest.approx(without[term], rel=1e-5)
    assert 0 < line["loss"] < without["loss"]
    assert changed(weights(tmp_path / "model"), weights(plain))


def test_a_base_that_predicts_v_is_trained_to_predict_v(tmp_path, pairs, plain):
    base = write_base(tmp_path / "base", prediction_type="v_prediction")
    train(arguments(pairs, base, tmp_path / "model", "--snr_gamma", 5))
    config = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    assert losses(tmp_path / "model")[0]["mask"] != pytest.approx(losses(plain)[0]["mask"], rel=0.01)
    assert changed(weights(tmp_path / "model"), weights(base))


def test_a_loss_decoder_decodes_for_the_losses_on_images_only(tmp_path, pairs, base, plain):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        )  # fmt: skip
    tiny.save_pretrained(tmp_path / "decoder")
    train(arguments(pairs, base, tmp_path / "model", "--loss_decoder", tmp_path / "decoder"))
    line, without = losses(tmp_path / "model")[0], losses(plain)[0]
    assert line["mask"] == pytest.approx(without["mask"], rel=1e-5)
    for term in ("loc", "global", "perc"):
        assert abs(line[term] / without[term] - 1) > 1e-3
    assert (tmp_path / "model/vae/config.json").read_text() == (plain / "vae/config.json").read_text()


# Optimisation


def test_lora_is_merged_and_lies_beside_the_pipeline(tmp_path, pairs, base):
    options = ("--lora_rank", 2, "--learning_rate", 0.05, "--train_blocks", "all")
    train(arguments(pairs, base, tmp_path / "model", *options))
    merged, before = weights(tmp_path / "model"), weights(base)
    different = changed(merged, before)
    assert different
    assert all(re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$", name) for name in different)

    lora_edits_as_the_pipeline_it_lies_beside(IEditPipeline, tmp_path / "model", base, atol=1e-4)


def test_lora_layers_of_the_input_and_middle_blocks_take_turns(tmp_path, pairs, base):
    train(arguments(pairs, base, tmp_path / "model", "--lora_rank", 2, "--checkpointing_steps", 1))
    states = [load_file(tmp_path / f"model/checkpoint-{step}/trained.safetensors") for step in (1, 2, 3)]
    assert {name.split(".")[0] for name in changed(states[0], states[1])} == {"mid_block"}
    assert {name.split(".")[0] for name in changed(states[1], states[2])} == {"down_blocks"}
    assert all("lora_" in name for name in states[0])


def test_a_full_training_removes_the_lora_of_an_earlier_one(tmp_path, pairs, base):
    for options in (("--lora_rank", 2), ("--overwrite_output_dir",)):
        train(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 1, *options))
        assert (tmp_path / "model/lora").exists() == ("--lora_rank" in options)


def test_with_ema_the_average_is_what_is_saved(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--use_ema", "--ema_decay", 0.5, "--checkpointing_steps", 1))
    # The average does not take part in the training.
    assert losses(tmp_path / "model") == losses(plain)
    last = tmp_path / "model/checkpoint-4"
    trained, average = load_file(last / "trained.safetensors"), load_file(last / "ema.safetensors")
    assert changed(trained, load_file(plain / "checkpoint-4/trained.safetensors")) == set()
    before = load_file(tmp_path / "model/checkpoint-3/ema.safetensors")
    for name, values in average.items():
        # By the fourth step the warm-up is over.
        assert torch.allclose(values, 0.5 * (before[name] + trained[name]), atol=1e-7), name
    assert changed(average, trained)
    saved = weights(tmp_path / "model")
    assert all(torch.equal(saved[name], values) for name, values in average.items())


@pytest.mark.parametrize("options", [(), ("--use_ema", "--ema_decay", 0.5)])
def test_what_is_saved_has_the_base_s_share_of_the_base(tmp_path, pairs, base, plain, options):
    share = ("--checkpointing_steps", 2, "--base_share", 0.25)
    train(arguments(pairs, base, tmp_path / "model", *share, *options))
    # It does not take part in the training.
    assert losses(tmp_path / "model") == losses(plain)
    last = tmp_path / "model/checkpoint-4"
    trained = load_file(last / ("ema.safetensors" if options else "trained.safetensors"))
    assert (
        changed(load_file(last / "trained.safetensors"), load_file(plain / "checkpoint-4/trained.safetensors"))
        == set()
    )
    saved, before = weights(tmp_path / "model"), weights(base)
    for name, values in trained.items():
        assert torch.allclose(saved[name], 0.75 * values + 0.25 * before[name], atol=1e-6), name
    assert changed(saved, before) == changed(weights(plain), before)
    assert "| base_share | 0.25 |" in (tmp_path / "model/README.md").read_text()


def test_a_finished_training_takes_another_share_of_the_base(tmp_path, pairs, base, plain):
    shutil.copytree(plain, tmp_path / "model")
    train(arguments(pairs, base, tmp_path / "model", "--resume_from_checkpoint", "latest", "--base_share", 0.5))
    assert losses(tmp_path / "model") == losses(plain)
    half, full, before = weights(tmp_path / "model"), weights(plain), weights(base)
    for name, values in half.items():
        assert torch.allclose(values, (full[name] + before[name]) / 2, atol=1e-6), name
    assert changed(half, full)


def test_a_stop_while_another_share_is_saved_leaves_no_model_that_looks_finished(tmp_path, pairs, base):
    options = ("--lora_rank", 2, "--max_train_steps", 1, "--checkpointing_steps", 1, "--loss", "ldm")
    argv = arguments(pairs, base, tmp_path / "model", *options)
    train(argv)
    argv += ["--base_share", "0.5", "--resume_from_checkpoint", "latest"]
    with (
        mock.patch.object(train_iedit, "save_pipeline", side_effect=OSError("full")),
        pytest.raises(OSError, match="full"),
    ):
        train(argv)
    assert not (tmp_path / "model/model_index.json").exists()
    train(argv)
    train([*arguments(pairs, base, tmp_path / "other", *options), "--base_share", "0.5"])
    assert changed(weights(tmp_path / "model"), weights(tmp_path / "other")) == set()


@pytest.mark.parametrize("model", ["base", "sdxl_base", "sd3_base"])
def test_of_lora_layers_the_base_s_share_is_a_smaller_scale(tmp_path, pairs, model, request):
    base, found = request.getfixturevalue(model), {}
    options = ("--lora_rank", 2, "--learning_rate", 0.05, "--train_blocks", "attention", "--max_train_steps", 2)
    for share in (0, 0.75):
        folder = tmp_path / str(share)
        train(arguments(pairs, base, folder, *options, "--base_share", share))
        (file,) = (folder / "lora").glob("*.safetensors")
        found[share] = weights(folder), load_file(file)
    before = weights(base)
    (whole, layers), (quarter, lora) = found[0], found[0.75]
    for name, values in quarter.items():
        assert torch.allclose(values - before[name], (whole[name] - before[name]) / 4, atol=1e-5), name
    assert changed(whole, before)
    # So are the layers that lie beside the pipeline.
    for name, values in lora.items():
        first = re.search(r"lora_A|lora\.down", name)
        assert torch.equal(values, layers[name] if first else layers[name] / 4), name


def test_two_accumulated_batches_of_one_are_a_batch_of_two(tmp_path, pairs, base, plain):
    options = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    train(arguments(pairs, base, tmp_path / "model", *options))
    assert close(tmp_path / "model", plain, base)


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--gradient_checkpointing"))
    assert close(tmp_path / "model", plain, base)


def test_processes_that_read_pairs_give_the_same_weights(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--dataloader_num_workers", 2))
    assert changed(weights(tmp_path / "model"), weights(plain)) == set()


def test_cached_latents_give_the_same_losses_and_are_used_again(tmp_path, pairs, base, plain):
    options = ("--cache_latents", "--cache_dir", tmp_path / "cache")
    train(arguments(pairs, base, tmp_path / "model", *options))
    assert close(tmp_path / "model", plain, base)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    time = file.stat().st_mtime_ns

    train(arguments(pairs, base, tmp_path / "again", *options, "--loss", "loc+global+mask+perc"))
    assert (tmp_path / "again" / UNET).read_bytes() == (tmp_path / "model" / UNET).read_bytes()
    assert [file] == list((tmp_path / "cache").rglob("*.safetensors"))
    assert file.stat().st_mtime_ns == time


def test_bf16_trains_and_saves_weights_in_fp32(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--mixed_precision", "bf16"))
    assert {values.dtype for values in weights(tmp_path / "model").values()} == {torch.float32}
    for line, expected in zip(losses(tmp_path / "model"), losses(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.slow
def test_a_compiled_unet_is_saved_as_any_other(tmp_path, pairs, base, plain, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    train(arguments(pairs, base, tmp_path / "model"))
    assert close(tmp_path / "model", plain, base)


def test_the_learning_rate_warms_up_and_falls_as_its_schedule_says(tmp_path, pairs, base):
    options = ("--lr_scheduler", "linear", "--lr_warmup_steps", 2, "--max_train_steps", 4, "--loss", "paired")
    train(arguments(pairs, base, tmp_path / "model", *options))
    rates = [line["learning_rate"] for line in losses(tmp_path / "model")]
    assert rates == pytest.approx([5e-4, 1e-3, 5e-4, 0])


def test_another_seed_gives_other_weights(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--seed", 1))
    assert changed(weights(tmp_path / "model"), weights(plain)) == changed(weights(plain), weights(base))


# Bad input


def error(argv, capsys):
    """What the command says of an error, which has to come without a traceback and to leave no model."""
    with pytest.raises(SystemExit) as end:
        command(argv)
    message = capsys.readouterr().err.splitlines()[-1] if end.value.code == 2 else end.value.code
    assert message.startswith("train_iedit.py: error: ")
    assert "Traceback" not in message
    return message.removeprefix("train_iedit.py: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "loc+style"), "--loss has to be some of loc, global, .*, got 'loc+style'."),
        (("--loss", "loc+loc"), "--loss has to be some of loc, global, .*, each once, .*, got 'loc+loc'."),
        (("--lambda_perc", "-0.1"), "--lambda_perc has to be 0 or more, got -0.1."),
        (("--background_weight", "-1"), ".?.?background_weight.? has to be 0 or more, got -1.0."),
        (("--base_share", "1"), "--base_share has to be at least 0 and below 1, got 1.0."),
        (("--base_share", "-0.1"), "--base_share has to be at least 0 and below 1, got -0.1."),
        (("--caption_dropout", "1.5"), "--caption_dropout has to be between 0 and 1, got 1.5."),
        (("--max_train_steps", "0"), "--max_train_steps has to be 1 or more, got 0."),
        (("--lora_rank", "-1"), "--lora_rank has to be 0 or more, got -1."),
        (
            ("--train_blocks", "first"),
            "`train_blocks` first is no part of a Stable Diffusion 1.x or 2.x, which has .*",
        ),
        (("--weighting_scheme", "mode"), "`weighting_scheme` is for flow-matching models, and .* is a Stable .*"),
        (("--logit_std", "-1"), "--logit_std has to be 0 or more, got -1.0."),
        (("--logit_mean", "nan"), "--logit_mean has to be a number, got nan."),
        (("--mode_scale", "2"), "--mode_scale has to be between -1 and 1.752, got 2.0."),
        (("--logit_std", "0.5"), "`logit_std` is for flow-matching models, and .* is a Stable .*"),
        (("--checkpoints_total_limit", "0"), "--checkpoints_total_limit has to be 1 or more, got 0."),
        (("--resolution", "33"), "`resolution` has to be a multiple of 4, .*, got 33."),
        (("--aspect_ratio_buckets", "32x64"), "`aspect_ratio_buckets`: .*'32x64'.*height,width.*"),
        (("--aspect_ratio_buckets", "32,64;32,66"), "`aspect_ratio_buckets` has to be a multiple of 4, .*, got 66."),
        (("--random_crop", "--cache_latents"), "--random_crop and --cache_latents exclude each other.*"),
        (("--train_split", "test"), "The split 'test' of '.*/pairs' cannot be opened.*"),
        (("--resume_from_checkpoint", "checkpoint-7"), "`resume_from_checkpoint`: .* no checkpoint-7;.* none."),
        (("--mixed_precision", "fp16"), "`mixed_precision` fp16 .*"),
        (("--clip_model", str(mini.judge_path())), "`clip_model` '.*/judge'.*"),
        (("--perceptual_model", str(mini.judge_path())), "`perceptual_model` '.*/judge'.*"),
        (("--loss_decoder", str(mini.judge_path())), "`loss_decoder` '.*/judge' gives no usable AutoencoderTiny.*"),
        (("--model", str(mini.judge_path())), "`model` '.*/judge' is no folder .*, as it has no model_index.json"),
        (("--model", str(mini.clip_path())), "`model` '.*/clip' is no folder .*, as it has no model_index.json"),
    ],
)
def test_a_bad_option_is_named_with_what_was_expected_and_what_came(tmp_path, pairs, base, capsys, options, message):
    argv = arguments(pairs, base, tmp_path / "model", *options)
    assert re.fullmatch(message.replace("+", r"\+"), error(argv, capsys))
    assert not (tmp_path / "model/losses.csv").exists()


def without(name):
    return [column for column in FEATURES if column != name]


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in OPTIONAL])
def test_a_data_set_without_a_column_names_the_column(tmp_path, base, capsys, name):
    pairs = write_pairs(tmp_path / "pairs", make_rows(3), without(name))
    message = error(arguments(pairs, base, tmp_path / "model"), capsys)
    assert f"column `{name}` is missing; there are " in message


@pytest.mark.parametrize("option", ["train_data", "validation_data", "evaluation_data"])
def test_a_data_set_of_something_else_is_told_in_one_line(tmp_path, pairs, base, capsys, option):
    other = write_pairs(tmp_path / "other", make_rows(3), ["source_image", "source_caption"])
    message = error(arguments(pairs, base, tmp_path / "model", f"--{option}", other), capsys)
    assert "columns `target_image`, `edit_prompt`, " in message
    assert "training/import_pairs.py" in message
    assert "\n" not in message


def test_a_data_set_without_rows_is_refused(tmp_path, base, capsys):
    pairs = write_pairs(tmp_path / "pairs", [])
    assert re.search("no rows|no data", error(arguments(pairs, base, tmp_path / "model"), capsys))


# `load_pairs` looks at the first 8 rows; the others are met on the way.
@pytest.mark.parametrize("row", [1, 10])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_mask", Image.new("L", (64, 64)), "`target_mask` is black"),
        ("source_mask", Image.new("L", (48, 64), 255), "`source_mask` is 48 x 64, but `source_image` is 64 x 64"),
        ("edit_prompt", None, "`edit_prompt` is "),
    ],
)
def test_a_bad_row_is_named_with_its_fault(tmp_path, base, capsys, row, name, value, message):
    rows = make_rows()
    rows[row][name] = value
    pairs = write_pairs(tmp_path / "pairs", rows)
    said = error(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 6, "--loss", "paired"), capsys)
    assert re.search(f"(?i)row {row}\\b.*{message}", said)
    assert not (tmp_path / "model/model_index.json").exists()


def test_prompts_that_the_base_cannot_tell_apart_are_named_with_their_row(tmp_path, base, capsys):
    rows = make_rows()
    # The tiny base's tokenizer takes 77 letters.
    rows[10] |= {"source_caption": 20 * "long " + "day", "edit_prompt": 20 * "long " + "night"}
    pairs = write_pairs(tmp_path / "pairs", rows)
    said = error(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 6, "--loss", "paired"), capsys)
    assert said.startswith("Row 10 of the pairs: `source_caption` and `edit_prompt` are the same tokens to the model")


def test_a_license_that_the_hub_does_not_know_is_refused_before_anything_is_done(tmp_path, pairs, base, capsys):
    message = error(arguments(pairs, base, tmp_path / "model", "--license", "Apache 2.0"), capsys)
    assert "near to it are apache-2.0" in message
    assert not (tmp_path / "model").exists()


def test_a_base_with_a_unet_for_another_task_is_refused(tmp_path, pairs, capsys):
    base = tmp_path / "base"
    pipe = StableDiffusionInpaintPipeline(**tiny_models.sd_components(vae_scale_factor=4, in_channels=9))
    pipe.save_pretrained(base)
    message = error(arguments(pairs, base, tmp_path / "model"), capsys)
    assert message.startswith(f"`model` '{base}' gives no usable Stable Diffusion 1.x or 2.x: ")


@pytest.mark.parametrize(
    ("class_name", "parts"),
    [
        ("FluxPipeline", {"transformer": ["diffusers", "FluxTransformer2DModel"]}),
        (
            "StableDiffusionControlNetPipeline",
            {"unet": ["diffusers", "UNet2DConditionModel"], "controlnet": ["diffusers", "ControlNetModel"]},
        ),
        (
            # The refiner.
            "StableDiffusionXLImg2ImgPipeline",
            {
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": [None, None],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            },
        ),
    ],
)
def test_a_family_that_cannot_be_trained_is_told_with_those_that_can(tmp_path, pairs, capsys, class_name, parts):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": class_name} | parts))
    assert error(arguments(pairs, base, tmp_path / "model"), capsys) == (
        f"`model` '{base}' is a {class_name}, which cannot be fine-tuned here: it has to be a Stable Diffusion 1.x or"
        " 2.x, or a Stable Diffusion XL with both text encoders, or a Stable Diffusion 3 or 3.5."
    )
    assert not (tmp_path / "model/losses.csv").exists()


@pytest.mark.parametrize("below", [False, True])
def test_an_output_dir_that_cannot_be_written_to_is_named(tmp_path, pairs, base, capsys, below):
    (tmp_path / "file").touch()
    output_dir = tmp_path / "file/model" if below else tmp_path / "file"
    message = error(arguments(pairs, base, output_dir), capsys)
    assert message.startswith(f"`output_dir` has to be a folder that can be written to, got {output_dir}: ")


def test_a_folder_with_checkpoints_is_gone_on_with_or_left_alone(tmp_path, pairs, base, plain, capsys):
    output_dir = tmp_path / "model"
    shutil.copytree(plain, output_dir)
    message = error(arguments(pairs, base, output_dir), capsys)
    assert message.startswith(f"`output_dir` {output_dir} holds checkpoints of an earlier run")
    assert files_in(output_dir) == files_in(plain)


def test_a_finished_model_is_not_replaced_untold(tmp_path, pairs, base, capsys):
    output_dir = tmp_path / "model"
    train(arguments(pairs, base, output_dir, "--max_train_steps", 1, "--loss", "ldm"))
    before = files_in(output_dir)
    for resume in ((), ("--resume_from_checkpoint", "latest")):
        message = error(arguments(pairs, base, output_dir, "--seed", 1, *resume), capsys)
        assert message.startswith(f"`output_dir` {output_dir} holds a finished model, and no checkpoint to go on from")
        assert "--overwrite_output_dir" in message
    assert files_in(output_dir) == before


def test_a_run_that_is_told_to_begin_anew_leaves_nothing_of_the_one_before(tmp_path, pairs, base, plain):
    output_dir = Path(shutil.copytree(plain, tmp_path / "model"))
    for folder in ("images", "evaluation", "lora", "logs"):
        (output_dir / folder).mkdir()
    options = ("--max_train_steps", 2, "--checkpointing_steps", 2)
    for folder in (output_dir, tmp_path / "new"):
        train(arguments(pairs, base, folder, *options, "--overwrite_output_dir"))
    assert files_in(output_dir).keys() == files_in(tmp_path / "new").keys()
    assert changed(weights(output_dir), weights(tmp_path / "new")) == set()


@pytest.mark.parametrize("way", ["itself", "relative", "with a slash", "a link", "a link to its folder"])
@pytest.mark.parametrize("option", ["model", "clip_model", "loss_decoder"])
def test_a_model_that_is_read_is_not_written_over(tmp_path, pairs, base, capsys, monkeypatch, way, option):
    folder = Path(shutil.copytree(base, tmp_path / "models/base"))
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "models-link").symlink_to(folder.parent)
    monkeypatch.chdir(folder.parent)
    ways = ("itself", folder), ("relative", "base"), ("with a slash", f"{folder}/"), ("a link", tmp_path / "link")
    output_dir = dict([*ways, ("a link to its folder", tmp_path / "models-link/base")])[way]
    before = files_in(folder)
    message = error(arguments(pairs, base, output_dir, f"--{option}", folder), capsys)
    expected = f"`output_dir` {Path(output_dir)} is the folder of `{option}` {folder}, which it would overwrite"
    assert message.startswith(expected)
    assert files_in(folder) == before


@pytest.mark.parametrize(
    ("model", "name"), [("mini", "iedit"), ("mini-base", "iedit"), ("mini-sd3", "sd3"), ("mini-sd3-iedit", "sd3")]
)
def test_the_package_s_own_model_is_not_written_over(pairs, capsys, model, name):
    message = error(arguments(pairs, model, mini.model_path(name)), capsys)
    assert message.startswith(f"`output_dir` {mini.model_path(name)} is the folder of `model` {model}")


@pytest.mark.parametrize("option", ["train_data", "validation_data", "evaluation_data"])
@pytest.mark.parametrize("written", ["output_dir", "cache_dir"])
def test_nothing_is_written_among_the_pairs(tmp_path, pairs, base, capsys, option, written):
    data = Path(shutil.copytree(pairs, tmp_path / "data"))
    argv = arguments(pairs, base, tmp_path / "model", f"--{option}", data, f"--{written}", data / "new")
    assert error(argv, capsys).startswith(f"`{written}` {data}/new lies in `{option}` {data}")
    assert files_in(data) == files_in(pairs)


def test_a_checkpoint_of_another_configuration_names_every_difference(tmp_path, pairs, base, plain, capsys):
    output_dir = tmp_path / "model"
    shutil.copytree(plain, output_dir)
    options = (
        "--loss",
        "paired",
        "--learning_rate",
        0.5,
        "--train_batch_size",
        3,
        "--resume_from_checkpoint",
        "latest",
    )
    message = error(arguments(pairs, base, output_dir, *options), capsys)
    for difference in (
        "learning_rate was 0.001 and is 0.5",
        "loss was 'loc+global+mask+perc' and is 'paired'",
        "total_batch_size was 2 and is 3",
    ):
        assert difference in message
    assert message.count(" was ") == 3


def test_a_checkpoint_of_other_pairs_is_refused(tmp_path, base, plain, capsys):
    output_dir = tmp_path / "model"
    shutil.copytree(plain, output_dir)
    pairs = write_pairs(tmp_path / "pairs", make_rows(5))
    message = error(arguments(pairs, base, output_dir, "--resume_from_checkpoint", "latest"), capsys)
    assert "rows was 12 and is 5" in message


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path, pairs, base, plain, capsys):
    output_dir = tmp_path / "model"
    shutil.copytree(plain, output_dir)
    message = error(arguments(pairs, base, output_dir, "--resume_from_checkpoint", "checkpoint-9"), capsys)
    assert "no checkpoint-9" in message
    assert "checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4" in message


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, pairs, base, capsys):
    (tmp_path / "model/checkpoint-9").mkdir(parents=True)
    message = error(arguments(pairs, base, tmp_path / "model", "--resume_from_checkpoint", "latest"), capsys)
    said = "has no state.json of this script; no other one is whole."
    assert message == f"`resume_from_checkpoint`: {tmp_path}/model/checkpoint-9 {said}"


def test_8_bit_adam_says_what_it_needs(tmp_path, pairs, base, capsys):
    with mock.patch.dict(sys.modules, bitsandbytes=None):
        message = error(arguments(pairs, base, tmp_path / "model", "--use_8bit_adam"), capsys)
    assert message == "`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes"


# The Hub


def test_a_token_that_is_refused_is_an_error_before_anything_is_loaded(tmp_path, hub):
    argv = arguments(tmp_path / "no pairs", "no-base", tmp_path / "model", "--push_to_hub")
    process = hub.run([sys.executable, str(SCRIPT), *argv], HF_TOKEN="wrong", ACCELERATE_USE_CPU="true")
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert last.startswith("train_iedit.py: error: model on the Hub cannot be written to with the token")
    assert "Traceback" not in process.stderr
    assert hub.repos["models"] == {}
    assert [file.name for file in (tmp_path / "model").iterdir()] == [".lock"]


def test_a_run_with_everything_pushes_the_model_alone_and_tells_nobody_the_token(tmp_path, pairs, base, hub):
    output_dir = tmp_path / "model"
    options = ("--push_to_hub", "--lora_rank", 2, "--checkpointing_steps", 1, "--cache_latents", "--use_ema")
    shown = ("--report_to", "tensorboard", "--num_validation_pairs", 1, "--num_inference_steps", 2)
    argv = arguments(pairs, base, output_dir, "--max_train_steps", 2, *options, *shown)
    process = hub.run([sys.executable, str(SCRIPT), *argv], ACCELERATE_USE_CPU="true")
    assert process.returncode == 0, process.stderr
    assert f"{hub.endpoint}/{USER}/model" in process.stderr

    local, pushed = files_in(output_dir), dict(hub.repos["models"][f"{USER}/model"].files())
    of_the_run = ("checkpoint-", "cache/", "logs/", ".lock", "losses.csv", "training_args.json")
    assert all(any(path.startswith(name) for path in local) for name in of_the_run)
    assert pushed.keys() == {path for path in local if not path.startswith(of_the_run)}
    assert {"lora/pytorch_lora_weights.safetensors", "loss.png", "images/step-000002.png"} <= pushed.keys()
    card = pushed.pop("README.md").decode()
    assert f'repo = "{USER}/model"' in card
    assert all(content == local[path] for path, content in pushed.items())

    assert TOKEN not in process.stdout + process.stderr
    assert not [path for path, content in local.items() if TOKEN.encode() in content]
    assert not any(TOKEN.encode() in request.body for request in hub.requests)
