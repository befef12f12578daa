"""What the tests of `msft train` read of a run, and how often they save."""

import json

SAVING = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4, "keep_checkpoint_max": 2}


def records(output):
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def losses(output):
    return [record["loss"] for record in records(output) if "loss" in record]
