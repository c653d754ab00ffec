"""The card of a fine-tuned model, and its push: the real client in processes of its own, against a Hub on loopback."""

import ast
import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from hub_server import TOKEN, HubServer, files_in, output
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from test_pipeline import box_mask, make_pipe, picture

from diffusers_iedit import IEditPipeline, pipeline
from diffusers_iedit.finetuning import hub as module
from diffusers_iedit.finetuning.hub import CODE_FILES, LORA_FILE, check_license, push_folder, write_model_card


TEMPLATE = Path(__file__).parents[1] / "model_card.md"
BASE = "CompVis/stable-diffusion-v1-4"
UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS = {"learning_rate": 2e-4, "train_blocks": "alternate", "resolution": 384}
EVALUATION = [{"method": "SDEdit", "clip_score": 0.651234}, {"method": "iEdit-M", "clip_score": 0.674}]


def write_card(folder, **changes):
    """A card with everything in it, but for what `changes` says; returns it as read back."""
    arguments = {
        "repo_id": "me/iedit",
        "base_model": BASE,
        "dataset": "me/pairs",
        "settings": SETTINGS,
        "losses": {"loss": 1.23456, "loc": 0.75},
        "loss_plot": "loss.png",
        "evaluation": EVALUATION,
        "pictures": ["images/1.png"],
        "license": "creativeml-openrail-m",
        "lora": True,
    }
    write_model_card(folder, TEMPLATE, **(arguments | changes))
    return ModelCard.load(folder / "README.md")


def sentences(card):
    """The card's text in one line, so that it does not matter where the template breaks its lines."""
    return " ".join(card.text.split())


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "stable-diffusion"
    make_pipe(StableDiffusionImg2ImgPipeline).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(base_folder, tmp_path_factory):
    """What a LoRA run has to push, but for the card: the pipeline with the LoRA merged in, the LoRA, the pictures."""
    folder = tmp_path_factory.mktemp("model") / "run"
    pipe = IEditPipeline.from_pretrained(base_folder)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    lora = get_peft_model_state_dict(pipe.unet)
    IEditPipeline.save_lora_weights((folder / LORA_FILE).parent, unet_lora_layers=lora)
    pipe = IEditPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(folder, subfolder="lora", weight_name=Path(LORA_FILE).name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)
    (folder / "images").mkdir()
    picture().save(folder / "images" / "1.png")
    picture().save(folder / "loss.png")
    return folder


@pytest.fixture
def run_folder(model, tmp_path):
    """All that a run leaves, most of it for the machine that it ran on."""
    folder = tmp_path / "run folder"
    shutil.copytree(model, folder)
    write_card(folder)
    leave_the_rest(folder)
    return folder


def leave_the_rest(folder):
    for name in (
        "training_args.json",
        "checkpoint-2/optimizer.bin",
        "checkpoint-2/unet/config.json",
        f"checkpoint-2/{UNET}",
        "logs/events.out.tfevents",
        "cache/latents.safetensors",
        "images/of-an-earlier-step.png",
        "unet/.config.json.part",
        "unet/diffusion_pytorch_model.bin",
        "notes.py",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"hub_token": TOKEN, "output_dir": str(folder)}))


def change_weights(folder):
    weights = bytearray((folder / UNET).read_bytes())
    weights[-1] ^= 1
    (folder / UNET).write_bytes(weights)


# The card


@pytest.fixture
def folder(tmp_path):
    """A folder with the pictures that `write_card` shows."""
    (tmp_path / "images").mkdir()
    for name in ("loss.png", "images/1.png", "images/2.png"):
        picture().save(tmp_path / name)
    return tmp_path


def test_the_metadata_says_what_the_hub_sorts_models_by(folder):
    assert write_card(folder).data.to_dict() == {
        "license": "creativeml-openrail-m",
        "base_model": BASE,
        "datasets": ["me/pairs"],
        "pipeline_tag": "image-to-image",
        "library_name": "diffusers",
        "tags": [
            "iedit",
            "image-editing",
            "stable-diffusion",
            "stable-diffusion-diffusers",
            "diffusers-training",
            "lora",
        ],
    }


LEAST = {"base_model": "mini", "license": None, "evaluation": None, "pictures": [], "lora": False}


@pytest.mark.parametrize("changes", [{}, LEAST], ids=["all", "least"])
def test_a_filled_card_has_no_placeholder(folder, changes, monkeypatch):
    # A variable that nothing fills would be rendered as nothing; so it stays as it is.
    monkeypatch.setattr(jinja2, "Template", partial(jinja2.Template, undefined=jinja2.DebugUndefined))
    text = str(write_card(folder, **changes))
    for placeholder in ("{{", "{%", "None", "undefined", "More Information Needed", "TODO"):
        assert placeholder not in text


def test_a_card_without_a_license_says_that_the_base_models_applies(folder):
    stated, inherited = write_card(folder), write_card(folder, license=None)
    assert "license" not in inherited.data.to_dict()
    assert "The licence of the base model applies" in sentences(inherited)
    assert "The licence of the base model applies" not in sentences(stated)
    assert "`creativeml-openrail-m`" in sentences(stated)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Apache 2.0", "near to it are apache-2.0"),
        ("openrail-m", "openrail"),
        ("MIT", "mit"),
        ("my own", ""),
        ("", ""),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_refused_with_what_is_near(folder, name, near):
    with pytest.raises(ValueError, match=rf"`license` has to be a name from https.*, got '{name}'.*{near}"):
        check_license(name)
    with pytest.raises(ValueError, match="`license` has to be"):
        write_card(folder, license=name)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "name", ["apache-2.0", "creativeml-openrail-m", "openrail++", "cc-by-nc-sa-4.0", "other", None]
)
def test_a_license_of_the_hub_is_taken(name):
    check_license(name)


HOSTILE = """](https://evil) <script>x</script> | `x` {{ repo_id }}

# --- *y* ![a](training_args.json)"""


def test_what_people_give_stays_text_in_the_card(folder):
    card = write_card(
        folder,
        repo_id='me/"""\n```\n# evil',
        base_model=HOSTILE,
        dataset=HOSTILE,
        settings={"validation_prompts": [HOSTILE], "seed": HOSTILE},
        evaluation=[{"method": HOSTILE}],
    )
    plain = write_card(folder, settings={"validation_prompts": "x", "seed": "x"}, evaluation=[{"method": "x"}])
    headings = [[line for line in each.text.splitlines() if line.startswith("#")] for each in (card, plain)]
    assert headings[0] == headings[1]
    assert not {"base_model", "datasets"} & set(card.data.to_dict())
    # What is left without code is neither HTML nor a link, and adds no column to a table.
    text = re.sub(r"```.*?\n```$|(`{2,}) .+? \1", "", card.text, flags=re.DOTALL | re.MULTILINE)
    assert "<script>" not in text
    assert "](https://evil)" not in text.replace("\\]", "")
    assert re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) == ["images/1.png", "loss.png"]
    rows = [line for line in card.text.splitlines() if "validation_prompts" in line]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3]
    (repo,) = re.findall(r"^repo = (.*)  # this repository$", card.text, flags=re.MULTILINE)
    assert ast.literal_eval(repo) == 'me/"""\n```\n# evil'


def test_hub_ids_are_linked(folder):
    text = sentences(write_card(folder))
    assert f"fine-tuned with a LoRA from [{BASE}](https://huggingface.co/{BASE})" in text
    assert "on [me/pairs](https://huggingface.co/datasets/me/pairs)" in text


def test_local_folders_are_named_in_the_text_alone_and_without_their_path(folder, monkeypatch):
    (folder / "own" / "base").mkdir(parents=True)
    monkeypatch.chdir(folder)
    card = write_card(folder, base_model="own/base", dataset=f"{folder}/mined-pairs/", settings={"data": folder / "x"})
    assert not {"base_model", "datasets"} & set(card.data.to_dict())
    assert "from the local model `base` on the local data set `mined-pairs`" in sentences(card)
    assert "own/base" not in str(card)
    assert str(folder) not in str(card)


def test_the_mini_model_is_called_by_its_name(folder):
    card = write_card(folder, base_model="mini")
    assert "base_model" not in card.data.to_dict()
    assert "from the mini model of diffusers-iedit" in sentences(card)


def test_the_tables_hold_settings_losses_and_evaluation(folder):
    settings = SETTINGS | {"validation_prompts": ["a|b", "c\nd"], "seed": None}
    lines = write_card(folder, settings=settings).text.splitlines()
    assert "| learning_rate | 0.0002 |" in lines
    assert "| validation_prompts | a\\|b, c d |" in lines
    assert not [line for line in lines if line.startswith("| seed")]
    assert {"| loss | 12 | 1.235 |", "| loc | 11 | 0.75 |"} <= set(lines)
    start = lines.index("| method | clip_score |")
    assert lines[start + 1 : start + 4] == ["|---|---|", "| SDEdit | 0.6512 |", "| iEdit-M | 0.674 |"]


def test_a_run_without_an_evaluation_says_so(folder):
    assert "measured no metrics" in sentences(write_card(folder, evaluation=None))
    assert "measured no metrics" not in sentences(write_card(folder))


def test_the_pictures_are_shown(folder):
    text = write_card(folder, pictures=["images/1.png", "images/2.png"]).text
    assert re.findall(r"!\[.+\]\((.+)\)", text) == ["images/1.png", "images/2.png", "loss.png"]


def test_how_to_load_the_lora_alone_is_told_where_there_is_one(folder):
    with_lora, without = write_card(folder), write_card(folder, lora=False)
    assert "load_lora_weights" in with_lora.text
    assert "load_lora_weights" not in without.text
    assert "lora" not in without.data.tags


@pytest.mark.parametrize("changes", [{"pictures": ["images/3.png"]}, {"loss_plot": "images/3.png"}])
def test_a_picture_that_is_not_there_is_named_and_the_card_stays(folder, changes):
    before = str(write_card(folder))
    with pytest.raises(ValueError, match=r"`loss_plot` and `pictures` .* 'images/3\.png' is not there"):
        write_card(folder, **changes)
    assert (folder / "README.md").read_text() == before


# Before a run


def check(hub, repo_id="me/iedit", **environment):
    code = f"from diffusers_iedit.finetuning.hub import check_hub; print(check_hub({repo_id!r}))"
    return hub.run(code, **environment)


def test_the_check_creates_the_repository_and_gives_its_whole_name(hub):
    for _ in range(2):
        assert output(check(hub, "iedit")) == "me/iedit\n"
    assert list(hub.repos["models"]) == ["me/iedit"]


@pytest.mark.parametrize("exists", [False, True])
def test_the_check_refuses_a_token_that_may_not_write(hub, exists):
    if exists:
        hub.add("models", "me/iedit", {})
    error = check(hub, HF_TOKEN="hf_wrong").stderr
    refused = "ValueError: me/iedit on the Hub cannot be written to with the token in HF_TOKEN or of `hf auth login`: "
    assert refused in error
    assert "401 Unauthorized" in error.split(refused)[1]
    assert "hf_wrong" not in error


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "Connection refused"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ],
)
def test_the_check_says_why_the_hub_cannot_be_reached(hub, environment, reason):
    error = check(hub, **environment).stderr
    assert re.search(f"ValueError: me/iedit on the Hub cannot be written to .* {reason}", error)


# The push


@pytest.fixture(scope="module")
def pushed(model, tmp_path_factory):
    """A Hub that got a run's folder, `.local`; `.printed` is what the process said."""
    folder = tmp_path_factory.mktemp("pushed")
    shutil.copytree(model, folder / "run")
    write_card(folder / "run", dataset="own ![pairs](training_args.json)")
    leave_the_rest(folder / "run")
    code = f"""
from diffusers_iedit.finetuning.hub import check_hub, push_folder
token = {TOKEN!r}
check_hub("me/iedit", token, private=True)
print(push_folder({str(folder / "run")!r}, "me/iedit", token=token, commit_message="10 000 steps"))
"""
    with HubServer(folder) as server:
        # With a wrong token all around, only the argument lets the push through.
        process = server.run(code, HF_TOKEN="wrong")
        assert output(process) == f"{server.endpoint}/me/iedit\n"
        server.printed = process.stdout + process.stderr
        server.local = folder / "run"
        yield server


def test_the_code_files_are_those_of_the_pipeline():
    assert CODE_FILES == pipeline.CODE_FILES


def test_a_push_holds_the_model_its_card_and_its_pictures_and_nothing_else(pushed, model):
    card = {"README.md": (pushed.local / "README.md").read_bytes()}
    assert pushed.repos["models"]["me/iedit"].files() == files_in(model) | card


def test_a_push_is_one_commit(pushed):
    repo = pushed.repos["models"]["me/iedit"]
    assert [commit.message for commit in repo.commits.values()] == ["initial commit", "10 000 steps"]
    assert repo.private


def test_a_push_gives_away_neither_the_token_nor_where_the_run_lay(pushed, base_folder):
    assert any(TOKEN in request.headers.get("authorization", "") for request in pushed.requests)
    secrets = [TOKEN, str(pushed.local), str(base_folder)]
    said = [pushed.printed.encode(), *(request.path.encode() + request.body for request in pushed.requests)]
    for text in [*said, *pushed.repos["models"]["me/iedit"].files().values()]:
        assert not [secret for secret in secrets if secret.encode() in text]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with the files that the card's example reads."""
    folder = tmp_path_factory.mktemp("scene")
    picture().save(folder / "photo.png")
    box_mask().save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def opened(pushed, base_folder, scene):
    """What the code of the pushed card does: the class behind each door by `module.class`, edits in `scene`."""
    pushed.add("models", BASE, files_in(base_folder))
    card = pushed.repos["models"]["me/iedit"].files()["README.md"].decode()
    loading, editing, lora = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    setup, *doors = re.split(r"(?=# \d\. )", loading)
    start = f"""
import os
import sys
import torch
os.chdir({str(scene)!r})
opened = {{}}

def edit(door, code):
    torch.manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    exec(code, globals())
    edited.save(door + ".png")
    opened[door] = type(pipe).__module__ + "." + type(pipe).__name__
"""
    end = "\nimport json; print(json.dumps(opened))"
    stock = 'edited = pipe("a photo of a blue car", load_image("photo.png")).images[0]'
    with_package = f"""
{start}{setup}
{doors[0]}edit("door_1", {editing!r})
pipe = IEditPipeline.from_pretrained({BASE!r})
{lora}edit("lora", {editing!r}){end}"""
    without_package = f"""
{start}sys.modules["diffusers_iedit"] = None
{setup}
{doors[1]}edit("door_2", {editing!r})
{doors[2]}edit("door_3", {editing!r})
{doors[3]}edit("door_4", {stock!r}){end}"""
    return json.loads(output(pushed.run(with_package))) | json.loads(output(pushed.run(without_package)))


def expected(folder):
    pipe = IEditPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return np.asarray(pipe(picture(), "a photo of a blue car", mask_image=box_mask()).images[0])


@pytest.mark.parametrize(
    ("door", "opens"),
    [
        ("door_1", "diffusers_iedit.pipeline.IEditPipeline"),
        ("door_2", "diffusers_modules.*.IEditPipeline"),
        ("door_3", "diffusers_modules.*.IEditPipeline"),
        ("door_4", "diffusers.pipelines.*.StableDiffusionImg2ImgPipeline"),
    ],
)
def test_the_cards_own_code_opens_the_model_by_each_of_the_four_doors(opened, door, opens):
    assert re.fullmatch(opens, opened[door])


def test_what_the_cards_doors_open_edits_like_what_was_pushed(opened, pushed, base_folder, scene):
    images = {door: np.asarray(Image.open(scene / f"{door}.png")) for door in opened}
    tuned, base = expected(pushed.local), expected(base_folder)
    assert not np.array_equal(tuned, base)
    for door, image in {"door_1": tuned, "door_2": tuned, "door_3": base}.items():
        assert np.array_equal(images[door], image)
    assert not np.array_equal(images["door_4"], np.asarray(picture()))


def test_the_lora_by_itself_over_the_base_model_is_the_model(opened, pushed, scene):
    difference = np.asarray(Image.open(scene / "lora.png")).astype(int) - expected(pushed.local)
    assert abs(difference).max() <= 1


def test_the_command_pushes_too_and_the_card_names_where_it_lies(hub, run_folder):
    before = files_in(run_folder)
    process = hub.run([sys.executable, "-m", module.__name__, str(run_folder), "me/other", "--private"])
    assert output(process) == f"{hub.endpoint}/me/other\n"
    repo = hub.repos["models"]["me/other"]
    assert repo.private
    assert b'repo = "me/other"' in repo.files()["README.md"]
    assert b"me/iedit" not in repo.files()["README.md"]
    assert files_in(run_folder) == before


def push(hub, folder, **environment):
    code = f"""
import time
from diffusers_iedit.finetuning.hub import push_folder
time.sleep = lambda seconds: None  # The client would wait for 23 s between its tries.
push_folder({str(folder)!r}, "me/iedit", private=True)
"""
    return hub.run(code, **environment)


def test_pushing_again_updates_the_model_and_keeps_what_others_added(hub, run_folder):
    output(push(hub, run_folder))
    repo = hub.repos["models"]["me/iedit"]
    old = repo.refs["main"]
    by_hand = {"unet/diffusion_pytorch_model.fp16.safetensors": b"half", "images/by-hand.png": b"picture"}
    repo.commit("by hand", repo.files() | by_hand)
    change_weights(run_folder)
    write_card(run_folder, settings={"learning_rate": 1e-4})
    output(push(hub, run_folder))
    updated = {name: (run_folder / name).read_bytes() for name in (UNET, "README.md")}
    assert repo.files() == repo.files(old) | by_hand | updated
    assert repo.files()[UNET] != repo.files(old)[UNET]


def test_a_folder_without_a_card_leaves_that_of_the_hub(hub, run_folder):
    hub.add("models", "me/iedit", {"README.md": b"by hand"})
    (run_folder / "README.md").unlink()
    output(push(hub, run_folder))
    files = hub.repos["models"]["me/iedit"].files()
    assert files["README.md"] == b"by hand"
    assert UNET in files


def command_to_push_again(error):
    command = shlex.split(error.strip().splitlines()[-1])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


@pytest.mark.parametrize(
    ("pattern", "times", "message"),
    [
        # The client tries to send a file six times, the commit once.
        ("PUT /lfs/", 6, f"Error while uploading '{UNET}' to the Hub"),
        ("POST .*/commit/", 1, ""),
    ],
    ids=["file", "commit"],
)
def test_a_push_cut_off_mid_way_changes_nothing_and_says_how_to_repeat_it(hub, run_folder, pattern, times, message):
    output(push(hub, run_folder))
    repo = hub.repos["models"]["me/iedit"]
    old = repo.refs["main"]
    old_files = repo.files()
    change_weights(run_folder)
    local = files_in(run_folder)
    hub.fail(pattern, times=times)
    process = push(hub, run_folder)
    assert f"RuntimeError: The push to me/iedit failed: {message}" in process.stderr
    assert TOKEN not in process.stdout + process.stderr
    assert repo.refs["main"] == old
    assert repo.files() == old_files
    assert files_in(run_folder) == local

    output(hub.run(command_to_push_again(process.stderr)))
    assert repo.files() == old_files | {UNET: local[UNET]}
    assert repo.files(old) == old_files
    assert len(repo.commits) == 3


def test_a_push_with_a_refused_token_can_be_repeated_with_another(hub, run_folder):
    process = push(hub, run_folder, HF_TOKEN="hf_wrong")
    assert "RuntimeError: The push to me/iedit failed: Client error '401 Unauthorized'" in process.stderr
    assert "HF_TOKEN or after `hf auth login`" in process.stderr
    assert "hf_wrong" not in process.stdout + process.stderr
    command = command_to_push_again(process.stderr)
    refused = hub.run(command, HF_TOKEN="hf_wrong")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: The push to me/iedit failed: Client error '401 Unauthorized'")
    assert not hub.repos["models"]
    output(hub.run(command))
    repo = hub.repos["models"]["me/iedit"]
    assert repo.private
    assert UNET in repo.files()


@pytest.mark.parametrize(
    ("missing", "named"), [("model_index.json", "model_index.json"), ("pipeline.py", "pipeline.py"), ("unet", "unet")]
)
def test_a_folder_that_is_no_whole_pipeline_is_not_pushed(run_folder, missing, named):
    path = run_folder / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=f"`folder` has to be a saved IEditPipeline, but .* lacks .*{named}"):
        push_folder(run_folder, "me/iedit")
