"""No token leaves the place where it belongs."""

import pytest

from sdtune.publish import hub
from tests.conftest import command, status
from tests.test_hub import SAMPLES


@pytest.mark.processes
@pytest.mark.fault(
    "A token is in the environment of training, sampling and pushing",
    "It is in no file, no line printed, no request body.",
)
def test_planted_token_is_nowhere(server, here, elsewhere, sd, pictures, tmp_path, capfd):
    """Train, sample and push with a token in the environment; then look through all that was written and sent.

    Training is a process of its own, whose client finds the token and the Hub as a user's does.
    """
    out = tmp_path / "run"
    options = [*SAMPLES, "--steps", "4", "--checkpointing-steps", "2"]
    options += ["--push-to-hub", "--hub-strategy", "checkpoint", "--report-to", "tensorboard"]
    words = command(sd, pictures, out, *options)
    code, printed = elsewhere("-m", "sdtune", *words, SDTUNE_CACHE=str(tmp_path / "cache"))
    assert code == 0, printed
    for words in (
        ["sample", "--adapter", str(out), "--prompt", "a red circle", "--output-dir", str(tmp_path / "images")],
        ["push", str(out), "--license", "mit"],
    ):
        assert status([*words, *(["--steps", "2"] if words[0] == "sample" else [])]) == 0
    printed += "".join(capfd.readouterr())
    token = server.token.encode()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("events.out" in path.name for path in written)
    assert any(path.name == "state.json" for path in written)
    assert [path for path in written if token in path.read_bytes()] == []
    assert token.decode() not in printed
    assert server.sent
    assert [body for body in server.sent if token in body] == []
    repo = server.repos["models", "tester/run"]
    for oid in repo.commits:
        repo.refs["any"] = oid
        assert [name for name, content in server.files("tester/run", "any").items() if token in content] == []


@pytest.mark.fault("A file to be pushed holds a token, or is a link out of the run's folder", "The push is refused.")
@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl"])
def test_token_in_a_file_stops_the_push(name, here, lora, sd, pictures, capfd):
    secret = "hf_" + "Abcd1234" * 4
    prompt = secret if name == "README.md" else "a red circle"
    options = ["--steps", "1", "--num-validation-images", "1", "--validation-inference-steps", "1"]
    run = lora("run", *options, "--validation-prompt", prompt)
    if name == "metrics.jsonl":
        (run / name).rename(run.parent / "kept")
        (run / name).symlink_to(run.parent / "kept")
        assert status(["push", str(run)]) == 2
        assert "metrics.jsonl: a link out of the run's folder" in capfd.readouterr().err
        (run / name).unlink()
        (run.parent / "kept").rename(run / name)
        with (run / name).open("a") as file:
            file.write(f'{{"step": 12, "note": "{secret}"}}\n')
    assert status(["push", str(run)]) == 2
    said = capfd.readouterr().err
    assert "looks like an access token" in said
    assert name in said or name == "README.md"
    assert secret not in said
    assert [body for body in here.sent if secret.encode() in body] == []
    if name == "README.md":
        assert status(command(sd, pictures, run.parent / "new", "--push-to-hub", "--validation-prompt", secret)) == 2
        assert not (run.parent / "new").exists()
    assert here.titles("tester/run") == ["initial commit"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x00hf_" + b"a1" * 10, True),
        (b"hf_short hf_ api_org_" + b"Z" * 20, True),
        (b"hf_hf_hf_" + b"b" * 19, False),  # 19, and the ones before are within a word
        (b"xhf_" + b"a" * 30, False),
        (b"mine is secret", True),
        (b"", False),
    ],
)
def test_what_looks_like_a_token(content, found):
    assert hub.holds(content, b"secret") is found
    assert hub.holds(content, b"") is bool(hub.SECRET.search(content))
