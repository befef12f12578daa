"""One machine's launcher with workers that need no framework: `python -m tests.launch.one_machine FOLDER SETTINGS`.

SETTINGS is JSON: `node`, `nodes`, `port`, and whatever else a Layout takes; `hang_timeout`, `max_restarts`. The workers
run FOLDER/body. The newest checkpoint's step stands in FOLDER/checkpoint.
"""

import json
import sys
from pathlib import Path

from msft.cli import guard
from msft.launch import restart
from msft.launch.machines import Machines
from msft.launch.supervise import supervise
from tests.launch.jobs import job


def main(folder: Path, node: int, nodes: int, port: int, hang_timeout=0, max_restarts=0, **settings) -> None:
    body = (folder / "body").read_text()
    command, layout = job(folder, body, workers=nodes, local_workers=1, node_rank=node, **settings)

    def attempt(resume: bool) -> None:
        resume = machines.meet(resume)
        (folder / "resume").write_text(str(resume))
        supervise(command, layout, hang_timeout, machines)

    with Machines(layout, port, max_restarts) as machines:
        newest = folder.parent / "checkpoint"
        restart.run(attempt, lambda: int(newest.read_text()) if newest.exists() else 0, max_restarts, layout)


if __name__ == "__main__":
    sys.exit(guard.run(lambda words: main(Path(words[0]), **json.loads(words[1])), sys.argv[1:]))
