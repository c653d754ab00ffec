"""The networks behind the metrics, and `Metrics`, which takes all metrics from edited pictures."""

import ast
import dataclasses
import graphlib
import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from transformers import CLIPModel, CLIPProcessor, ViTConfig, ViTModel

from diffusers_iedit import mini
from diffusers_iedit.evaluation import metrics, networks
from diffusers_iedit.evaluation.data import Example
from diffusers_iedit.evaluation.inception import Inception
from diffusers_iedit.evaluation.measuring import METRICS, Metrics
from diffusers_iedit.evaluation.metrics import to_tensor
from diffusers_iedit.evaluation.networks import CLIPEmbedder, LPIPSFeatures, Networks, StructureKeys
from diffusers_iedit.losses import VGG16Features
from diffusers_iedit.mini.judging import Judge


MINI = dict.fromkeys(networks.DEFAULT_MODELS, "mini")


def thing_swap(seed):
    """An example of the mini world that asks for another thing."""
    source = mini.render(seed)
    nouns = [noun for noun in mini.NOUNS if noun not in [thing.noun for thing in source.things]]
    target = source.swap(thing=nouns[seed % len(nouns)])
    return Example(
        key=f"swap-{seed}",
        group="real",
        image=source.image,
        mask=source.mask,
        source_caption=source.caption,
        edit_prompt=target.caption,
        source_term=source.thing.name,
        target_term=target.thing.name,
        instruction=f"turn the {source.thing.name} into a {target.thing.name}",
        target=target.image,
        target_mask=target.mask,
        thing=(target.thing.noun, target.thing.colour, target.scene),
    )


def photo(example):
    """The example as a set without the mini world's truth has it."""
    return dataclasses.replace(example, target=None, target_mask=None, thing=None)


@pytest.fixture(scope="module")
def examples():
    return [thing_swap(seed) for seed in range(8)]


@pytest.fixture(scope="module")
def everything():
    """All metrics of the mini world."""
    return Metrics(None, Networks(MINI))


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A folder with a random VGG-16 of full width."""
    folder = tmp_path_factory.mktemp("vgg")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VGG16Features(layers=LPIPSFeatures.LAYERS)
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A folder with a tiny random ViT, with the patches and the size of DINO-ViT-B/8."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        patch_size=8,
        image_size=224,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A folder with a random Inception-v3 for the 1000 classes of ImageNet."""
    folder = tmp_path_factory.mktemp("inception")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Inception()
    weights = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    save_file(weights | {"fc.weight": torch.zeros(1000, 2048)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def pictures():
    return to_tensor([mini.render(seed).image for seed in range(2)])


# CLIP


@torch.no_grad()
def test_clip_embeds_as_transformers_does():
    scenes = [mini.render(seed) for seed in range(4)]
    clip, processor = CLIPModel.from_pretrained(mini.clip_path()), CLIPProcessor.from_pretrained(mini.clip_path())
    inputs = processor(
        text=[scene.caption for scene in scenes],
        images=[scene.image for scene in scenes],
        padding=True,
        return_tensors="pt",
    )
    expected = clip(**inputs)
    ours = CLIPEmbedder("mini")
    images = ours.embed_images(to_tensor([scene.image for scene in scenes]))
    texts = ours.embed_texts([scene.caption for scene in scenes])
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(images), expected.image_embeds, atol=2e-3, rtol=0)
    torch.testing.assert_close(unit(texts), expected.text_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_clip_embeds_batches_of_different_sizes_at_once(pictures):
    ours = CLIPEmbedder("mini")
    together = ours.embed_images(pictures, pictures[:, :, 8:40, 8:40])
    torch.testing.assert_close(together[:2], ours.embed_images(pictures))
    torch.testing.assert_close(together[2:], ours.embed_images(pictures[:, :, 8:40, 8:40]))


# LPIPS


def test_lpips_is_that_of_torchmetrics(vgg, pictures, monkeypatch):
    # torchmetrics takes the layers of VGG-16 from torchvision; here they are handed to it.
    layers = VGG16Features.from_pretrained(vgg, layers=["relu5_3"]).features
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: layers)
    expected = torchmetrics_lpips._NoTrainLpips(net="vgg")(pictures, pictures.flip(0), normalize=True).flatten()
    ours = LPIPSFeatures(str(vgg))
    found = metrics.lpips(ours(pictures), ours(pictures.flip(0)), ours.weights)
    assert found.min() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_lpips_refuses_a_vgg_of_another_width():
    with pytest.raises(ValueError, match="16 channels in its first layer, but LPIPS is for 64"):
        LPIPSFeatures(str(mini.vgg_path()))


# DINO


@torch.no_grad()
def test_structure_keys_are_the_keys_of_the_last_layer(vit):
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = ViTModel.from_pretrained(vit, add_pooling_layer=False)
    normalised = (image - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    before = model(normalised, output_hidden_states=True).hidden_states[-2]
    last = model.layers[-1]
    expected = last.attention.k_proj(last.layernorm_before(before))
    assert expected.shape == (1, 1 + 28 * 28, 16)
    torch.testing.assert_close(StructureKeys(str(vit))(image), expected)


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [
        (64, 64, 28 * 28),
        (512, 512, 28 * 28),
        (300, 400, 28 * 37),  # 224 x 298
        (100, 400, 15 * 60),  # no side above 480: 120 x 480
    ],
)
@torch.no_grad()
def test_structure_keys_see_the_shorter_side_at_224_pixels(vit, height, width, patches):
    assert StructureKeys(str(vit))(torch.rand(1, 3, height, width)).shape == (1, 1 + patches, 16)


def test_structure_keys_refuse_weights_that_are_not_all_there(vit, tmp_path):
    weights = load_file(vit / "model.safetensors")
    del weights[next(name for name in weights if "layer" in name and "key" in name)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((vit / "config.json").read_text())
    with pytest.raises(ValueError, match=r"usable ViTModel: 1 of its weights are missing, for instance layers\.0"):
        StructureKeys(str(tmp_path))


# Inception


def test_inception_has_the_parameters_of_inception_v3():
    # Without the classifier: 23,834,568 of the network without its auxiliary head, less 1000 x 2049.
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 23_834_568 - 1000 * 2049


@torch.no_grad()
def test_inception_takes_weights_with_1008_classes_for_those_of_fid(inception, tmp_path):
    weights = load_file(inception / "model.safetensors")
    save_file(weights | {"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "model.safetensors")
    imagenet, fid = (Inception.from_pretrained(str(folder)) for folder in (inception, tmp_path))
    assert imagenet(torch.zeros(1, 3, 75, 75)).shape == fid(torch.zeros(1, 3, 75, 75)).shape == (1, 2048)

    # The last channels of a block are those behind the pooling. FID's averages leave out what lies beyond the border.
    ones = torch.ones(1, 192, 5, 5)
    corner, middle = fid.Mixed_5b(ones)[0, -32:, [0, 2], [0, 2]].T
    torch.testing.assert_close(corner, middle)
    corner, middle = imagenet.Mixed_5b(ones)[0, -32:, [0, 2], [0, 2]].T
    assert not torch.allclose(corner, middle)

    # In the last block a single one among zeros is to FID's network as good as nothing but ones: it takes the maximum.
    ones = torch.ones(1, 2048, 3, 3)
    spike = torch.zeros(1, 2048, 3, 3)
    spike[..., 1, 1] = 1
    pooled = [network.Mixed_7c(x)[0, -192:, 1, 1] for network in (fid, imagenet) for x in (ones, spike)]
    torch.testing.assert_close(pooled[0], pooled[1])
    assert not torch.allclose(pooled[2], pooled[3])


def test_inception_wants_all_weights(inception, tmp_path):
    weights = load_file(inception / "model.safetensors")
    del weights["Mixed_7c.branch_pool.conv.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"usable Inception-v3: .*Mixed_7c\.branch_pool\.conv\.weight"):
        Inception.from_pretrained(str(tmp_path))


def test_inception_sees_any_picture_as_a_square_in_minus_one_to_one():
    image = torch.zeros(1, 3, 20, 50)
    image[..., 25:] = 1
    pixels = Inception().preprocess(image)
    assert pixels.shape == (1, 3, 299, 299)
    assert (pixels[..., 0] == -1).all()
    assert (pixels[..., -1] == 1).all()


# Loading by name


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="some of clip, fid, lpips, dino, got vgg"):
        Networks({"vgg": "mini"})


def test_a_network_is_loaded_once():
    found = Networks(MINI)
    assert found.get("clip") is found.find("clip") is found.get("clip")


@pytest.mark.parametrize("part", ["clip", "fid", "lpips", "dino"])
def test_a_default_that_cannot_be_reached_is_left_out_with_one_line_that_says_why(part, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(networks.DEFAULT_MODELS, part, str(tmp_path / "nowhere"))
    found = Networks()
    with caplog.at_level(logging.WARNING, logger=networks.__name__):
        assert found.find(part) is None
        assert found.find(part) is None
    assert len(caplog.messages) == 1
    assert f"network for {part}" in caplog.text
    assert "nowhere" in caplog.text
    assert caplog.messages[0].endswith(f". --networks {part}=NAME brings them in.")
    assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize("part", ["clip", "fid", "lpips", "dino"])
def test_a_chosen_model_that_cannot_be_loaded_is_an_error(part, tmp_path):
    with pytest.raises(ValueError, match=rf"The network for {part}: .*nowhere"):
        Networks({part: str(tmp_path / "nowhere")}).find(part)


@pytest.mark.parametrize("part", ["lpips", "dino"])
def test_the_mini_world_does_without_lpips_and_dino_and_says_so(part, caplog):
    with caplog.at_level(logging.WARNING, logger=networks.__name__):
        assert Networks(MINI).find(part) is None
    assert len(caplog.messages) == 1
    assert "the mini world has none" in caplog.text


# Metrics


def test_the_true_edit_gets_the_best_of_every_metric(everything, examples):
    best = {
        "success": 1,
        "thing": 1,
        "colour": 1,
        "scene_kept": 1,
        "psnr_to_target": 100,
        "ssim_to_target": 1,
        "ssim_not_m": 1,
        "psnr": 100,
        "mse": 0,
        "background_equal": 1,
        "shift": 0,
        "pie_psnr": 100,
        "pie_mse": 0,
        "pie_ssim": 1,
    }
    for values in everything.measure(examples, [example.target for example in examples]):
        assert {name: values[name] for name in best} == pytest.approx(best)
        assert values["ssim_m_region"] < 0.7
        assert values["clip_directional"] > 0.3


def test_an_unchanged_picture_is_no_success_and_has_no_direction(everything, examples):
    for values in everything.measure(examples, [example.image for example in examples]):
        assert values["success"] == values["thing"] == 0
        assert values["colour"] == values["scene_kept"] == 1
        assert values["clip_directional"] == 0
        assert values["ssim_m"] == values["ssim_m_region"] == values["background_equal"] == 1
        assert values["psnr_to_target"] < 40


def test_the_inverted_picture_gets_the_worst(everything, examples):
    edited = [ImageChops.invert(example.image) for example in examples]
    for values in everything.measure(examples, edited):
        assert values["scene_kept"] == values["background_equal"] == 0
        assert values["ssim_not_m_region"] < 0.5
        assert values["psnr"] < 15


def test_success_is_the_thing_and_the_colour(everything, examples):
    colours = list(mini.COLOURS)
    asked = [
        dataclasses.replace(e, thing=(e.thing[0], colours[colours.index(e.thing[1]) - 1], e.thing[2]))
        for e in examples
    ]
    for values in everything.measure(asked, [example.target for example in examples]):
        assert (values["thing"], values["colour"], values["success"]) == (1, 0, 0)


def test_the_clip_metrics_are_multiples_of_the_cosine(everything, examples):
    for values in everything.measure(examples, [example.target for example in examples]):
        cosine = values["clip_similarity"]
        assert cosine > 0.2
        assert values["clip_score"] == pytest.approx(2.5 * cosine)
        assert values["pie_clip"] == pytest.approx(100 * cosine)


@torch.no_grad()
def test_clip_on_the_region_crops_for_us_and_blackens_for_pie_bench(everything, examples):
    example = examples[0]
    values = everything.measure([example], [example.target])[0]
    edit = ImageChops.lighter(example.mask, example.target_mask)
    clip = CLIPEmbedder("mini")
    rows, columns = metrics.edit_window(to_tensor([edit])[0])
    crop = example.target.crop((columns.start, rows.start, columns.stop, rows.stop))
    term = clip.embed_texts([example.target_term])
    score = metrics.clip_score(clip.embed_images(to_tensor([crop])), term)
    assert values["clip_score_region"] == pytest.approx(score.item(), abs=1e-5)
    black = Image.composite(example.target, Image.new("RGB", example.target.size), edit)
    prompt = clip.embed_texts([example.edit_prompt])
    cosine = metrics.clip_similarity(clip.embed_images(to_tensor([black])), prompt)
    assert values["pie_clip_region"] == pytest.approx(100 * cosine.item(), abs=1e-3)


@torch.no_grad()
def test_clip_on_the_region_takes_the_edit_prompt_where_there_is_no_term(everything, examples):
    example = dataclasses.replace(examples[0], target_term=None)
    renamed = dataclasses.replace(examples[0], target_term=example.edit_prompt)
    found = everything.measure([example, renamed], [example.target] * 2)
    assert found[0]["clip_score_region"] == found[1]["clip_score_region"]


def test_what_the_new_thing_covers_is_not_background(everything, examples):
    # Without the mask of the new thing, what sticks out beyond the old one counts as a background that has changed.
    target = [example.target for example in examples]
    alone = [dataclasses.replace(example, target_mask=None) for example in examples]
    both, one = everything.measure(examples, target), everything.measure(alone, target)
    assert all(values["background_equal"] == 1 for values in both)
    assert any(values["background_equal"] < 1 for values in one)


def test_pie_bench_dilutes_the_error_of_the_background_by_the_edit(everything, examples):
    example = examples[0]
    edited = ImageChops.invert(example.image)
    values = everything.measure([example], [edited])[0]
    edit = to_tensor([ImageChops.lighter(example.mask, example.target_mask)])
    assert values["pie_mse"] == pytest.approx(values["mse"] * (1 - edit.mean().item()), rel=1e-5)


def test_metrics_that_need_the_truth_are_left_out_where_there_is_none(everything, examples):
    truth = {"success", "thing", "colour", "scene_kept", "psnr_to_target", "ssim_to_target"}
    mixed = [examples[0], photo(examples[1]), examples[2]]
    found = everything.measure(mixed, [example.target for example in examples[:3]])
    assert truth <= set(found[0])
    assert set(found[1]) == set(found[0]) - truth
    assert set(found[2]) == set(found[0])


@pytest.mark.parametrize(
    ("grey", "absent"),
    [
        (
            255,
            {"ssim_not_m_region", "psnr", "mse", "background_equal", "shift", "pie_psnr", "pie_mse", "pie_ssim"},
        ),
        (0, {"ssim_m_region", "clip_score_region", "pie_clip_region"}),
        (127, {"ssim_m_region", "clip_score_region", "pie_clip_region"}),
    ],
)
def test_metrics_of_an_empty_region_are_left_out(everything, examples, grey, absent):
    example = photo(examples[0])
    usual = everything.measure([example], [example.image])[0]
    example = dataclasses.replace(example, mask=Image.new("L", example.image.size, grey))
    assert set(everything.measure([example], [example.image])[0]) == set(usual) - absent


def test_pictures_of_several_sizes_are_measured_as_each_alone(everything, examples):
    def enlarged(example, size):
        fields = {name: getattr(example, name).resize(size) for name in ("image", "mask", "target", "target_mask")}
        return dataclasses.replace(example, **fields)

    mixed = [examples[0], enlarged(examples[1], (96, 80)), examples[2], enlarged(examples[3], (80, 96))]
    edited = [example.target for example in mixed]
    for example, image, values in zip(mixed, edited, everything.measure(mixed, edited), strict=True):
        assert values == pytest.approx(everything.measure([example], [image])[0], abs=1e-4)


def test_the_values_are_plain_numbers_for_json(everything, examples):
    found = everything.measure(examples[:2], [example.target for example in examples[:2]])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_picture_that_has_changed_its_size_is_refused(everything, examples):
    with pytest.raises(ValueError, match=r"swap-0: .*the source's size, \(64, 64\), got \(64, 56\)"):
        everything.measure(examples[:1], [examples[0].image.resize((64, 56))])


def test_each_example_wants_a_picture(everything, examples):
    with pytest.raises(ValueError, match="got 1 for 2"):
        everything.measure(examples[:2], [examples[0].image])


def test_an_unknown_metric_is_refused_with_a_list_of_those_that_there_are():
    with pytest.raises(ValueError, match=r"no metric clip_scor, foo\. There are success, .*, pie_structure_distance"):
        Metrics(["foo", "ssim_m", "clip_scor"], Networks(MINI))


def test_only_what_is_asked_for_is_measured_and_loaded(examples, tmp_path):
    found = Metrics(["ssim_m", "mse"], Networks({"clip": str(tmp_path / "nowhere")}))
    assert list(found.infos) == ["ssim_m", "mse"]
    assert set(found.measure(examples[:1], [examples[0].target])[0]) == {"ssim_m", "mse"}


def test_a_metric_that_is_asked_for_by_name_and_cannot_be_had_is_an_error():
    with pytest.raises(ValueError, match="The network for lpips: the mini world has none"):
        Metrics(["ssim_m", "lpips"], Networks(MINI))


def test_without_names_the_metrics_are_those_whose_networks_can_be_had(everything):
    assert set(METRICS) - set(everything.infos) == {
        "lpips",
        "structure_distance",
        "pie_lpips_vgg",
        "pie_structure_distance",
    }


def test_what_is_left_out_is_named_with_the_option_that_brings_it_in(everything):
    option = "The network for {}: the mini world has none. --networks {}=NAME brings them in."
    assert everything.left_out == [
        f"LPIPS, PIE-Bench LPIPS, VGG: {option.format('lpips', 'lpips')}",
        f"Structure distance, PIE-Bench structure distance: {option.format('dino', 'dino')}",
    ]


def test_lpips_and_the_structure_distance_of_edits(examples, vgg, vit):
    names = ["lpips", "pie_lpips_vgg", "structure_distance", "pie_structure_distance"]
    found = Metrics(names, Networks({"lpips": str(vgg), "dino": str(vit)}))
    example = examples[0]
    assert found.measure([example], [example.image])[0] == dict.fromkeys(names, 0)
    swapped = found.measure([example], [example.target])[0]
    # The true edit changes nothing but the edit region, which PIE-Bench's LPIPS blackens and its structure keeps.
    assert swapped["pie_lpips_vgg"] == 0
    assert min(swapped[name] for name in names if name != "pie_lpips_vgg") > 1e-5
    assert swapped["pie_structure_distance"] != pytest.approx(swapped["structure_distance"], rel=0.1)


def test_fid_is_nearer_to_the_true_edits_than_to_other_scenes(everything):
    examples = [thing_swap(seed) for seed in range(40)]
    true = everything.features([example.target for example in examples])
    edited = everything.features([example.image for example in examples])
    night = everything.features([ImageChops.invert(example.image) for example in examples])
    assert true.shape == (40, 128)
    assert metrics.fid(true, true) == pytest.approx(0, abs=1e-4)
    assert metrics.fid(edited, true) < metrics.fid(night, true) / 2


@torch.no_grad()
def test_the_features_of_fid_in_the_mini_world_are_those_the_judge_judges_by(everything):
    image = mini.render(0).image
    judge = Judge.from_pretrained(mini.judge_path())
    # What `Judge.forward` wants: pixels in [-1, 1].
    expected = judge.features(2 * to_tensor([image]) - 1).mean((2, 3))
    torch.testing.assert_close(everything.features([image, mini.render(1).image])[:1], expected)


def test_the_features_of_fid_come_from_inception_where_it_is_chosen(inception):
    images = [mini.render(0).image, mini.render(1).image.resize((96, 64))]
    features = Networks({"fid": str(inception)}).get("fid")(images)
    assert features.shape == (2, 2048)
    network = Inception.from_pretrained(str(inception))
    torch.testing.assert_close(features[1:], network(network.preprocess(to_tensor(images[1:]))))


def test_every_metric_says_what_it_is():
    for name, info in METRICS.items():
        assert info.title, name
        assert info.better in ("higher", "lower", None), name
        assert len(info.about) > 20, name
    assert [name for name, info in METRICS.items() if info.better is None] == ["ssim_m", "ssim_m_region"]


def test_no_two_files_of_the_evaluation_import_each_other():
    imports = {
        file.stem: [
            node.module
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
        ]
        for file in Path(metrics.__file__).parent.glob("*.py")
    }
    assert "metrics" in imports["networks"]
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert order.index("metrics") < order.index("networks") < order.index("measuring")
