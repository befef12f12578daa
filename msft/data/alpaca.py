"""Alpaca rows -> FastChat conversations, byte for byte as MindFormers' alpaca_converter writes them."""

import json
from collections.abc import Iterator

from msft import files
from msft.data import rows
from msft.data.formats import BadRow, Turn, history, is_alpaca, text
from msft.data.report import Report

_BELOW = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
PROMPT_WITH_INPUT = (
    f"{_BELOW}, paired with an input that provides further context. {_RESPOND}"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT = f"{_BELOW}. {_RESPOND}{{instruction}}\n\n### Response:"
SPEAKERS = {"user": "human", "assistant": "gpt"}


def convert(row) -> list[dict[str, str]]:
    """Return an alpaca row's turns ({'from', 'value'}) with Stanford's prompt; raises BadRow.

    `history` becomes earlier turns and `system` a first one; MindFormers leaves both out.
    """
    if not is_alpaca(row):
        raise BadRow("not an alpaca row: it needs 'instruction' and 'output'")
    fields = {"instruction": text(row, "instruction"), "input": text(row, "input", optional=True)}
    prompt = PROMPT_WITH_INPUT if fields["input"] else PROMPT
    turns = [*history(row), Turn("user", prompt.format_map(fields)), Turn("assistant", text(row, "output"))]
    system = text(row, "system", optional=True)
    head = [{"from": "system", "value": system}] if system else []
    return head + [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in turns]


def convert_file(data_path: str, output_path: str, report: Report) -> None:
    """Write the conversations of all good rows of a JSON list or JSON Lines file; count bad rows in `report`.

    Ids are "1", "2" ... over the good rows. Raises InputError when the file is no JSON.
    """
    with files.atomic_path(output_path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for number, entry in enumerate(_entries(data_path, report)):
            file.write(("[\n" if number == 0 else ",\n") + entry)
        file.write("\n]" if report.rows["written"] else "[]")


def _entries(data_path: str, report: Report) -> Iterator[str]:
    for chunk in rows.chunks(data_path):
        for number, row in rows.rows(chunk):
            report.rows["read"] += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                turns = convert(row)
            except BadRow as reason:
                report.drop_bad(data_path, number, str(reason))
                continue
            report.rows["written"] += 1
            entry = {"id": str(report.rows["written"]), "conversations": turns}
            yield "  " + json.dumps(entry, ensure_ascii=False, indent=2).replace("\n", "\n  ")
