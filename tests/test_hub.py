"""Pushing to the Hub and loading from it: the real client in processes of its own, against a Hub on loopback."""

import json
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, HubServer, files_in, output
from PIL import Image

from diffusers_iedit import mini


CODE_FILES = {"pipeline.py", "scheduling_iedit.py", "masking_iedit.py", "regions_iedit.py"}
STOCK = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
UNET = "unet/diffusion_pytorch_model.safetensors"
CARD = b"---\nlicense: mit\nlibrary_name: diffusers\n---\n\n# Written by hand\n"

# How the code of the processes below begins. They read and write in the `scene` folder.
SCENE = """
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

SCENE = Path(os.environ["SCENE"])
MASK = Image.open(SCENE / "mask.png")

def edit(pipe, name, **mask):
    pipe.set_progress_bar_config(disable=True)
    what = {"image": Image.open(SCENE / "source.png"), "prompt": "an orange car and a red cat on green grass"}
    how = {"strength": 0.75, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    pipe(**what, **how, **mask).images[0].save(SCENE / name)

def change(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
"""


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with `source.png` and `mask.png`."""
    folder = tmp_path_factory.mktemp("scene")
    drawn = mini.render(22)
    drawn.image.save(folder / "source.png")
    drawn.mask.save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, scene):
    """A Hub that got the mini pipeline both ways; the same is saved as `local`, an edit with it as `expected.png`."""
    code = f"""
from diffusers_iedit import IEditPipeline, mini
pipe = IEditPipeline.from_pretrained(mini.model_path())
pipe.push_to_hub("me/iedit", token={TOKEN!r})
to = {{"repo_id": "me/saved", "token": {TOKEN!r}, "commit_message": "Weights and code", "private": True}}
pipe.save_pretrained(SCENE / "local", push_to_hub=True, **to)
edit(pipe, "expected.png", mask_image=MASK)
"""
    with HubServer(tmp_path_factory.mktemp("pushed")) as server:
        # With a wrong token all around, only the argument lets the pushes through.
        output(server.run(SCENE + code, SCENE=str(scene), HF_TOKEN="wrong"))
        yield server


@pytest.fixture(scope="module")
def iedit_files(pushed):
    return pushed.repos["models"]["me/iedit"].files()


# Pushing


@pytest.mark.parametrize("repo_id", ["me/iedit", "me/saved"])
def test_a_push_arrives_whole_in_one_commit(pushed, scene, repo_id):
    repo = pushed.repos["models"][repo_id]
    assert len(repo.commits) == 2  # The first one made the repository.
    files = dict(repo.files())
    assert b"library_name: diffusers" in files.pop("README.md")
    assert files == files_in(scene / "local")
    assert {path for path in files if path.endswith(".py")} == CODE_FILES
    assert {"model_index.json", UNET} <= set(files)


def test_save_pretrained_passes_on_how_to_push(pushed):
    repo = pushed.repos["models"]["me/saved"]
    assert repo.private
    assert not pushed.repos["models"]["me/iedit"].private
    assert repo.commits[repo.refs["main"]].message == "Weights and code"


def test_no_upload_contains_the_token(pushed):
    assert any(TOKEN in request.headers.get("authorization", "") for request in pushed.requests)
    for request in pushed.requests:
        assert TOKEN.encode() not in request.path.encode() + request.body
    for repo in pushed.repos["models"].values():
        assert not [path for path, content in repo.files().items() if TOKEN.encode() in content]


def test_a_wrong_token_cannot_write(hub):
    code = "from huggingface_hub import HfApi; HfApi().create_repo('me/iedit')"
    assert "Invalid credentials" in hub.run(code, HF_TOKEN="wrong").stderr
    assert not hub.repos["models"]


def test_pushing_again_makes_a_new_revision_and_keeps_the_old_one_and_the_card(hub, iedit_files, scene):
    old = hub.add("models", "me/iedit", iedit_files | {"README.md": CARD})
    code = f"""
from diffusers_iedit import IEditPipeline
pipe = IEditPipeline.from_pretrained("me/iedit")
change(pipe)
pipe.push_to_hub("me/iedit", commit_message="Better")
change(pipe)
pipe.save_pretrained(SCENE / "proposed", push_to_hub=True, repo_id="me/iedit", create_pr=True)
edit(IEditPipeline.from_pretrained("me/iedit"), "new.png", mask_image=MASK)
old_one = {{"revision": {old!r}, "cache_dir": SCENE / "empty"}}
edit(IEditPipeline.from_pretrained("me/iedit", **old_one), "old.png", mask_image=MASK)
"""
    output(hub.run(SCENE + code, SCENE=str(scene)))
    repo = hub.repos["models"]["me/iedit"]
    assert repo.commits[repo.refs["main"]].message == "Better"
    assert repo.files()["README.md"] == CARD
    weights = [repo.files(revision)[UNET] for revision in (old, "main", "refs/pr/1")]
    assert len(set(weights)) == len(repo.commits) == 3
    assert np.array_equal(pixels(scene / "old.png"), pixels(scene / "expected.png"))
    assert not np.array_equal(pixels(scene / "new.png"), pixels(scene / "expected.png"))


def test_a_push_cut_off_mid_way_changes_nothing_and_can_be_repeated(hub, iedit_files, scene):
    old = hub.add("models", "me/iedit", iedit_files)
    # The client tries to send a file six times, the commit once.
    hub.fail("PUT /lfs/", times=6)
    hub.fail("POST .*/commit/", times=1)
    code = """
import time
from diffusers_iedit import IEditPipeline, mini
from huggingface_hub import HfApi

pipe = IEditPipeline.from_pretrained(mini.model_path())
change(pipe)
time.sleep = lambda seconds: None  # The client would wait for 23 s between its tries.
for attempt in range(2):
    try:
        pipe.save_pretrained(SCENE / "changed", push_to_hub=True, repo_id="me/iedit")
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), HfApi().model_info("me/iedit").sha]))
pipe.push_to_hub("me/iedit")
"""
    file_lost, commit_lost = map(json.loads, output(hub.run(SCENE + code, SCENE=str(scene))).splitlines())
    assert file_lost == ["RuntimeError", f"Error while uploading '{UNET}' to the Hub.", old]
    assert commit_lost[0] in ("ReadError", "WriteError", "RemoteProtocolError")
    assert commit_lost[2] == old

    repo = hub.repos["models"]["me/iedit"]
    assert len(repo.commits) == 2
    assert repo.files(old) == iedit_files
    local = files_in(scene / "changed")
    assert local == {path: content for path, content in repo.files().items() if path != "README.md"}
    assert local[UNET] != iedit_files[UNET]


# Loading: the four doors


@pytest.fixture(scope="module")
def doors(pushed, iedit_files, scene):
    """The pipelines behind the doors that need no package, opened without it: `module.class` of each."""
    index = json.loads(iedit_files["model_index.json"])
    stock_index = {name: index[name] for name in index if name.startswith("_") or name in STOCK}
    stock = {path: content for path, content in iedit_files.items() if path.split("/")[0] in STOCK}
    pushed.add("models", "me/stock", stock | {"model_index.json": json.dumps(stock_index).encode()})
    code = """
sys.modules["diffusers_iedit"] = None
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

opened = {}
try:
    DiffusionPipeline.from_pretrained("me/iedit", custom_pipeline="me/iedit")
except ValueError as error:
    opened["untrusted"] = str(error)
code = {"custom_pipeline": "me/iedit", "trust_remote_code": True}
pipes = {
    "door_2": DiffusionPipeline.from_pretrained("me/iedit", **code),
    "door_3": DiffusionPipeline.from_pretrained("me/stock", **code),
    "door_4": StableDiffusionImg2ImgPipeline.from_pretrained("me/iedit"),
    "door_4_by_any_name": DiffusionPipeline.from_pretrained("me/iedit"),
}
for door, pipe in pipes.items():
    opened[door] = f"{type(pipe).__module__}.{type(pipe).__name__}"
    edit(pipe, f"{door}.png", **({} if "door_4" in door else {"mask_image": MASK}))
print(json.dumps(opened))
"""
    return json.loads(output(pushed.run(SCENE + code, SCENE=str(scene))))


def test_door_1_the_command_edits_with_a_model_of_the_hub(pushed, scene):
    code = f"""
import sys
from diffusers_iedit import cli
prompt = "an orange car and a red cat on green grass"
options = "--model me/iedit --strength 0.75 --steps 4 --seed 0 --mask {scene}/mask.png -o {scene}/door_1.png"
sys.exit(cli.main(["edit", "{scene}/source.png", prompt, *options.split()]))
"""
    output(pushed.run(code))
    assert np.array_equal(pixels(scene / "door_1.png"), pixels(scene / "expected.png"))


@pytest.mark.parametrize("door", ["door_2", "door_3"])
def test_doors_2_and_3_run_the_code_of_the_hub_without_this_package(doors, scene, door):
    assert doors[door].startswith("diffusers_modules.")
    assert doors[door].endswith(".IEditPipeline")
    assert np.array_equal(pixels(scene / f"{door}.png"), pixels(scene / "expected.png"))


def test_a_pinned_commit_runs_its_own_code_whatever_was_pushed_after_it(hub, iedit_files, scene):
    pinned = hub.add("models", "me/iedit", iedit_files)
    newest = iedit_files | {"pipeline.py": b"raise SystemExit('the newest code ran')", UNET: b"no weights"}
    hub.repos["models"]["me/iedit"].commit("Another", newest)
    code = f"""
sys.modules["diffusers_iedit"] = None
from diffusers import DiffusionPipeline

pin = {{"revision": {pinned!r}, "custom_revision": {pinned!r}}}
pipe = DiffusionPipeline.from_pretrained("me/iedit", custom_pipeline="me/iedit", trust_remote_code=True, **pin)
print(type(pipe).__module__)
try:
    # The revision of the weights is not that of the code.
    DiffusionPipeline.from_pretrained(
        "me/iedit", custom_pipeline="me/iedit", trust_remote_code=True, revision={pinned!r}
    )
except SystemExit as error:
    print(error)
"""
    module, unpinned = output(hub.run(SCENE + code, SCENE=str(scene))).splitlines()
    assert pinned in module
    assert unpinned == "the newest code ran"


def test_code_of_the_hub_runs_only_with_the_callers_trust(doors):
    assert "trust_remote_code" in doors["untrusted"]


@pytest.mark.parametrize("door", ["door_4", "door_4_by_any_name"])
def test_door_4_the_weights_of_the_hub_open_in_stock_diffusers(doors, scene, door):
    assert doors[door].startswith("diffusers.pipelines.")
    assert doors[door].endswith(".StableDiffusionImg2ImgPipeline")
    assert not np.array_equal(pixels(scene / f"{door}.png"), pixels(scene / "source.png"))


def test_a_download_cut_off_mid_way_goes_on_where_it_stopped(hub):
    weights = np.random.default_rng(0).bytes(25_000_000)
    hub.add("models", "me/large", {"model.safetensors": weights})
    hub.fail("GET .*/model.safetensors", times=1)
    code = "import huggingface_hub; print(huggingface_hub.hf_hub_download('me/large', 'model.safetensors'))"
    assert Path(output(hub.run(code)).strip()).read_bytes() == weights
    whole, rest = [request.headers.get("range") for request in hub.requests if request.method == "GET"]
    assert whole is None
    # The client keeps blocks of 10 MiB.
    assert rest == f"bytes={10 * 2**20}-"


# Datasets


@pytest.fixture(scope="module")
def loaded_pairs(tmp_path_factory, scene):
    """Pairs pushed in one process and loaded in another: what `load_dataset` gave, by repository and streaming."""
    start = """
import json
import os
from pathlib import Path
import datasets
from huggingface_hub import HfApi
SCENE = Path(os.environ["SCENE"])
"""
    push = """
image = {"bytes": (SCENE / "source.png").read_bytes(), "path": None}
columns = {"edit_prompt": ["a red car", "a blue car"], "source_image": [image, image]}
pairs = datasets.Dataset.from_dict(columns).cast_column("source_image", datasets.Image())
pairs.push_to_hub("me/pushed")

pairs.to_parquet(SCENE / "pairs/data/train-00000-of-00001.parquet")
card = "---\\nconfigs:\\n- config_name: default\\n  data_files:\\n  - split: train\\n    path: data/train-*\\n---\\n"
(SCENE / "pairs/README.md").write_text(card)
HfApi().create_repo("me/uploaded", repo_type="dataset")
HfApi().upload_folder(repo_id="me/uploaded", repo_type="dataset", folder_path=SCENE / "pairs")
"""
    load = """
loaded = {}
for repo_id in ("me/pushed", "me/uploaded"):
    for streaming in (False, True):
        rows = list(datasets.load_dataset(repo_id, split="train", streaming=streaming))
        file = SCENE / f"{len(loaded)}.png"
        rows[1]["source_image"].save(file)
        loaded[f"{repo_id} {streaming}"] = [[row["edit_prompt"] for row in rows], str(file)]
print(json.dumps(loaded))
"""
    with HubServer(tmp_path_factory.mktemp("pairs")) as server:
        output(server.run(start + push, SCENE=str(scene)))
        yield json.loads(output(server.run(start + load, SCENE=str(scene))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("repo_id", ["me/pushed", "me/uploaded"])
def test_pushed_pairs_load_from_the_hub(loaded_pairs, scene, repo_id, streaming):
    prompts, image = loaded_pairs[f"{repo_id} {streaming}"]
    assert prompts == ["a red car", "a blue car"]
    assert np.array_equal(pixels(image), pixels(scene / "source.png"))
