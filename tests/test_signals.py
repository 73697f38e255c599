"""Whatever is long ends within seconds when a signal asks for it, and the handlers before are put back."""

import os
import signal
import threading
import time

import pytest

from sdtune.cli import main
from sdtune.config.sections import RunFailed
from sdtune.recipes import class_images
from sdtune.run import artefacts, checkpoints, folder, processes
from sdtune.run.processes import ProcessGroupWatch
from sdtune.run.signals import STOP, Interrupted, StopSignals
from sdtune.training import loop, preview
from tests import ranks
from tests.compare import assert_same_bits
from tests.conftest import command, status


def handlers():
    return [signal.getsignal(number) for number in STOP]


def ended(words):
    """The exit code of a command line in this process, and that its handlers were put back."""
    before = handlers()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert handlers() == before
    return end.value.code


def killing(number=signal.SIGTERM, times=1):
    """A stand-in for long work, in which the signal comes."""

    def work(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(60)
        pytest.fail("the signal was not heeded")

    return work


@pytest.mark.parametrize("number", STOP)
def test_outside_the_loop_a_signal_ends_the_process_at_once(number):
    before = handlers()
    with pytest.raises(Interrupted) as caught, StopSignals():
        killing(number)()
    assert caught.value.code == 128 + number
    assert handlers() == before


def test_in_the_loop_a_signal_is_noted_and_a_second_ctrl_c_is_heeded():
    with StopSignals() as stop:
        stop.defer(True)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
        with pytest.raises(Interrupted):
            killing(signal.SIGINT)()
        with pytest.raises(Interrupted):
            stop.defer(False)


def test_long_work_inside_the_loop_ends_early_without_ending_the_run():
    with StopSignals() as stop:
        stop.defer(True)
        assert stop.attempt(killing(), True) is None
        assert stop.attempt(lambda: 1, True) is None  # what comes after it does not begin
        assert stop.attempt(lambda: 1, False) == 1
        assert stop.agreed()


def test_a_signal_is_known_to_other_threads_at_once():
    with StopSignals() as stop:
        stop.defer(True)
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(200):
            if stop.arrived:
                break
            threading.Event().wait(0.01)
        assert stop.arrived == signal.SIGUSR1


@pytest.mark.fault(
    "A signal comes while a model is read, a cache filled or a preview drawn",
    "The run ends within seconds, saved as far as there is something to save.",
)
@pytest.mark.parametrize("place", ["caches", "first previews", "last previews", "export"])
def test_training_ends_at_once_outside_its_steps(place, sd, pictures, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    words = command(sd, pictures, out, "--num-validation-images", "1", "--validation-inference-steps", "1")
    real = preview.sample_images
    with monkeypatch.context() as patch:
        match place:
            case "caches":
                patch.setattr(loop.Recipe, "to", killing())
            case "first previews":
                patch.setattr(preview, "sample_images", killing())
            case "last previews":
                last = killing()
                saved = out / "checkpoints" / "step-000006"
                patch.setattr(preview, "sample_images", lambda *a: last() if saved.exists() else real(*a))
            case "export":
                patch.setattr(artefacts, "export_last", killing())
        assert ended(words) == 128 + signal.SIGTERM
    said = capfd.readouterr().err
    assert said.count("interrupted: stopped by SIGTERM") == 1 and "continue with: sdtune lora" in said
    assert "Traceback" not in said
    assert len(checkpoints.found(out / "checkpoints")) == (0 if place in ("caches", "first previews") else 2)
    if place == "last previews":
        assert status(words) == 0
        assert artefacts.artefact(out, 6)


def test_previews_in_the_middle_are_given_up_and_the_run_is_saved(lora, sd, pictures, tmp_path, monkeypatch, capfd):
    options = ["--num-validation-images", "1", "--validation-inference-steps", "1", "--validation-steps", "5"]
    whole = lora("whole", *options)
    out = tmp_path / "cut"
    words = command(sd, pictures, out, *options)
    from sdtune.recipes.lora import Lora

    calls, real = [], Lora.sample

    def second(*args):
        calls.append(1)
        return killing()() if len(calls) == 2 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Lora, "sample", second)
        assert ended(words) == 128 + signal.SIGTERM
    assert "interrupted at step 5 of 6 and saved" in capfd.readouterr().out
    assert not (out / "samples" / "step-000005.png").exists()
    assert status(words) == 0
    assert_same_bits(whole, out)


@pytest.mark.fault("A signal comes while a file does not arrive", "The run ends within seconds.")
def test_a_loader_that_waits_for_an_image_is_given_up(sd, pictures, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    words = command(sd, pictures, out, "--num-validation-images", "0", "--dataloader-num-workers", "0")
    from sdtune.data import stream

    real, reads = stream.Stream.__getitem__, []

    def slow(self, position):
        reads.append(position)
        return killing()() if len(reads) == 9 else real(self, position)

    monkeypatch.setattr(stream.Stream, "__getitem__", slow)
    assert ended(words) == 128 + signal.SIGTERM
    assert "and saved" in capfd.readouterr().out
    assert len(checkpoints.found(out / "checkpoints")) >= 1


@pytest.mark.fault("A process that reads images is killed", "The run ends with one line.")
def test_a_killed_loader_worker_ends_the_run_with_one_line(tmp_path):
    message = "DataLoader worker (pid 123) is killed by signal: Killed. "
    said = r"loads images is killed by signal: Killed, as .*continue with fewer --dataloader-num-workers: sdtune lora$"
    stop = StopSignals()
    with pytest.raises(RunFailed, match=said), ProcessGroupWatch(0, 1, tmp_path, "sdtune lora", 5, stop):
        raise RuntimeError(message)


def test_class_images_are_given_up(sd, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(class_images, "generate", killing())
    words = ["dreambooth", "--model", str(sd), "--dataset", str(pictures), "--resolution", "32", "--steps", "2"]
    words += ["--prior-preservation", "--class-prompt", "a circle", "--num-class-images", "2", "--lora"]
    assert ended([*words, "--output-dir", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert "there is no checkpoint yet" in capfd.readouterr().err


@pytest.mark.fault(
    "One of several processes stops around a save", "It is named, and the others end after `--ddp-timeout`."
)
@pytest.mark.processes
def test_a_process_that_is_stopped_around_a_save_is_named(places, tmp_path, monkeypatch):
    """The first process waits for it in the barrier after the save."""
    monkeypatch.setattr(processes, "MIN_SILENCE", 4.0)
    real = checkpoints.save

    def slow(*args):
        threading.Event().wait(3)
        return real(*args)

    monkeypatch.setattr(checkpoints, "save", slow)
    out = tmp_path / "run"
    words = command(*places[:2], out, "--steps", "400", "--checkpointing-steps", "3", "--train-batch-size", "1")
    started = ranks.Ranks(2, [*words, "--ddp-timeout", "4", "--num-validation-images", "0"], tmp_path / "output")
    ranks.wait_until(lambda: ranks.reached(out, 1))
    os.kill(started.all[1].process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert started.all[0].exit_code(60) == 1
    assert time.monotonic() - begun < 40
    assert "failed: process 1 of 2 did not answer for" in started.output("err")
    assert started.all[1].exit_code(0) == -signal.SIGKILL


@pytest.mark.fault(
    "A signal comes while one of several processes hangs", "The process that got it ends within seconds."
)
@pytest.mark.processes
def test_a_signal_ends_a_process_that_waits_for_one_that_hangs(places, tmp_path):
    out = tmp_path / "run"
    words = command(*places[:2], out, "--steps", "400", "--checkpointing-steps", "3", "--train-batch-size", "1")
    started = ranks.Ranks(2, [*words, "--num-validation-images", "0"], tmp_path / "output")  # --ddp-timeout 1800
    ranks.wait_until(lambda: ranks.reached(out, 1))
    os.kill(started.all[1].process.pid, signal.SIGSTOP)
    os.kill(started.all[0].process.pid, signal.SIGTERM)
    assert started.all[0].exit_code(60) == 128 + signal.SIGTERM
    assert "process 1 of 2 did not answer for" in started.output("err")
    assert started.all[1].exit_code(0) == -signal.SIGKILL


def test_the_watch_listens_on_the_loopback_alone_on_one_machine(monkeypatch):
    bound = []

    class Store:
        def set(self, key, value):
            bound.append(value)

    class Server:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def getsockname(self):
            return ("127.0.0.1", 7)

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(processes.socket, "create_server", lambda where, **_: bound.append(where) or Server())
    with StopSignals() as stop:
        watch = ProcessGroupWatch(0, 1, folder.Path(), "", 5, stop)
        watch.store = Store()
        assert list(watch._accept()) == []
    assert bound[0] == ("127.0.0.1", 0) and bound[1].startswith("127.0.0.1 7 ")
