"""`run_mode: predict`: answers to the prompts of `predict_data`."""

import json
from dataclasses import replace
from pathlib import Path

from msft import console
from msft.config import derive
from msft.data.tokenizers import open_tokenizer
from msft.errors import InputError
from msft.files import write_text
from msft.predict.answers import Answerer
from msft.predict.prompts import Prompts, default_template, read_prompts
from msft.train import outputs, setup
from msft.train.prepare import Prepared


def predict(prepared: Prepared) -> None:
    """Answer every prompt and write `predictions.jsonl` (prompt, answer) to `output_dir`.

    A tokenizer with a chat template asks its model as a chat, any other gives it the text as it is.
    """
    recipe = prepared.recipe
    path = derive.tokenizer(recipe)
    if path is None:
        raise InputError(f"{recipe.name}: predicting needs a tokenizer: name it in processor.tokenizer.vocab_file")
    tokenizer = open_tokenizer(path)
    template = default_template(tokenizer)
    prompts = Prompts(tokenizer, template)
    texts = [text for item in recipe.predict_data for text in _texts(item)]
    encoded = [prompts.encode(text) for text in texts]
    console.note(f"prompts: {len(texts)}, " + ("as a chat" if template else "as plain text"))
    session = setup.start(prepared)
    answers: list[str] = []
    try:
        for start in range(0, len(texts), recipe.predict_batch_size):
            part = encoded[start : start + recipe.predict_batch_size]
            sampling = derive.sampling(recipe, max(map(len, part)))
            sampling = replace(sampling, stop_ids=prompts.stop_ids(prepared.spec.eos_token_ids))
            answers += Answerer(session.engine, tokenizer, sampling, prompts.stop_texts()).answer(part)
            for text, answer in zip(texts[start:], answers[start:], strict=False):
                console.say(f"> {text}\n{answer}")
    finally:
        session.distributed.shutdown()
    if session.rank == 0:
        pairs = [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        target = prepared.output_dir / outputs.PREDICTIONS
        write_text(target, "".join(lines))
        console.say(f"written: {target}")


def _texts(item: str) -> list[str]:
    """The prompts of an entry of `predict_data`: a text as it is, of a file its lines."""
    try:
        is_file = Path(item).is_file()
    except OSError:
        is_file = False
    return read_prompts(Path(item)) if is_file else [item]
