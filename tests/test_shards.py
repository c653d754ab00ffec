"""What builder, trainer, evaluation and batches share: the lock of an output folder, and files that are replaced."""

import multiprocessing
import os
import re
import signal
import time

import pytest

from diffusers_iedit.resuming import lock_folder, replacing


def hold(folder, held):
    """Takes the lock, forks a process as one that reads data is forked, and is killed from outside."""
    with lock_folder(folder, "training"):
        if os.fork() == 0:
            while not (folder / "end").exists():
                time.sleep(0.05)
            os._exit(0)
        held.set()
        time.sleep(60)


def test_a_folder_is_locked_until_the_block_ends(tmp_path):
    message = f"Another training is at work on {tmp_path}: wait for it, or choose another folder."
    refused = pytest.raises(RuntimeError, match=f"^{re.escape(message)}$")
    with lock_folder(tmp_path, "training"), refused, lock_folder(tmp_path, "training"):
        pass
    with lock_folder(tmp_path, "training"):
        pass


def test_an_error_in_the_block_ends_the_lock_and_is_not_taken_for_another_s(tmp_path):
    with pytest.raises(TimeoutError, match="the Hub is slow"), lock_folder(tmp_path, "training"):
        raise TimeoutError("the Hub is slow")
    with lock_folder(tmp_path, "training"):
        pass


def test_the_lock_goes_with_a_killed_process_though_what_it_forked_lives_on(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    with pytest.raises(RuntimeError, match="Another training"), lock_folder(tmp_path, "training"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock_folder(tmp_path, "training"):
        (tmp_path / "end").touch()


def test_a_file_that_a_full_disk_leaves_no_room_for_is_named_and_as_it_was(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")

    def write():
        with replacing(file) as partial, open("/dev/full", "w") as full:
            # Every write to it fails as on a full disk.
            partial.touch()
            full.write("after")
            full.flush()

    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
