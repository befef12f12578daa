"""What MindFormers 1.3.2's llama_preprocess makes of a conversation, from FastChat's template and sentencepiece.

Its offsets (-1 for the begin token, -3 for the begin, the end and the lone space after "ASSISTANT:") are kept, and so
is its check: a row whose count of tokens disagrees is masked as a whole.
"""

from fastchat.conversation import get_conv_template

PAD, BEGIN, END, IGNORE = 0, 1, 2, -100


def tokens(model, text):
    """MindFormers' LlamaTokenizer with begin and end tokens."""
    return [BEGIN, *model.encode(text), END]


def encode(model, turns, length):
    """Return ids, labels and whether MindFormers' own bookkeeping agreed with itself."""
    template = get_conv_template("vicuna_v1.1")
    for number, words in enumerate(turns):
        template.append_message(template.roles[number % 2], words)
    rounds = [each for each in template.get_prompt().split(template.sep2) if each]
    opening = template.sep + template.roles[1] + ": "
    ids = [BEGIN] + [token for each in rounds for token in tokens(model, each)[1:]]
    ids += [PAD] * (length - len(ids))
    labels, place = list(ids), 1
    labels[0] = IGNORE
    for each in rounds:
        parts = each.split(opening)
        if len(parts) != 2:
            break
        instruction = len(tokens(model, parts[0] + opening)) - 3
        labels[place : place + instruction] = [IGNORE] * instruction
        place += len(tokens(model, each)) - 1
    labels[place:] = [IGNORE] * (len(labels) - place)
    agrees = place >= length or place == sum(token != PAD for token in ids)
    return ids[:length], labels[:length], agrees
