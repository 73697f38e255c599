"""Whatever is long ends within seconds when a signal asks for it, and the handlers before are put back."""

import errno
import os
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from sdtune.cli import main
from sdtune.config.sections import RunFailed
from sdtune.models.part_files import read_part
from sdtune.recipes import class_images
from sdtune.run import artefacts, checkpoints, folder, processes
from sdtune.run.metrics_file import read_lines
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


def test_a_second_sigterm_leaves_the_time_to_save():
    with StopSignals() as stop:
        stop.defer(True)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        stop.number = 0  # so that it may leave


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
    assert [line["step"] for line in read_lines(out / "metrics.jsonl") if "loss" in line][-1] == 5
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


def test_a_worker_that_is_killed_while_a_model_is_read_is_no_fault_of_the_model():
    def from_pretrained(source):
        raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        read_part(SimpleNamespace(from_pretrained=from_pretrained), "base", "--model base: vae")


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
    """The first process waits for it in the barrier after the save, where no collective times out."""
    monkeypatch.setattr(processes, "MIN_SILENCE", 4.0)
    real, saving = checkpoints.save, tmp_path / "saving"

    def slow(*args):
        saving.touch()
        threading.Event().wait(1)
        return real(*args)

    monkeypatch.setattr(checkpoints, "save", slow)
    out = tmp_path / "run"
    words = command(*places[:2], out, "--steps", "400", "--checkpointing-steps", "3", "--train-batch-size", "1")
    started = ranks.Ranks(2, [*words, "--ddp-timeout", "4", "--num-validation-images", "0"], tmp_path / "output")
    ranks.wait_until(saving.exists)
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


class Store(dict):
    """The store of a process group, of which one process is a thread."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        while key not in self:
            time.sleep(0.01)
        return self[key]


def listened(monkeypatch, address, machines):
    """Where the first of two processes, on one machine or two, got its socket; the second has reached it there."""
    servers, serve = [], socket.create_server

    def create_server(*given, **options):
        servers.append(serve(*given, **options))
        where.append(servers[-1].getsockname()[:2])
        return servers[-1]

    where = []
    monkeypatch.setattr(processes.socket, "create_server", create_server)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 // machines))
    monkeypatch.setenv("MASTER_ADDR", address)
    watches, store = [ProcessGroupWatch(rank, 2, folder.Path(), "", 5, None) for rank in range(2)], Store()
    for watch in watches:
        watch.store = store
    accepted = []
    first = threading.Thread(target=lambda: accepted.extend(watches[0]._accept()), daemon=True)
    first.start()
    ((_, connection),) = watches[1]._connect()
    first.join(10)
    ((rank, other),) = accepted
    assert rank == 1 and connection.getpeername() == other.getsockname() and connection.getpeername()[:2] == where[0]
    connection.close()
    other.close()
    return where[0][0]


def test_the_watch_listens_on_the_loopback_alone_on_one_machine(monkeypatch):
    assert listened(monkeypatch, "192.0.2.7", machines=1) == "127.0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of every machine only there")
def test_the_watch_listens_on_one_interface_on_several_machines(monkeypatch):
    """On that of the address by which the others know the first machine, also of a name with several."""
    look_up, names = socket.getaddrinfo, {"first": ["127.0.0.2", "127.0.0.3"], "any": ["0.0.0.0"]}

    def getaddrinfo(name, *given, **options):
        return [found for each in names.get(name, [name]) for found in look_up(each, *given, **options)]

    monkeypatch.setattr(processes.socket, "getaddrinfo", getaddrinfo)
    assert listened(monkeypatch, "first", machines=2) == "127.0.0.2"
    assert listened(monkeypatch, "127.0.0.3", machines=2) == "127.0.0.3"
    assert listened(monkeypatch, "any", machines=2) == "127.0.0.1"  # it leads to this machine, and means all interfaces


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of every machine only there")
def test_where_the_address_is_a_translated_one_the_watch_listens_on_the_way_to_it(monkeypatch):
    serve, asked, elsewhere = socket.create_server, [], ["127.0.0.2"]

    def create_server(where, **options):
        asked.append(where[0])
        if where[0] in elsewhere:
            raise OSError(errno.EADDRNOTAVAIL, "no interface has this address")
        return serve(where, **options)

    monkeypatch.setattr(processes.socket, "create_server", create_server)
    with processes.listen("127.0.0.2") as server:
        assert server.getsockname()[0] == "127.0.0.1" and asked == ["127.0.0.2", "127.0.0.1"]
    elsewhere.append("127.0.0.1")
    with pytest.raises(RunFailed, match=r"MASTER_ADDR means 127.0.0.2, to which no interface here leads: no interface"):
        processes.listen("127.0.0.2")
