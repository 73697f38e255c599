"""Publishing, against the Hub's protocol over HTTP on the loopback, with the real client."""

import os
import re
import signal
import time
from threading import Event

import pytest
from huggingface_hub import HfApi, constants

from sdtune.publish import hub, model_card, publish
from tests import ranks
from tests.compare import assert_same_bits
from tests.conftest import command, status

SAMPLES = ("--num-validation-images", "2", "--validation-prompt", "a red circle", "--validation-inference-steps", "3")
PUSHED = {".gitattributes", "README.md", "config.yaml", "metrics.jsonl", "pytorch_lora_weights.safetensors"}


def test_what_is_pushed_tells_nothing_of_this_machine(here, lora, tmp_path, capfd):
    lora("hearts", *SAMPLES, "--push-to-hub", "--steps", "3")
    assert f"pushed: {here.url}/tester/hearts/commit/" in capfd.readouterr().out
    files = here.files("tester/hearts")
    pictured = {f"samples/{name}.png" for name in ("step-000000", "step-000003", "widget-0", "widget-1")}
    assert files.keys() == PUSHED | {"report.html"} | pictured
    absolute = str(tmp_path).encode()
    assert [name for name, content in files.items() if absolute in content and name.endswith((".md", "yaml"))] == []


# ---- when and where ------------------------------------------------------------------------------------


def test_checkpoints_go_to_a_branch_beside_training(here, shared, lora):
    options = ["--push-to-hub", "--hub-strategy", "checkpoint", "--hub-revision", "candidates", "--hub-private"]
    run = lora("cut", *SAMPLES, *options, "--hub-model-id", "tester/other")
    assert_same_bits(shared("lora", *SAMPLES), run)
    titles = here.titles("tester/other", "refs/heads/candidates")
    steps = [f"sdtune lora: step {step}" for step in (6, 4, 2)]
    assert titles[0] == "sdtune lora" and titles[-1] == "initial commit"
    uploaded = titles[1:-1]  # one at least: of several that wait for an upload only the newest is uploaded
    assert uploaded and uploaded == [title for title in steps if title in uploaded]
    assert here.titles("tester/other") == ["initial commit"]
    assert here.repos["models", "tester/other"].private
    files = here.files("tester/other", "refs/heads/candidates")
    assert files["pytorch_lora_weights.safetensors"] == (run / "pytorch_lora_weights.safetensors").read_bytes()
    assert [path for path in run.iterdir() if path.name.startswith(publish.STAGE)] == []


def test_unchanged_run_makes_no_commit(here, copied):
    run = copied("lora", "run", *SAMPLES)
    for _ in range(2):
        assert status(["push", str(run)]) == 0
    assert here.titles("tester/run") == ["sdtune lora", "initial commit"]
    (run / "metrics.jsonl").write_text('{"step": 12, "loss": 0.5}\n')
    assert status(["push", str(run), "--license", "mit"]) == 0
    assert len(here.titles("tester/run")) == 3
    assert b"license: mit\n" in here.files("tester/run")["README.md"]
    assert "| Final loss | 0.5000 |" in (run / "README.md").read_text()


def test_pull_request_is_opened_once_and_added_to(here, lora, capfd):
    run = lora("run", "--hub-revision", "candidates", "--steps", "1")
    for license in ("mit", "mit", "apache-2.0"):
        assert status(["push", str(run), "--hub-create-pr", "--license", license]) == 0
    assert f"pushed: {here.url}/tester/run/discussions/1\n" in capfd.readouterr().out
    assert [d["title"] for d in here.repos["models", "tester/run"].discussions] == ["sdtune lora: run"]
    assert len(here.titles("tester/run", "refs/pr/1")) == 3
    assert here.titles("tester/run") == ["initial commit"]


def test_pull_request_to_the_repository_of_another(here, lora, capfd):
    HfApi(endpoint=here.url, token=here.token).create_repo("tester/theirs")
    here.users["hf_" + "guest" * 5] = ("guest", "write")
    run = lora("run", "--hub-model-id", "tester/theirs", "--steps", "1")
    own = HfApi(endpoint=here.url, token="hf_" + "guest" * 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "connect", lambda: own)
        assert status(["push", str(run)]) == 2
        assert "403" in capfd.readouterr().err
        assert status(["push", str(run), "--hub-create-pr"]) == 0
    assert here.titles("tester/theirs", "refs/pr/1") == ["sdtune lora: run", "initial commit"]


def test_finished_run_is_pushed_by_its_own_command(here, copied, lora, capfd):
    copied("lora", "run")
    lora("run", "--push-to-hub")
    assert "already" in capfd.readouterr().out
    assert here.titles("tester/run") == ["sdtune lora", "initial commit"]


@pytest.mark.processes
def test_over_xet(server, elsewhere, copied):
    run = copied("lora", "run", *SAMPLES)
    code, said = elsewhere("-m", "sdtune", "push", str(run), HF_HUB_DISABLE_XET="0")
    assert code == 0, said
    assert any("xet-write-token" in path for _, path, _, _ in server.requests)
    tree = server.repos["models", "tester/run"]
    tree = tree.commits[tree.refs["refs/heads/main"]]["tree"]
    assert tree["pytorch_lora_weights.safetensors"]["xet"]


# ---- refused before training ---------------------------------------------------------------------------


def refused(sd, pictures, out, capfd, *options):
    assert status(command(sd, pictures, out, "--push-to-hub", *options)) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(r"(warning: .*\n)*error: cannot push to the Hub: .*\n", said)
    assert not out.exists()
    return said


@pytest.mark.fault("The token is wrong", "Refused before the model loads.")
def test_bad_token_costs_seconds(here, sd, pictures, tmp_path, capfd):
    here.users.clear()
    assert "401" in refused(sd, pictures, tmp_path / "run", capfd)


@pytest.mark.fault("The token may only read", "Refused before the model loads.")
def test_token_that_may_only_read(here, sd, pictures, tmp_path, capfd):
    here.users[here.token] = ("tester", "read")
    assert "write" in refused(sd, pictures, tmp_path / "run", capfd)


def test_repository_of_somebody_else(here, sd, pictures, tmp_path, capfd):
    assert "403" in refused(sd, pictures, tmp_path / "run", capfd, "--hub-model-id", "other/run")


def test_no_token(here, sd, pictures, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "connect", lambda: HfApi(endpoint=here.url))
    assert "hf auth login" in refused(sd, pictures, tmp_path / "run", capfd)
    assert here.requests == []


def test_offline(here, sd, pictures, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(sd, pictures, tmp_path / "run", capfd)


def test_name_that_is_none(here, sd, pictures, tmp_path, capfd):
    assert "Repo id" in refused(sd, pictures, tmp_path / "run", capfd, "--hub-model-id", "a/b/c")


@pytest.mark.fault("The Hub cannot be reached when a run begins", "Refused before the model loads.")
def test_hub_that_is_not_there(here, sd, pictures, tmp_path, capfd):
    here.close()
    refused(sd, pictures, tmp_path / "run", capfd)


# ---- failures that pass, and those that do not ---------------------------------------------------------


@pytest.mark.fault("The Hub fails for a while", "It is asked again, with longer and longer waits.")
def test_failures_that_pass(here, lora, capfd, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    here.fail("GET /api/whoami-v2", 429, Retry_After="7")
    here.fail("POST .*/preupload/", 500, times=2)
    here.fail("PUT /lfs-store/", "cut")
    here.fail("POST /api/validate-yaml", lambda: Event().wait(5))  # accepted, and then silence
    monkeypatch.setattr(hub, "SILENCE", 1.0)
    here.fail("POST .*/commit/", 503, Retry_After="9")
    here.fail("POST .*/commit/", 502)
    run = lora("run", "--push-to-hub", "--steps", "1")
    assert 7 in waits and 9 in waits
    assert "ReadTimeout" in capfd.readouterr().err
    assert here.files("tester/run")["pytorch_lora_weights.safetensors"] == read(run)
    assert [fault[2] for fault in here.faults] == [0] * 6


def read(run):
    return (run / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.fault("The Hub dies during the final push", "The run is complete; one printed command finishes the push.")
def test_hub_killed_during_the_final_push(here, sd, pictures, tmp_path, capfd):
    out = tmp_path / "run"
    here.fail("POST .*/commit/", here.close)
    assert status(command(sd, pictures, out, "--steps", "1", "--push-to-hub")) == 0  # it trained well
    said = capfd.readouterr().err
    assert f"the run is complete in {out}; this command finishes the push: sdtune push {out}\n" in said
    assert (out / "report.html").exists()
    here.start()
    here.fail("POST .*/commit/", 403)
    assert status(["push", str(out)]) == publish.PUSH_FAILED
    assert status(["push", str(out)]) == 0
    assert here.files("tester/run")["pytorch_lora_weights.safetensors"] == read(out)
    assert here.titles("tester/run") == ["sdtune lora", "initial commit"]


@pytest.mark.fault("Ctrl-C during the final push", "The run is complete; one printed command finishes the push.")
def test_interrupted_final_push(here, sd, pictures, tmp_path, capfd):
    here.fail("POST .*/commit/", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert status(command(sd, pictures, tmp_path / "run", "--push-to-hub", "--steps", "1")) == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "not pushed: interrupted by SIGTERM" in capfd.readouterr().err


@pytest.mark.fault("The Hub fails while the run trains", "Training goes on to the same bits.")
def test_hub_that_fails_while_training_costs_nothing(here, shared, lora, capfd):
    here.fail("POST .*/preupload/", 403, times=3)
    run = lora("run", "--push-to-hub", "--hub-strategy", "checkpoint")
    assert "step 4 is not pushed" in capfd.readouterr().err
    assert_same_bits(shared("lora"), run)
    assert here.titles("tester/run")[0].startswith("sdtune lora")


@pytest.mark.fault(
    "The disk is full while the model card is written", "Exit code 1, nothing half written; `sdtune push` finishes."
)
def test_full_disk_while_the_card_is_written(here, sd, pictures, tmp_path, capfd, monkeypatch):
    def full(self, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(model_card.ModelCard, "save", full)
        assert status(command(sd, pictures, out, "--push-to-hub", "--steps", "1")) == 1
    said = capfd.readouterr().err
    assert f"failed: {out}/README.md: cannot be written (No space left on device)" in said
    assert not list(out.glob(".README*"))
    assert status(["push", str(out)]) == 0
    assert here.files("tester/run")["pytorch_lora_weights.safetensors"] == read(out)


def test_run_without_an_artefact(here, tmp_path, capfd):
    assert status(["push", str(tmp_path)]) == 2
    assert "no config.yaml" in capfd.readouterr().err
    (tmp_path / "config.yaml").write_text("dataset: d\n")
    assert status(["push", str(tmp_path)]) == 2
    assert "no artefact" in capfd.readouterr().err
    assert here.requests == []


def test_words_of_the_command(tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("dataset: d\n")
    for words, told in {
        "": "RUN: is required",
        f"--hub-modl-id x {tmp_path}": "--hub-modl-id: no such option; did you mean --hub-model-id?",
        f"{tmp_path} more": "more: unexpected argument",
        f"{tmp_path} --hub-create-pr --hub-revision b": "give one",
        f"{tmp_path} --hub-token hf_x": "HF_TOKEN",
    }.items():
        assert status(["push", *words.split()]) == 2
        assert told in capfd.readouterr().err


@pytest.mark.processes
def test_only_the_first_of_two_processes_meets_the_hub(here, sd, pictures, tmp_path):
    here.fail("POST .*/commit/", 403)
    words = command(sd, pictures, tmp_path / "run", "--push-to-hub", "--train-batch-size", "1", "--steps", "1")
    started = ranks.Ranks(2, words, tmp_path / "output")
    assert started.exit_codes() == [0, 0], started.output("err")
    assert "this command finishes the push" in started.output("err")
    assert sum(path == "/api/whoami-v2" for _, path, _, _ in here.requests) == 1
