"""Runs `msft` commands in forked children of a warm process and kills them where it is told to.

A program of its own, because a child may be forked only before the framework has started its threads. Each line of
input is a JSON request: `words` of the command, `log` for what it prints, and at most one of `seconds` (SIGKILL after
so long) and `operation` (SIGKILL before the n-th change of a file or folder below `folder`). Each line of output is
the answer: `status` (exit code, or minus the signal), `operations`, `seconds`.
"""

import json
import mmap
import os
import signal
import struct
import sys
import time

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def warm_up():
    """Import what a run imports, and start nothing."""
    import importlib

    modules = ["torch", "peft", "transformers.models.llama.modeling_llama", "matplotlib.figure", "safetensors.numpy"]
    modules += ["matplotlib.backends.backend_agg", "tensorboard.summary.writer.event_file_writer"]
    modules += ["msft.train.run", "msft.backend.torch.engine", "msft.cli.train", "msft.config.load"]
    for name in modules:
        importlib.import_module(name)


def count_changes(folder, at, counter):
    """Count the changes below `folder`, and die before the one with the number `at`."""

    def hook(event, arguments):
        if event != "open" and event not in CHANGES:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "/"
        # A relative name is one inside a folder that is being removed.
        if os.path.isabs(path) and not path.startswith(folder):
            return
        number = struct.unpack("q", counter[:8])[0] + 1
        counter[:8] = struct.pack("q", number)
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(request, counter):
    from msft.cli.main import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count_changes(request["folder"], request.get("operation"), counter)
    os._exit(main(request["words"]))


def serve(request):
    counter = mmap.mmap(-1, 8)
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        child(request, counter)
    limit = request.get("seconds")
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if limit is not None and time.monotonic() - began > limit:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    operations = struct.unpack("q", counter[:8])[0]
    return {
        "status": os.waitstatus_to_exitcode(status),
        "operations": operations,
        "seconds": time.monotonic() - began,
    }


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
