"""An executable that does what `python -m sdtune` does, without the seconds that a fresh Python spends on imports.

What a launcher or a shell script starts has to be a file that can be executed. This one is a small client: it hands its
words, environment, folder and open files to a fork of the tests, where everything is imported; that forks once more
and runs the command. Signals are passed on, a client that is killed takes its command with it, and the client ends as
the command does.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import torch
from accelerate.state import AcceleratorState

from sdtune.cli import main
from tests import ranks

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
words = sys.argv[1:]
words = words[words.index("sdtune") + 1:] if "sdtune" in words[:3] else words
socket.send_fds(line, [b"r"], [0, 1, 2])
request = json.dumps([words, dict(os.environ), os.getcwd()]) + "\\n"
line.sendall(request.encode())
answers = line.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline() or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""
"""It is called as `sdtune WORDS`, and by launchers as `python -u -m sdtune WORDS`."""


@contextmanager
def executable() -> Iterator[Path]:
    """The file to execute, which works inside the context; the context ends when all that it started has ended."""
    with TemporaryDirectory(prefix="sdtune-") as name:  # the name of a socket must be short
        yield from started(Path(name))


def started(folder: Path) -> Iterator[Path]:
    address, client = str(folder / "socket"), folder / "sdtune"
    with socket.create_server(address, family=socket.AF_UNIX) as listener:
        server = ranks.Forked(partial(serve, listener), folder / "server", client)
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    try:
        yield client
    finally:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(address)
            line.sendall(b"q")
        assert server.exit_code(60) == 0, server.output("err")


def serve(listener: socket.socket) -> None:
    while True:
        line, _ = listener.accept()
        first, files, _, _ = socket.recv_fds(line, 1, 3)
        if first == b"q":
            break
        if os.fork() == 0:
            answer(line, files)
            os._exit(0)
        line.close()
        for file in files:
            os.close(file)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def answer(line: socket.socket, files: list[int]) -> None:
    """Run one command in a fork; its number goes to the client, and at its end how it ended."""
    words, environment, folder = json.loads(line.makefile().readline())
    if (pid := os.fork()) == 0:
        run(words, environment, folder, files)
    line.sendall(f"{pid}\n".encode())

    def end_with_client() -> None:
        if not line.recv(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    Thread(target=end_with_client, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        line.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(words: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    code = 1
    try:
        main(words)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
