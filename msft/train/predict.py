"""`run_mode: predict`: answers to the prompts of `predict_data`."""

import json
from dataclasses import replace
from pathlib import Path

from msft import console
from msft.config import derive
from msft.data.templates import chat_or_none
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError
from msft.files import write_text
from msft.launch import heartbeat
from msft.predict.answers import Answerer
from msft.predict.loading import end_ids
from msft.predict.prompts import Prompts, read_prompts
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
    prompts = Prompts(tokenizer, chat_or_none(tokenizer), is_closed=prepared.spec.encoder is not None)
    texts = given_prompts(recipe.predict_data)
    encoded = [prompts.encode(text) for text in texts]
    console.note(f"prompts: {len(texts)}, " + ("as a chat" if tokenizer.chat_templates else "as plain text"))
    stop_ids = prompts.stop_ids(end_ids(prepared.spec, derive.weights(recipe)))
    session = setup.start(prepared)
    try:
        answers = []
        for start in range(0, len(texts), recipe.predict_batch_size):
            heartbeat.beat(0, "answering", patient=True)
            batch = encoded[start : start + recipe.predict_batch_size]
            settings = derive.sampling(recipe, max(map(len, batch)))
            sampling = replace(settings, stop_ids=stop_ids, first_row=start)
            answerer = Answerer(session.engine, tokenizer, sampling, prompts.stop_texts())
            answers += [answer.strip() for answer in answerer.answer(batch)]
            for text, answer in zip(texts[start:], answers[start:], strict=False):
                console.say(f"> {text}\n{answer}")
    finally:
        session.distributed.shutdown()
    lines = [json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in zip(texts, answers, strict=True)]
    if session.rank == 0:
        target = prepared.output_dir / outputs.PREDICTIONS
        write_text(target, "\n".join(lines) + "\n")
        console.say(f"written: {target}")


def given_prompts(given: list[str]) -> list[str]:
    """Return the prompts: each text as it is, of each file its lines that are not blank."""
    found = []
    for item in given:
        found += read_prompts(Path(item)) if _is_file(item) else [item]
    return found


def _is_file(item: str) -> bool:
    try:
        return Path(item).is_file()
    except OSError:
        return False
