"""`msft list`: the model families, their sizes and templates, and what was verified here and how."""

import json
import textwrap
from collections.abc import Sequence

from msft.cli import guard

WIDTH, NAMES = 118, 11


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guard.run(_list, argv)


def parser() -> guard.Parser:
    """Return the command's parser."""
    result = guard.Parser(
        prog="msft list",
        description="Tell which model families there are, their published sizes, and what was verified here and how.",
    )
    result.add_argument("family", nargs="?", help="tell everything about one family")
    result.add_argument("--json", action="store_true", help="print JSON")
    return result


def _list(argv: Sequence[str]) -> None:
    words = parser().parse_args(argv)
    from msft import console
    from msft.models.catalog import catalog, entry

    entries = [entry(words.family)] if words.family else catalog()
    if words.json:
        console.say(json.dumps(entries[0] if words.family else entries, indent=2))
    elif words.family:
        console.say("\n".join(_details(entries[0])))
    else:
        console.say("\n".join([line for each in entries for line in _brief(each)] + _ending(entries)))


def _brief(entry: dict) -> list[str]:
    sizes = ", ".join(f"{name} ({_short(size['parameters'])})" for name, size in entry["sizes"].items())
    texts = (sizes or "no published size on record", "; ".join(_facts(entry)))
    lines = [line for text in texts for line in textwrap.wrap(text, WIDTH - NAMES)]
    return [f"{entry['family'] if number == 0 else '':<{NAMES}}{line}" for number, line in enumerate(lines)]


def _facts(entry: dict) -> list[str]:
    facts = [
        f"LoRA on {', '.join(entry['lora_targets'])}",
        f"template: the tokenizer's, else {entry['template']}",
        f"CKPT in {'MindFormers' if entry['mindformers_names'] else 'Hugging Face'} names",
    ]
    is_dealt = any(size["dealt"] for size in entry["sizes"].values())
    return [*facts, "tensor, pipeline and context parallel"] if is_dealt else facts


def _ending(entries: list[dict]) -> list[str]:
    common = [check["what"] for check in entries[0]["verified"] if not check["families"]]
    return [
        "",
        *textwrap.wrap(f"Verified here for every family, on CPU: {', '.join(common)}.", WIDTH),
        "Families that do not name other layouts have data parallelism alone.",
        "msft list FAMILY tells how; msft recipe --model FAMILY --size SIZE --method lora writes the recipe of a size.",
    ]


def _details(entry: dict) -> list[str]:
    title = f"{entry['family']}: {entry['architecture']}{_class_of(entry)}"
    lines = [title, *(f"  {fact}" for fact in _facts(entry)), ""]
    heads = [
        "size",
        "release",
        "parameters",
        "layers",
        "hidden",
        "heads",
        "key heads",
        "vocabulary",
        "longest",
        "dealt",
    ]
    rows = [[name, *(_told(value) for value in size.values())] for name, size in entry["sizes"].items()]
    lines += [f"  {line}" for line in _table([heads, *rows])] if rows else ["  no published size on record"]
    lines += ["  dealt: to several processes (tensor, pipeline, context parallel)"] if rows else []
    lines += ["", "verified here, on CPU, in float32:"]
    for check in entry["verified"]:
        lines += [f"  {check['what']}", *textwrap.wrap(check["how"], WIDTH, **_indent(4)), f"    {check['test']}"]
    return lines


def _class_of(entry: dict) -> str:
    if entry["transformers_has_it"]:
        return ""
    used = "PyTorch computes its description" if entry["is_ported"] else "a class that computes the same is used"
    return f" (not in transformers: {used})"


def _indent(columns: int) -> dict[str, str]:
    return {"initial_indent": " " * columns, "subsequent_indent": " " * columns}


def _table(rows: list[list[str]]) -> list[str]:
    """Columns of text; the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _told(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else value


def _short(count: int) -> str:
    """Say a count with three digits: 135M, 6.74B."""
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
