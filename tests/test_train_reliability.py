"""train_iedit.py under accidents: killed, told to stop, no numbers any more, out of disk, in several processes."""

# ruff: noqa: F811 (fixtures are imported and then named as arguments)

import contextlib
import random
import re
import shutil
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import small_pairs
import torch
from accelerate import PartialState
from accidents import two_ranks
from hub_server import files_in
from PIL import Image
from safetensors.torch import load_file, save_file
from small_pairs import (
    UNET,
    arguments,
    calling,
    command,
    losses,
    make_rows,
    processes,
    run,
    same_end,
    train,
    weights,
    write_pairs,
)
from test_build_reliability import small_disk  # noqa: F401
from test_train import (  # noqa: F401
    base,
    changed,
    close,
    pairs,
    plain,
    sd3_base,
    sd3_plain,
    sdxl_base,
    sdxl_plain,
)

from diffusers_iedit import IEditPipeline
from diffusers_iedit.finetuning.checkpoints import list_checkpoints, load_checkpoint
from diffusers_iedit.finetuning.families import load_base
from diffusers_iedit.finetuning.outputs import LossLog
from diffusers_iedit.resuming import lock_folder


FINETUNING = "diffusers_iedit.finetuning"

RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def context():
    return processes()


class Case(NamedTuple):
    """A base, and what four steps of a training leave of it."""

    base: Path
    plain: Path
    options: tuple = ()


@pytest.fixture(params=["", pytest.param("sdxl_", marks=pytest.mark.slow), "sd3_"], ids=["SD", "SDXL", "SD3"])
def case(request):
    """Each family."""
    base, plain = (request.getfixturevalue(f"{request.param}{name}") for name in ("base", "plain"))
    return Case(base, plain, ("--lora_rank", 0) if request.param else ())


def start(context, *args, **kwargs):
    process = context.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(process, timeout=120):
    """Its exit code."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        pytest.fail("the process did not come to its end")
    return process.exitcode


def all_complete(output_dir, plain, name="checkpoint-1"):
    """Whether each checkpoint has the files that belong to one, and all can be read."""
    expected = {file.name for file in (plain / name).iterdir()}
    for checkpoint in list_checkpoints(output_dir):
        assert {file.name for file in checkpoint.iterdir()} == expected, checkpoint
        load_file(checkpoint / "trained.safetensors")
        torch.load(checkpoint / "optimizer.bin")
    return True


# Killed


@pytest.mark.parametrize(
    ("function", "number", "kept"),
    [
        # In the fourth step after the losses of the third have been written.
        pytest.param(f"{FINETUNING}.models.batch_loss", 4, [2]),
        # While the checkpoint of the fourth step is written, when only state.json lacks.
        pytest.param("pathlib.Path.write_text", 3, [2]),
        # After the last checkpoint, when half of the pipeline is in its place.
        pytest.param("pathlib.Path.replace", 5, [4]),
        # In the first step; after a step, before its losses are written; before the checkpoint's first file.
        pytest.param(f"{FINETUNING}.models.batch_loss", 1, [], marks=pytest.mark.slow),
        pytest.param(f"{FINETUNING}.outputs.LossLog.write", 3, [2], marks=pytest.mark.slow),
        pytest.param(f"{FINETUNING}.checkpoints.save_file", 2, [2], marks=pytest.mark.slow),
        # When it is whole, but for its name; before the older one is removed, and when half of that is done.
        pytest.param("pathlib.Path.rename", 2, [2], marks=pytest.mark.slow),
        pytest.param("pathlib.Path.rename", 3, [2, 4], marks=pytest.mark.slow),
        pytest.param("os.unlink", 3, [4], marks=pytest.mark.slow),
        # Before the pipeline is written.
        pytest.param("diffusers_iedit.IEditPipeline.save_pretrained", 1, [4], marks=pytest.mark.slow),
    ],
)
def test_a_training_that_was_killed_goes_on_to_the_same_weights(
    context, tmp_path, pairs, base, plain, function, number, kept
):
    output_dir = tmp_path / "model"
    options = ("--checkpointing_steps", 2, "--checkpoints_total_limit", 1)
    process = start(
        context, arguments(pairs, base, output_dir, *options), tmp_path / "log", function=function, number=number
    )
    assert finish(process) == -signal.SIGKILL
    assert not (output_dir / "model_index.json").exists()
    assert all_complete(output_dir, plain)
    assert [checkpoint.name for checkpoint in list_checkpoints(output_dir)] == [f"checkpoint-{step}" for step in kept]

    train(arguments(pairs, base, output_dir, *options, *RESUME))
    assert same_end(output_dir, plain)


def test_a_killed_training_of_a_stable_diffusion_3_goes_on_to_the_same_weights(
    context, tmp_path, pairs, sd3_base, sd3_plain
):
    output_dir = tmp_path / "model"
    argv = arguments(pairs, sd3_base, output_dir, "--lora_rank", 0, "--checkpointing_steps", 2)
    process = start(context, argv, tmp_path / "log", function=f"{FINETUNING}.models.batch_loss", number=4)
    assert finish(process) == -signal.SIGKILL
    assert [checkpoint.name for checkpoint in list_checkpoints(output_dir)] == ["checkpoint-2"]
    train([*argv, *RESUME])
    assert same_end(output_dir, sd3_plain)


def states(argv, output_dir, folder):
    """Trains, and copies the files before each change of them, what a kill would leave then; nothing twice."""
    copies, seen, copying = [], [], False

    def copied(function):
        def first_copies(*args, **kwargs):
            nonlocal copying
            # To copy files is to make some too.
            if output_dir.exists() and not copying:
                copying = True
                if (files := files_in(output_dir)) not in seen:
                    seen.append(files)
                    copies.append(Path(shutil.copytree(output_dir, folder / str(len(copies)) / "model")))
                copying = False
            return function(*args, **kwargs)

        return first_copies

    functions = ("os.unlink", "os.rename", "os.replace", "os.mkdir", "torch.save", "pathlib.Path.write_text")
    functions += (f"{FINETUNING}.checkpoints.save_file", f"{FINETUNING}.outputs.LossLog.write")
    patches = [mock.patch(name, copied(small_pairs.pkgutil.resolve_name(name))) for name in functions]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        train(argv)
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_training_that_was_killed_at_any_change_of_its_files_goes_on(tmp_path, pairs, base, again):
    output_dir = tmp_path / "model"
    # The plainest loss, as this trains some forty times.
    options = ("--loss", "ldm", "--checkpointing_steps", 2, "--num_validation_pairs", 1, "--num_inference_steps", 2)
    undisturbed = tmp_path / "undisturbed"
    train(arguments(pairs, base, undisturbed, *options))
    options += ("--checkpoints_total_limit", 1, "--validation_steps", 2, "--resume_from_checkpoint")
    if again:
        # From an earlier checkpoint than the newest, which so is written a second time.
        shutil.copytree(undisturbed, output_dir)
    chosen = "checkpoint-2" if again else "latest"
    copies = states(arguments(pairs, base, output_dir, *options, chosen), output_dir, tmp_path)
    assert len(copies) > 25
    for copy in copies:
        assert all_complete(copy, undisturbed, "checkpoint-2")
        train(arguments(pairs, base, copy, *options, "latest"))
        assert same_end(copy, undisturbed)
        shutil.rmtree(copy)


VARIANTS = {
    "epochs": (),
    "EMA": ("--use_ema", "--ema_decay", 0.5),
    "LoRA": ("--lora_rank", 2, "--train_blocks", "attention"),
    "crop and flip": ("--random_crop", "--random_flip", "--caption_dropout", 0.5, "--dataloader_num_workers", 2),
    "cache": ("--cache_latents", "--random_flip"),
    "accumulation": ("--train_batch_size", 1, "--gradient_accumulation_steps", 2),
    "schedule": ("--lr_scheduler", "cosine", "--lr_warmup_steps", 1),
    "bf16": ("--mixed_precision", "bf16"),
    "validation": ("--num_validation_pairs", 1, "--validation_steps", 1, "--num_inference_steps", 2),
    "buckets": ("--aspect_ratio_buckets", "32,32;24,48", "--random_crop", "--train_batch_size", 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_that_broke_off_goes_on_to_the_same_weights_with(tmp_path, base, variant):
    # Of three pairs, four steps of two see each more than twice.
    rows = make_rows(3)
    for name in ("source_image", "source_mask", "target_image", "target_mask"):
        rows[0][name] = rows[0][name].resize((128, 64))
    pairs = write_pairs(tmp_path / "pairs", rows)
    options = ("--loss", "global+paired", "--checkpointing_steps", 2, *VARIANTS[variant])
    train(arguments(pairs, base, tmp_path / "undisturbed", *options))

    def broken():
        raise KeyboardInterrupt

    step = 7 if variant == "accumulation" else 4
    with calling("small_pairs.train_iedit.batch_loss", step, broken), pytest.raises(KeyboardInterrupt):
        train(arguments(pairs, base, tmp_path / "model", *options))
    assert [line["step"] for line in losses(tmp_path / "model")] == [1, 2, 3]
    train(arguments(pairs, base, tmp_path / "model", *options, *RESUME))
    assert same_end(tmp_path / "model", tmp_path / "undisturbed")


def test_a_finished_training_can_be_made_longer(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", "--max_train_steps", 2, "--checkpointing_steps", 2))
    train(arguments(pairs, base, tmp_path / "model", *RESUME))
    assert same_end(tmp_path / "model", plain)


def test_resuming_a_finished_training_leaves_it_as_it_was(tmp_path, pairs, base, plain):
    shutil.copytree(plain, tmp_path / "model")
    train(arguments(pairs, base, tmp_path / "model", *RESUME))
    assert same_end(tmp_path / "model", plain)


def test_a_training_goes_on_from_an_earlier_checkpoint_if_asked_to(tmp_path, pairs, base, plain):
    shutil.copytree(plain, tmp_path / "model")
    train(arguments(pairs, base, tmp_path / "model", "--resume_from_checkpoint", "checkpoint-1"))
    assert same_end(tmp_path / "model", plain)


def test_latest_begins_anew_where_there_is_no_checkpoint(tmp_path, pairs, base, plain):
    train(arguments(pairs, base, tmp_path / "model", *RESUME))
    assert same_end(tmp_path / "model", plain)


def lines(file):
    """How many whole lines a file has; while it is written to."""
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
def test_a_training_that_is_killed_at_random_again_and_again_comes_to_the_same_weights(context, tmp_path):
    pairs, seed = write_pairs(tmp_path / "pairs", make_rows()), time.time_ns()
    options = ("--max_train_steps", 12, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--use_ema")
    options += ("--resolution", 64, "--cache_latents", "--random_flip", "--dataloader_num_workers", 2, *RESUME)
    options += ("--num_validation_pairs", 1, "--validation_steps", 4, "--num_inference_steps", 2)
    train(arguments(pairs, "mini", tmp_path / "undisturbed", *options))

    rng, model = random.Random(seed), tmp_path / "model"
    argv = arguments(pairs, "mini", model, *options)
    # While it loads or caches, and at any moment of the steps after these.
    for step in (0, 1, 4, 7):
        process = start(context, argv, tmp_path / "log")
        while step and process.is_alive() and lines(model / "losses.csv") <= step:
            time.sleep(0.02)
        process.join(rng.uniform(0, 1 if step else 4))
        process.kill()
        assert finish(process) == -signal.SIGKILL, f"seed {seed}"
    train(argv)
    assert same_end(model, tmp_path / "undisturbed"), f"seed {seed}"
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_newest_checkpoints_are_kept(tmp_path, pairs, base):
    options = ("--checkpointing_steps", 1, "--checkpoints_total_limit", 2, "--max_train_steps", 11, "--loss", "ldm")
    train(arguments(pairs, base, tmp_path / "model", *options))
    # By number: as words, 9 comes after 11.
    assert [path.name for path in list_checkpoints(tmp_path / "model")] == ["checkpoint-10", "checkpoint-11"]


def test_a_line_of_losses_that_was_cut_off_does_not_count(tmp_path):
    file, columns = tmp_path / "losses.csv", ["step", "loss", "learning_rate"]
    log = LossLog(file, columns, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 7, "learning_rate": 1.25e-05})
    rows, content = log.read(), file.read_bytes()
    assert rows == [{"step": step, "loss": step / 7, "learning_rate": 1.25e-05} for step in (1, 2, 3)]
    for cut in range(content.index(b"\n3,") + 1, len(content)):
        file.write_bytes(content[:cut])
        log = LossLog(file, columns, 2)
        assert log.read() == rows[:2]
        log.write(rows[2])
        assert log.read() == rows


# Told to stop


@pytest.mark.parametrize("to_all", [False, True])
def test_sigterm_saves_and_ends_well_and_the_training_goes_on(context, tmp_path, pairs, case, to_all):
    base, plain, options = case
    output_dir, log = tmp_path / "model", tmp_path / "log"
    argv = arguments(pairs, base, output_dir, "--dataloader_num_workers", 2, *options)
    signals = {"function": f"{FINETUNING}.models.batch_loss", "number": 2, "signum": signal.SIGTERM}
    assert finish(start(context, argv, log, **signals, to_all=to_all)) == 0
    printed = log.read_text()
    (step,) = re.findall(r"Stopped by SIGTERM after step (\d);", printed)
    assert not [line for line in re.split(r"[\r\n]", printed) if "Steps:" in line and "INFO" in line]
    assert "Traceback" not in printed
    assert "rror" not in printed
    assert [path.name for path in list_checkpoints(output_dir)] == [f"checkpoint-{step}"]
    assert int(step) < 4
    assert all_complete(output_dir, plain)
    assert not (output_dir / "model_index.json").exists()

    train([*argv, *RESUME])
    assert same_end(output_dir, plain)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("families.load_base", ()),
        ("models.PairEncoder.__call__", ("--cache_latents",)),
        # What the base makes of the pairs that are shown.
        ("validation.Validation._edit", ("--num_validation_pairs", 1)),
    ],
)
def test_sigterm_before_the_first_step_ends_it_at_once(context, tmp_path, pairs, base, function, options):
    argv = arguments(pairs, base, tmp_path / "model", *options)
    signals = {"function": f"{FINETUNING}.{function}", "number": 1, "signum": signal.SIGTERM}
    assert finish(start(context, argv, tmp_path / "log", **signals)) == -signal.SIGTERM
    assert not (tmp_path / "model/losses.csv").exists()


def test_sigterm_in_a_grid_saves_and_leaves_no_half_grid(context, tmp_path, pairs, base):
    options = ("--num_validation_pairs", 1, "--num_inference_steps", 50, "--validation_steps", 2)
    argv = arguments(pairs, base, tmp_path / "model", *options)
    # The first edit is the base's.
    signals = {"function": f"{FINETUNING}.validation.Validation._edit", "number": 2, "signum": signal.SIGTERM}
    assert finish(start(context, argv, tmp_path / "log", **signals)) == 0
    assert "Stopped by SIGTERM after step 2;" in (tmp_path / "log").read_text()
    assert [path.name for path in list_checkpoints(tmp_path / "model")] == ["checkpoint-2"]
    assert not (tmp_path / "model/images").exists()


@pytest.mark.parametrize(
    "function", [f"{FINETUNING}.outputs.save_pipeline", "diffusers_iedit.evaluation.runner._work_off"]
)
def test_sigterm_after_the_last_step_leaves_the_model_and_says_what_is_left(context, tmp_path, pairs, base, function):
    output_dir, log = tmp_path / "model", tmp_path / "log"
    options = ("--evaluation_data", pairs, "--num_evaluation_examples", 1, "--num_inference_steps", 2)
    argv = arguments(pairs, base, output_dir, "--max_train_steps", 1, *options)
    signals = {"function": function, "number": 1, "signum": signal.SIGTERM}
    assert finish(start(context, argv, log, **signals)) == 0
    whole = f"Stopped by SIGTERM. The model in {output_dir} is whole. What is left: iedit evaluate --data {pairs} "
    assert whole in log.read_text()
    assert (output_dir / "README.md").exists()
    assert not (output_dir / "evaluation/step-000001/results.json").exists()
    IEditPipeline.from_pretrained(output_dir)


def too_large():
    """The head of a PNG of 14000 x 14000 pixels, more than Pillow is ready to open."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 14000, 14000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


def test_any_error_while_a_pair_is_read_ends_the_command_with_its_row(context, tmp_path, base):
    rows = make_rows()
    rows[10]["source_image"] = {"bytes": too_large(), "path": None}
    argv = arguments(write_pairs(tmp_path / "pairs", rows), base, tmp_path / "model", "--max_train_steps", 6)
    argv += ["--loss", "ldm", "--dataloader_num_workers", "2"]
    assert finish(start(context, argv, tmp_path / "log")) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert re.match(r"train_iedit\.py: error: Row 10 of the pairs\b.*196000000 pixels", last)


class Faulty(torch.utils.data.Dataset):
    """Raises an error when its only element is asked for."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (KeyError("edit_prompt"), "KeyError: 'edit_prompt'"),
        (ValueError("first line\nsecond line: more"), "first line\nsecond line: more"),
        (Image.DecompressionBombError("too large"), "PIL.Image.DecompressionBombError: too large"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "UnicodeDecodeError: 'utf-8' codec can't decode .*"),
    ],
)
def test_an_error_of_a_process_that_reads_is_told_without_its_traceback(raised, said):
    with pytest.raises(Exception) as error:  # noqa: PT011
        next(iter(torch.utils.data.DataLoader(Faulty(raised), num_workers=1)))
    assert re.fullmatch(said, small_pairs.train_iedit.describe(error.value))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ends_the_command_at_once_with_one_line(context, tmp_path, base, workers):
    rows = make_rows()
    rows[10]["source_mask"] = Image.new("L", (64, 64))
    argv = arguments(write_pairs(tmp_path / "pairs", rows), base, tmp_path / "model", "--max_train_steps", 6)
    process = start(context, [*argv, "--dataloader_num_workers", str(workers)], tmp_path / "log")
    began = time.monotonic()
    assert finish(process) == 1
    assert time.monotonic() - began < 60
    printed = (tmp_path / "log").read_text()
    assert printed.endswith(
        "train_iedit.py: error: Row 10 of the pairs: `source_mask` is black (255 = edit): it marks nothing to edit.\n"
    )
    assert "Traceback" not in printed


# Two at once


def test_a_second_training_in_a_folder_is_refused_and_changes_nothing(tmp_path, pairs, base, plain):
    output_dir = Path(shutil.copytree(plain, tmp_path / "model"))
    before = files_in(output_dir)
    with lock_folder(output_dir, "training"), pytest.raises(SystemExit) as end:
        command(arguments(pairs, base, output_dir, *RESUME))
    assert end.value.code == (
        f"train_iedit.py: error: Another training is at work on {output_dir}: wait for it, or choose another folder."
    )
    assert files_in(output_dir) == before


@pytest.mark.slow
def test_two_processes_of_a_second_training_both_end(context, tmp_path, pairs, base):
    (tmp_path / "model").mkdir()
    with lock_folder(tmp_path / "model", "training"):
        assert launch(context, arguments(pairs, base, tmp_path / "model"), tmp_path / "log") == [1, 1]
    printed = (tmp_path / "log").read_text()
    assert printed.count("Another training is at work on") == 1
    assert "Traceback" not in printed


# Damaged checkpoints


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "state.json"]
)
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one(tmp_path, plain, name):
    output_dir = Path(shutil.copytree(plain, tmp_path / "model"))
    assert (output_dir / "checkpoint-4" / name).exists()
    for damage in ("halved", "emptied", "changed", "removed"):
        for step in (3, 4):
            file = output_dir / f"checkpoint-{step}" / name
            content = (plain / f"checkpoint-{step}" / name).read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            file.unlink(missing_ok=True)
            if damage != "removed":
                file.write_bytes({"halved": content[:middle], "emptied": b"", "changed": changed}[damage])
        if (name, damage) == ("state.json", "changed"):
            continue
        with pytest.raises(ValueError, match=r"^`resume_from_checkpoint`") as error:
            load_checkpoint(PartialState(), output_dir / "checkpoint-4", {})
        assert re.fullmatch(
            rf"`resume_from_checkpoint`: \S+/checkpoint-4 (is damaged: |lacks |has no ){name} ?.*;"
            r" the newest whole one is checkpoint-2: --resume_from_checkpoint checkpoint-2\.",
            str(error.value),
        )


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_that_is_named(tmp_path, pairs, base, plain):
    output_dir = Path(shutil.copytree(plain, tmp_path / "model"))
    (output_dir / "checkpoint-4/random_states_0.pkl").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        command(arguments(pairs, base, output_dir, *RESUME))
    (option, name) = re.search(r": (--\w+) (checkpoint-\d)\.$", end.value.code).groups()
    train(arguments(pairs, base, output_dir, option, name))
    assert same_end(output_dir, plain)


# No numbers any more


def without_a_number(step, how):
    """The loss of a step, or only its gradient, is no number."""
    original, seen = small_pairs.train_iedit.batch_loss, 0

    def faulty(*args, **kwargs):
        nonlocal seen
        seen += 1
        loss, terms = original(*args, **kwargs)
        if seen == step:
            if how == "loss":
                terms["perc"] = terms["perc"] * torch.tensor([1.0, float("nan")])
                loss = loss + terms["perc"]
            else:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, terms

    return mock.patch("small_pairs.train_iedit.batch_loss", faulty)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_step_terms_and_rows(tmp_path, pairs, case, how):
    base, plain, options = case
    output_dir = tmp_path / "model"
    argv = arguments(pairs, base, output_dir, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, *options)
    with without_a_number(3, how), pytest.raises(FloatingPointError) as error:
        train(argv)
    first, *lines = str(error.value).splitlines()
    assert "step 3" in first
    order = np.random.default_rng([0, 0]).permutation(12)
    assert [re.match(r"  row (\d+): ", line)[1] for line in lines] == [str(row) for row in order[4:6]]
    for line in lines:
        assert re.fullmatch(r"  row \d+: loss \S+, loc \S+, global \S+, mask \S+, perc \S+", line)
    if how == "loss":
        assert "nan" not in lines[0]
        assert re.search("loss nan.* perc nan", lines[1])

    # The last good checkpoint is there, and leads on.
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-2"]
    assert not (output_dir / "model_index.json").exists()
    train([*argv, *RESUME])
    assert same_end(output_dir, plain)


def test_a_base_with_a_weight_that_is_no_number_stops_in_the_first_step(tmp_path, pairs, base):
    broken = Path(shutil.copytree(base, tmp_path / "base"))
    values = weights(broken)
    values["conv_out.bias"][0] = float("nan")
    save_file(values, broken / UNET)
    with pytest.raises(SystemExit) as end:
        command(arguments(pairs, broken, tmp_path / "model", "--checkpointing_steps", 1))
    assert re.match(r"train_iedit\.py: error: The loss of step 1\b.*\n  row \d+: loss nan", end.value.code)
    assert list_checkpoints(tmp_path / "model") == []


# Out of disk


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def resize(disk, size):
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoint_whole_and_the_training_goes_on(small_disk, tmp_path, pairs, case):
    base, plain, options = case
    output_dir = small_disk / "model"
    argv = arguments(pairs, base, output_dir, "--checkpointing_steps", 1, *options)
    resize(small_disk, int(1.5 * size_of(plain / "checkpoint-1")) + 100_000)
    with pytest.raises(SystemExit) as end:
        command(argv)
    said = end.value.code.removeprefix("train_iedit.py: error: ")
    assert said.startswith(f"The checkpoint of step 2 could not be written to {output_dir}, which had 0 MiB free: ")
    assert said.endswith(" checkpoint-1 is complete; --resume_from_checkpoint latest goes on from it.")
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-1"]
    assert all_complete(output_dir, plain)
    assert not [file for file in output_dir.iterdir() if "partial" in file.name]

    resize(small_disk, 4 * size_of(plain))
    train([*argv, *RESUME])
    assert same_end(output_dir, plain)


def test_a_full_disk_at_the_end_leaves_the_checkpoints_whole_and_no_half_model(
    small_disk, tmp_path, pairs, base, plain
):
    output_dir = small_disk / "model"
    argv = arguments(pairs, base, output_dir, "--checkpointing_steps", 4)
    resize(small_disk, size_of(plain / "checkpoint-4") + size_of(plain / "unet") // 2 + 100_000)
    with pytest.raises(SystemExit) as end:
        command(argv)
    assert end.value.code.startswith(f"train_iedit.py: error: The pipeline could not be written to {output_dir}")
    assert all_complete(output_dir, plain)
    assert sorted(path.name for path in output_dir.iterdir()) == [
        *(".lock", "checkpoint-4", "losses.csv", "training_args.json")
    ]

    resize(small_disk, 4 * size_of(plain))
    train([*argv, *RESUME])
    assert same_end(output_dir, plain)


def test_a_full_disk_leaves_the_settings_of_the_earlier_run_whole(tmp_path, pairs, base, plain, monkeypatch):
    output_dir = Path(shutil.copytree(plain, tmp_path / "model"))
    before = (output_dir / "training_args.json").read_bytes()
    write = Path.write_text

    def write_half(path, text, **kwargs):
        if not path.name.startswith("training_args.json"):
            return write(path, text, **kwargs)
        write(path, text[: len(text) // 2], **kwargs)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(SystemExit, match="no space left on device"):
        command([*arguments(pairs, base, output_dir), *RESUME])
    assert (output_dir / "training_args.json").read_bytes() == before
    monkeypatch.undo()
    train([*arguments(pairs, base, output_dir), *RESUME])
    assert not list(output_dir.glob("*.partial"))


# Several processes


def launch(context, argv, log, **signals):
    """The command as `accelerate launch` starts it, in two processes; `signals` go to the second one."""
    launched = [
        start(context, argv, log, environment, **own)
        for environment, own in zip(two_ranks(), ({}, signals), strict=True)
    ]
    return [finish(process) for process in launched]


def test_two_processes_are_one_with_twice_the_batch(context, tmp_path, pairs, case):
    base, plain, options = case
    output_dir = tmp_path / "model"
    train(
        arguments(pairs, base, tmp_path / "alone", "--num_validation_pairs", 3, "--num_inference_steps", 2, *options)
    )
    options += ("--train_batch_size", 1, "--num_validation_pairs", 3, "--num_inference_steps", 2)
    assert launch(context, arguments(pairs, base, output_dir, *options), tmp_path / "log") == [0, 0]
    assert close(output_dir, plain, base)
    # All three pairs are shown, though one process has two of them and the other one.
    grids = [
        np.asarray(Image.open(folder / "images/step-000004.png")).astype(int)
        for folder in (output_dir, tmp_path / "alone")
    ]
    assert grids[0].shape == (3 * 32, 5 * 32, 3)
    assert np.abs(grids[0] - grids[1]).max() <= 2
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed
    load_base(str(output_dir))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--train_blocks", "all", "--use_ema"),
        ("--lora_rank", 2),
        ("--cache_latents", "--random_flip"),
        ("--lr_scheduler", "linear", "--lr_warmup_steps", 2),
        ("--gradient_checkpointing", "--dataloader_num_workers", 2),
        (
            "--num_validation_pairs",
            1,
            "--num_inference_steps",
            2,
            "--validation_steps",
            1,
            "--report_to",
            "tensorboard",
        ),
    ],
)
def test_two_processes_are_one_with_twice_the_batch_with(context, tmp_path, pairs, base, options):
    argv = arguments(pairs, base, tmp_path / "model", "--train_batch_size", 1, *options)
    assert launch(context, argv, tmp_path / "log") == [0, 0]
    train(arguments(pairs, base, tmp_path / "alone", *options))
    assert close(tmp_path / "model", tmp_path / "alone", base)


@pytest.mark.slow
def test_two_processes_of_which_one_is_told_to_stop_both_stop_and_go_on(context, tmp_path, pairs, base, plain):
    output_dir, log = tmp_path / "model", tmp_path / "log"
    argv = arguments(pairs, base, output_dir, "--train_batch_size", 1, "--random_flip")
    assert launch(context, argv, log, function=f"{FINETUNING}.models.batch_loss", number=2, signum=signal.SIGTERM) == [
        0,
        0,
    ]
    (checkpoint,) = list_checkpoints(output_dir)
    assert checkpoint.name in ("checkpoint-2", "checkpoint-3")
    assert launch(context, [*argv, *RESUME], log) == [0, 0]
    undisturbed = arguments(pairs, base, tmp_path / "undisturbed", "--train_batch_size", 1, "--random_flip")
    assert launch(context, undisturbed, log) == [0, 0]
    assert same_end(output_dir, tmp_path / "undisturbed")
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_do_not_hang_and_go_on(context, tmp_path, pairs, base):
    output_dir, log = tmp_path / "model", tmp_path / "log"
    argv = arguments(pairs, base, output_dir, "--train_batch_size", 1, "--checkpointing_steps", 1)
    codes = launch(context, argv, log, function=f"{FINETUNING}.models.batch_loss", number=3)
    assert codes == [1, -signal.SIGKILL]
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-1", "checkpoint-2"]
    assert launch(context, [*argv, *RESUME], log) == [0, 0]
    assert launch(context, arguments(pairs, base, tmp_path / "undisturbed", "--train_batch_size", 1), log) == [0, 0]
    assert same_end(output_dir, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("bad", [("--loss", "style"), ("--resolution", 33), ("--train_split", "test")])
def test_two_processes_end_with_an_error_and_none_hangs(context, tmp_path, pairs, base, bad):
    codes = launch(context, arguments(pairs, base, tmp_path / "model", *bad), tmp_path / "log")
    assert set(codes) <= {1, 2}
    assert "Traceback" not in (tmp_path / "log").read_text()
