"""Models by name: what is damaged is an error that names the part, and a Hub that does not answer costs seconds."""

import functools
import json
import shutil
import socket
import sys

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from hub_server import files_in, output
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pairs import make_rows, write_pairs
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from diffusers_iedit import IEditPipeline, cli, loading, mini
from diffusers_iedit.evaluation.methods import Models
from diffusers_iedit.evaluation.networks import Networks
from diffusers_iedit.finetuning import families
from diffusers_iedit.finetuning import models as finetuning


WEIGHTS = {
    "captioner": "model.safetensors",
    "mask_model": "model.safetensors",
    "safety_checker": "model.safetensors",
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
TOKENIZERS = ("caption_processor", "mask_processor", "tokenizer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A saved tiny pipeline with every component that `IEditPipeline` can have but an image encoder."""
    mask_model, mask_processor = tiny_models.clipseg()
    captioner, caption_processor = tiny_models.blip()
    safety_checker, feature_extractor = tiny_models.safety_checker()
    parts = tiny_models.sd_components() | {
        "mask_model": mask_model,
        "mask_processor": mask_processor,
        "captioner": captioner,
        "caption_processor": caption_processor,
        "safety_checker": safety_checker,
        "feature_extractor": feature_extractor,
        "requires_safety_checker": True,
    }
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    IEditPipeline(**parts).save_pretrained(folder)
    return folder


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def say_nothing(file):
    file.write_text("{}")


def lose_a_weight(file):
    weights = load_file(file)
    del weights[sorted(weights)[len(weights) // 2]]
    save_file(weights, file, metadata={"format": "pt"})


def reshape_a_weight(file):
    weights = load_file(file)
    name = sorted(weights)[len(weights) // 2]
    weights[name] = torch.zeros([size + 1 for size in weights[name].shape])
    save_file(weights, file, metadata={"format": "pt"})


def remove_all(folder):
    shutil.rmtree(folder)


def damaged(folder, copy, name, damage):
    """A copy of a folder in which one file, or a folder, is damaged."""
    shutil.copytree(folder, copy)
    damage(copy / name)
    return copy


WHATEVER_IS_DAMAGED = [
    *[
        (part, remove_all, f"{part}: its folder is missing")
        for part in (*WEIGHTS, *TOKENIZERS, "scheduler", "feature_extractor")
    ],
    *[(f"{part}/{file}", remove, f"{part}: .*no file named {file}") for part, file in WEIGHTS.items()],
    *[(f"{part}/{file}", cut_off, f"{part}: {file} is damaged or cut off") for part, file in WEIGHTS.items()],
    *[(f"{part}/{file}", empty, f"{part}: {file} is damaged or cut off") for part, file in WEIGHTS.items()],
    *[
        (f"{part}/{file}", lose_a_weight, rf"{part}: \d of its weights are missing, for instance \w+\.")
        for part, file in WEIGHTS.items()
    ],
    *[(f"{part}/{file}", reshape_a_weight, f"{part}: .*shape") for part, file in WEIGHTS.items()],
    *[(f"{part}/config.json", remove, f"{part}: config.json is missing") for part in WEIGHTS],
    *[(f"{part}/config.json", say_nothing, f"{part}: config.json has to be .* not empty") for part in WEIGHTS],
    *[(f"{part}/config.json", cut_off, f"{part}: config.json is no JSON") for part in WEIGHTS],
    *[(f"{part}/tokenizer.json", remove, f"{part}: the tokenizer's files are missing") for part in TOKENIZERS],
    *[(f"{part}/tokenizer.json", cut_off, f"{part}: tokenizer.json is no JSON") for part in TOKENIZERS],
    *[
        (f"{part}/tokenizer.json", say_nothing, f"{part}: tokenizer.json has to be .* not empty")
        for part in TOKENIZERS
    ],
    *[(f"{part}/tokenizer_config.json", remove, f"{part}: tokenizer_config.json is missing") for part in TOKENIZERS],
    *[(f"{part}/tokenizer_config.json", say_nothing, f"{part}: tokenizer_config.json has") for part in TOKENIZERS],
    ("feature_extractor/preprocessor_config.json", remove, "feature_extractor: .*preprocessor_config.json"),
    ("feature_extractor/preprocessor_config.json", say_nothing, "feature_extractor: preprocessor_config.json has to"),
    ("mask_processor/processor_config.json", remove, "mask_processor: .*preprocessor_config.json"),
    ("captioner/generation_config.json", cut_off, "captioner: generation_config.json is no JSON"),
    ("scheduler/scheduler_config.json", remove, "scheduler: .*no file named scheduler_config.json"),
    ("scheduler/scheduler_config.json", say_nothing, "scheduler: scheduler_config.json has to be .* not empty"),
    ("scheduler/scheduler_config.json", cut_off, "scheduler: scheduler_config.json is no JSON"),
    ("model_index.json", remove, "no folder of a diffusers pipeline, as it has no model_index.json"),
    ("model_index.json", empty, "model_index.json is no JSON"),
    ("model_index.json", say_nothing, "model_index.json has to be a JSON object that is not empty"),
]


@pytest.mark.parametrize(
    ("name", "damage", "says"), WHATEVER_IS_DAMAGED, ids=[f"{d.__name__}-{n}" for n, d, _ in WHATEVER_IS_DAMAGED]
)
def test_whatever_is_damaged_is_one_line_that_names_the_component(whole, tmp_path, name, damage, says):
    folder = damaged(whole, tmp_path / "model", name, damage)
    # The other components are left out, which keeps this quick.
    index = json.loads((whole / "model_index.json").read_text())
    parts = [part for part, entry in index.items() if isinstance(entry, list) and entry[0] and part not in name]
    with pytest.raises(ValueError, match=f"^--model '{folder}' .*{says}") as raised:
        loading.load_pipeline(IEditPipeline, folder, "--model", **dict.fromkeys(parts))
    assert "\n" not in str(raised.value)


def test_every_component_of_a_whole_pipeline_is_loaded_as_from_pretrained_does(whole):
    ours = loading.load_pipeline(IEditPipeline, whole, "--model", dtype=torch.float16)
    theirs = IEditPipeline.from_pretrained(whole, dtype=torch.float16)
    assert ours.config == theirs.config
    for name, component in theirs.components.items():
        assert type(ours.components[name]) is type(component)
        if isinstance(component, torch.nn.Module):
            assert not ours.components[name].training
            found = ours.components[name].state_dict()
            assert all(torch.equal(found[key], value) for key, value in component.state_dict().items())


def test_a_component_that_is_left_out_may_be_damaged(whole, tmp_path):
    folder = damaged(whole, tmp_path / "model", "captioner/model.safetensors", empty)
    left_out = {"captioner": None, "caption_processor": None}
    assert loading.load_pipeline(IEditPipeline, folder, "--model", **left_out).captioner is None


@pytest.mark.parametrize("lost", ["merges.txt", "vocab.json"])
def test_both_files_of_a_slow_tokenizer_are_needed(tmp_path, lost):
    words = [*(chr(code) for code in range(33, 127)), *(chr(code) + "</w>" for code in range(33, 127))]
    vocabulary = {word: number for number, word in enumerate([*words, "ab</w>", "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    assert loading.load(CLIPTokenizer, tmp_path, "`clip_model`").model_max_length == 77
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=f"`clip_model` '{tmp_path}' gives no usable CLIPTokenizer: .*merges"):
        loading.load(CLIPTokenizer, tmp_path, "`clip_model`")


def test_old_names_of_weights_are_no_missing_weights(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    # As in Stable Diffusion 1.4: attention of the VAE, position ids of the text encoder.
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {functools.reduce(lambda k, n: k.replace(*n), names.items(), k): v for k, v in load_file(file).items()}
    assert any(".query." in name for name in old)
    save_file(old, file, metadata={"format": "pt"})
    file = folder / "text_encoder/model.safetensors"
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(file) | position_ids, file, metadata={"format": "pt"})
    loading.load_pipeline(IEditPipeline, folder, "--model")


# Those who load


def by_the_command(folder, capsys):
    assert cli.main(["edit", "in.png", "a red car", "-o", "out.png", "--model", str(folder)]) == 2
    return capsys.readouterr().err.strip()


def by_the_trainer(folder, capsys):
    with pytest.raises(ValueError, match=r"^`model` ") as raised:
        families.load_base(str(folder))
    return str(raised.value)


def by_the_evaluation(folder, capsys):
    with pytest.raises(ValueError, match=r"^`base_model` ") as raised:
        Models().load(IEditPipeline, str(folder), "`base_model`")
    return str(raised.value)


@pytest.mark.parametrize("load", [by_the_command, by_the_trainer, by_the_evaluation])
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("tokenizer/tokenizer.json", remove, "tokenizer: the tokenizer's files are missing"),
        ("text_encoder/model.safetensors", lose_a_weight, "text_encoder: 1 of its weights are missing"),
        ("vae/diffusion_pytorch_model.safetensors", cut_off, "vae: diffusion_pytorch_model.safetensors is damaged"),
        ("scheduler/scheduler_config.json", say_nothing, "scheduler: scheduler_config.json has to be"),
    ],
    ids=["tokenizer", "text_encoder", "vae", "scheduler"],
)
def test_a_damaged_mini_model_is_used_by_nobody(tmp_path, monkeypatch, capsys, load, name, damage, says):
    folder = damaged(mini.model_path(), tmp_path / "model", name, damage)
    monkeypatch.chdir(tmp_path)
    mini.render(seed=0).image.save("in.png")
    said = load(folder, capsys)
    assert says in said
    assert str(folder) in said
    assert "\n" not in said
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("load", "source", "name", "argument"),
    [
        (finetuning.load_clip, mini.clip_path(), "model.safetensors", "`clip_model`"),
        (finetuning.load_clip, mini.clip_path(), "tokenizer.json", "`clip_model`"),
        (finetuning.load_features, mini.vgg_path(), "model.safetensors", "`perceptual_model`"),
        (finetuning.load_decoder, mini.tiny_vae_path(), "diffusion_pytorch_model.safetensors", "`loss_decoder`"),
        (
            lambda name: Networks({"clip": name}).get("clip"),
            mini.clip_path(),
            "model.safetensors",
            "for clip: `model`",
        ),
        (lambda name: Networks({"clip": name}).get("clip"), mini.clip_path(), "tokenizer.json", "for clip: `model`"),
        (lambda name: Networks({"fid": name}).get("fid"), mini.vgg_path(), "model.safetensors", "for fid: `model`"),
        (lambda name: Networks({"lpips": name}).get("lpips"), mini.vgg_path(), "model.safetensors", "lpips: `model`"),
        (lambda name: Networks({"dino": name}).get("dino"), mini.clip_path(), "model.safetensors", "dino: `model`"),
    ],
)
def test_a_damaged_network_is_an_error_that_names_the_argument(tmp_path, load, source, name, argument):
    folder = damaged(source, tmp_path / "network", name, remove if name == "tokenizer.json" else cut_off)
    with pytest.raises(ValueError, match=f"{argument} '{folder}' gives no usable [^\n]*$"):
        load(str(folder))


# Pipelines of other families


def sd3_components():
    """With a T5 encoder too, whose weights are tied."""
    config = T5Config(vocab_size=6, d_model=64, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0)]
    t5 = {"text_encoder_3": T5EncoderModel(config), "tokenizer_3": T5Tokenizer(vocab=pieces, extra_ids=0)}
    return tiny_models.sd3_components() | t5


@pytest.mark.parametrize(
    ("cls", "components", "parts"),
    [
        (StableDiffusionXLImg2ImgPipeline, tiny_models.sdxl_components, ("text_encoder_2", "tokenizer_2", "unet")),
        (
            StableDiffusion3Img2ImgPipeline,
            sd3_components,
            ("text_encoder_3", "tokenizer_3", "transformer"),
        ),
    ],
)
def test_every_pipeline_of_diffusers_is_guarded(tmp_path, cls, components, parts):
    cls(**components()).save_pretrained(tmp_path / "whole")
    # Also by the class that the folder names.
    assert type(loading.load_pipeline(DiffusionPipeline, tmp_path / "whole", "`model`")) is cls
    for number, part in enumerate(parts):
        damage, pattern = (remove, "tokenizer.json") if "tokenizer" in part else (lose_a_weight, "*.safetensors")
        (file,) = (tmp_path / "whole" / part).glob(pattern)
        folder = damaged(tmp_path / "whole", tmp_path / f"{number}", file.relative_to(tmp_path / "whole"), damage)
        with pytest.raises(ValueError, match=f"{part}: .* missing"):
            loading.load_pipeline(cls, folder, "`model`")


def test_shards_and_variants_are_guarded(tmp_path):
    pipe = StableDiffusionPipeline(**tiny_models.sd_components()).to(torch.float16)
    pipe.save_pretrained(tmp_path / "whole", variant="fp16", max_shard_size="100KB")
    load = functools.partial(loading.load_pipeline, StableDiffusionPipeline, variant="fp16", dtype=torch.float16)
    assert load(tmp_path / "whole", "`model`").unet.dtype == torch.float16
    shard = sorted((tmp_path / "whole/unet").glob("*.fp16-00002-*"))[0]
    for damage, says in (
        (remove, "unet: .*00002"),
        (cut_off, f"unet: {shard.name} is damaged"),
        (lose_a_weight, f"unet: {shard.name} lacks weights"),
    ):
        folder = damaged(tmp_path / "whole", tmp_path / damage.__name__, shard.relative_to(tmp_path / "whole"), damage)
        with pytest.raises(ValueError, match=says):
            load(folder, "`model`")


def test_code_beside_a_pipeline_is_never_run(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    index = json.loads((whole / "model_index.json").read_text())
    index["unet"] = ["own", "UNet"]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    (tmp_path / "model/unet/own.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ValueError, match="gives no usable IEditPipeline: "):
        loading.load_pipeline(IEditPipeline, tmp_path / "model", "--model")


def test_weights_that_are_pickles_are_not_read(whole, tmp_path):
    folder = damaged(whole, tmp_path / "model", "text_encoder/model.safetensors", remove)
    weights = CLIPTextModel.from_pretrained(whole / "text_encoder").state_dict()
    torch.save(weights, folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"text_encoder: .*no file named model\.safetensors"):
        loading.load_pipeline(IEditPipeline, folder, "--model")


# What the package ships


def test_mini_base_is_mini_with_the_unet_from_before_its_fine_tuning():
    ours = loading.load_pipeline(IEditPipeline, "mini-base", "--model").components
    theirs = loading.load_pipeline(IEditPipeline, "mini", "--model").components
    base = load_file(mini.base_unet_path() / "diffusion_pytorch_model.safetensors")
    weight = "conv_in.weight"
    assert torch.equal(ours["unet"].state_dict()[weight], base[weight].float())
    assert not torch.equal(ours["unet"].state_dict()[weight], theirs["unet"].state_dict()[weight])
    assert torch.equal(ours["vae"].encoder.conv_in.weight, theirs["vae"].encoder.conv_in.weight)


def test_the_command_edits_with_mini_base_too(folder, capsys):
    mini.render(seed=0).image.save("in.png")
    argv = ["edit", "in.png", "a blue car", "-o", "out.png", "--steps", "4", "--seed", "1", "--mask", "mask.png"]
    Image.new("L", (64, 64), 255).save("mask.png")
    edits = []
    for model in ("mini", "mini-base"):
        assert cli.main([*argv, "--model", model]) == 0
        edits.append(np.asarray(Image.open("out.png")))
    assert not np.array_equal(*edits)


# The Hub


def test_a_pipeline_comes_from_the_hub_and_later_from_the_cache(hub, whole, tmp_path):
    hub.add("models", "me/tiny", files_in(whole))
    code = (
        "from diffusers_iedit import IEditPipeline, loading;"
        "pipe = loading.load_pipeline(IEditPipeline, 'me/tiny', '--model', captioner=None, caption_processor=None);"
        "print(pipe.unet.conv_in.bias.sum().item(), pipe.captioner)"
    )
    home = str(tmp_path / "home")
    first = output(hub.run(code, HF_HOME=home))
    assert first.split()[1] == "None"
    assert not list((tmp_path / "home").rglob("captioner/*.safetensors"))
    assert output(hub.run(code, HF_HOME=home, HF_ENDPOINT="http://127.0.0.1:9")) == first


@pytest.mark.slow
def test_a_damaged_file_on_the_hub_is_named(hub, whole, tmp_path):
    folder = damaged(whole, tmp_path / "model", "text_encoder/model.safetensors", lose_a_weight)
    hub.add("models", "me/tiny", files_in(folder))
    process = hub.run(
        "from diffusers_iedit.finetuning.families import load_base\n"
        "try:\n    load_base('me/tiny')\nexcept ValueError as error:\n    print(error)"
    )
    expected = "`model` 'me/tiny' gives no usable Stable Diffusion 1.x or 2.x: text_encoder: 1 of its weights are"
    assert output(process).startswith(expected)


FAILING = """
import time
from transformers import CLIPModel
from diffusers_iedit import IEditPipeline, loading
from diffusers_iedit.evaluation.networks import Networks
loads = [
    lambda: loading.load_pipeline(IEditPipeline, "me/none", "`model`"),
    lambda: loading.load(CLIPModel, "me/none", "`clip_model`"),
    *[lambda part=part: Networks().get(part) for part in ("clip", "fid", "lpips", "dino")],
]
start = time.perf_counter()
for load in loads:
    try:
        load()
    except ValueError as error:
        print(error)
print(time.perf_counter() - start)
"""


@pytest.fixture
def silent_hub():
    """The address of a Hub that takes calls and never answers, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "kind",
    [
        "no such model",
        "silent",
        *[pytest.param(kind, marks=pytest.mark.slow) for kind in ("closed", "offline", "cache")],
    ],
)
def test_a_hub_that_has_nothing_to_give_costs_seconds_and_is_the_reason(hub, silent_hub, tmp_path, kind):
    (tmp_path / "file").touch()
    environment, reason = {
        "no such model": ({}, "the Hugging Face Hub has no such model, or needs you to log in for it"),
        "closed": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hugging Face Hub cannot be reached"),
        "silent": ({"HF_ENDPOINT": silent_hub, "HF_HUB_ETAG_TIMEOUT": "1"}, "the Hugging Face Hub cannot be reached"),
        "offline": ({"HF_HUB_OFFLINE": "1"}, "the Hugging Face Hub cannot be reached"),
        "cache": ({"HF_HUB_CACHE": str(tmp_path / "file")}, "the cache cannot be written to (Not a directory)"),
    }[kind]
    if kind == "cache":
        for name in ("me/none", *Networks().models.values()):
            hub.add("models", name, {"config.json": b"{}", "model.safetensors": b"", "model_index.json": b"{}"})
    *said, seconds = output(hub.run(FAILING, **environment)).splitlines()
    assert len(said) == 6
    assert all(f"there is no such folder, and {reason}" in line for line in said), said
    # Each of six models may wait once for the second that the silent Hub is given.
    assert float(seconds) < 15


@pytest.mark.slow
def test_an_evaluation_without_a_network_goes_on_with_the_metrics_that_can_be_had(hub, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", make_rows(2))
    argv = [
        "evaluate",
        "--data",
        str(pairs),
        "--split",
        "train",
        "--output-dir",
        str(tmp_path / "out"),
        "--model",
        "mini",
    ]
    process = hub.run(
        [sys.executable, "-m", "diffusers_iedit.cli", *argv, "--methods", "sdedit", "--steps", "2"],
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    output(process)
    for part in ("clip", "lpips", "dino", "fid"):
        assert f"Metrics are left out. The network for {part}: " in process.stderr
    assert process.stderr.count("Retrying") == 0
    (example, _) = json.loads((tmp_path / "out/results.json").read_text())["examples"]
    assert "ssim_not_m" in example["results"]["sdedit"]


# Single models


def test_a_model_with_a_processor_comes_from_its_folder(tmp_path):
    shutil.copytree(mini.clip_path(), tmp_path / "clip")
    assert loading.load(CLIPModel, tmp_path / "clip", "`clip_model`", dtype=torch.float16).dtype == torch.float16
    assert loading.load(CLIPProcessor, tmp_path / "clip", "`clip_model`").tokenizer.model_max_length < 100
    assert isinstance(loading.load(AutoencoderTiny, "mini", "x", mini.tiny_vae_path()), AutoencoderTiny)


def test_mini_is_no_name_where_the_package_ships_nothing():
    with pytest.raises(
        ValueError, match=r"`model` 'mini': there is no such folder or model \(it takes a folder, a Hub"
    ):
        loading.fetch("mini", "`model`")
