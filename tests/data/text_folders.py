"""Small real tokenizers for the tests: trained here, or the sentencepiece model that mistral-common ships."""

import json
from collections.abc import Sequence
from pathlib import Path

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 1234 questions and 56 answers!",
    "USER: What is the capital of France? ASSISTANT: Paris is the capital of France.\n\nIndeed it is.",
    "def add(a, b):\n    return a + b\n",
    "café naïve 你好世界 😀 e\u0301 ﬁ ½Ａ",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXTS = [
    "Hello world",
    " leading and trailing ",
    "two  spaces\tand a tab\n\nand 2 lines",
    "12345 6.78",
    "½Ａﬁ x",
    "café 你好 😀👩‍👩‍👧 e\u0301 ﬁ Ａ①",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a</s>b <s> c<unk>",
    "",
    "\n",
    "’quotes’ … “and” \u2581x\x00y",
]


def llama_model() -> Path:
    """A sentencepiece model of Llama 2's kind with 32000 pieces."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def write_config(folder: Path, **config) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_folder(folder: Path, specials: Sequence[str] = CHATML_TOKENS, **config) -> Path:
    """A GPT-2 style tokenizer with special tokens (ChatML's), offsets trimmed as GPT-2 and Llama 3 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    defaults = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    return write_config(folder, **(defaults | config))


def metaspace_folder(folder: Path, **config) -> Path:
    """A Llama 2 style tokenizer: BPE with byte fallback and a Prepend normalizer, begin token put by a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    specials = [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")]
    specials += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    state = json.loads(tokenizer.to_str())
    state["added_tokens"], state["pre_tokenizer"] = state["added_tokens"][:3], None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return write_config(folder, **(names | config))


def train_sentencepiece(folder: Path, **settings) -> Path:
    """A small sentencepiece model with other settings than Llama's."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 5))
    options = {"vocab_size": 120, "hard_vocab_limit": False, "minloglevel": 2} | settings
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), **options
    )
    return folder / "tokenizer.model"
