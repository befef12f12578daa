"""`run_mode: predict`: answers to the prompts of `predict_data`."""

import json
from dataclasses import replace
from pathlib import Path

from msft import console
from msft.backend.contract import Sampling
from msft.config import derive
from msft.data import encode
from msft.data.templates import CHAT
from msft.data.tokenizers import Tokenizer, open_tokenizer
from msft.errors import InputError
from msft.files import write_text
from msft.train import outputs, setup
from msft.train.prepare import Prepared


def predict(prepared: Prepared) -> None:
    """Answer every prompt and write `predictions.jsonl` (prompt, answer) to `output_dir`.

    A tokenizer with a chat template asks its model as a chat, any other gets the text as it is.
    """
    recipe = prepared.recipe
    path = derive.tokenizer(recipe)
    if path is None:
        raise InputError(f"{recipe.name}: predicting needs a tokenizer: name it in processor.tokenizer.vocab_file")
    tokenizer = open_tokenizer(path)
    texts = prompts(recipe.predict_data)
    encoded = [encode_text(tokenizer, text) for text in texts]
    console.note(f"prompts: {len(texts)}, " + ("as a chat" if tokenizer.chat_templates else "as plain text"))
    session = setup.start(prepared)
    try:
        answers = []
        for start in range(0, len(texts), recipe.predict_batch_size):
            batch = encoded[start : start + recipe.predict_batch_size]
            sampling = _sampling(prepared, tokenizer, max(map(len, batch)))
            answers += [answer_text(tokenizer, ids) for ids in session.engine.generate(batch, sampling)]
            for text, answer in zip(texts[start:], answers[start:], strict=False):
                console.say(f"> {text}\n{answer}")
    finally:
        session.distributed.shutdown()
    lines = [json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in zip(texts, answers, strict=True)]
    if session.rank == 0:
        target = prepared.output_dir / outputs.PREDICTIONS
        write_text(target, "\n".join(lines) + "\n")
        console.say(f"written: {target}")


def prompts(given: list[str]) -> list[str]:
    """Return the prompts: each text as it is, of each file its lines that are not empty."""
    found = []
    for item in given:
        found += _lines(Path(item)) if _is_file(item) else [item]
    if not found:
        raise InputError("predict_data: the files hold no prompts")
    return found


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids that ask for an answer; an empty plain text starts from the begin token."""
    if tokenizer.chat_templates:
        return encode.encode_prompt(tokenizer, CHAT, [{"role": "user", "content": text}])
    ids = [*tokenizer.prefix_ids, *tokenizer.encode([text])[0].ids.tolist()]
    if not ids and tokenizer.bos_id is None:
        raise InputError("predict_data: an empty prompt needs a tokenizer with a begin token")
    return ids or [tokenizer.bos_id]


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of generated ids, cut at a stop text where the chat template has one."""
    text = tokenizer.decode(ids)
    for stop in encode.stop_strings(tokenizer, CHAT) if tokenizer.chat_templates else ():
        text = text.split(stop)[0]
    return text.strip()


def _sampling(prepared: Prepared, tokenizer: Tokenizer, prompt_length: int) -> Sampling:
    stops = set(prepared.spec.eos_token_ids)
    stops |= set(encode.stop_ids(tokenizer, CHAT)) if tokenizer.chat_templates else {tokenizer.eos_id} - {None}
    return replace(derive.sampling(prepared.recipe, prompt_length), stop_ids=tuple(sorted(stops)))


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except OSError:
        return False


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"predict_data: {path} cannot be read as UTF-8 text: {error}") from error
