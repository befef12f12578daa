"""Reading a Hugging Face `config.json` of transformers 4 or 5: every missing or impossible value is named at once."""

from collections.abc import Mapping

from msft.errors import InputError
from msft.models.rope import is_number
from msft.models.spec import ModelSpec

MAX_LAYERS = 10_000
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window")
NUMBERS = ("norm_eps", "initializer_range", "rope_theta")
FLAGS = ("tie_word_embeddings",)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What Llama's config calls these; families that call a value something else say so.
LLAMA_KEYS = {"norm_eps": "rms_norm_eps", "activation": "hidden_act"}


class HfConfig:
    """A config.json under this module's names of values.

    `keys` are the file's own where they differ, `defaults` what transformers' config class takes for an absent value.
    """

    def __init__(
        self,
        config: dict,
        where: str,
        keys: Mapping[str, str] | None = None,
        defaults: Mapping[str, object] | None = None,
    ):
        self.config, self.where = config, where
        self.keys, self.defaults = {**LLAMA_KEYS, **(keys or {})}, dict(defaults or {})

    def get(self, name: str, default=None):
        """Return a value; a null counts as absent."""
        value = self.config.get(self.keys.get(name, name))
        return self.defaults.get(name, default) if value is None else value

    def shown(self, name: str) -> str:
        """Return the file's own key for a value."""
        return self.keys.get(name, name)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a value that is true or false; raises InputError for any other."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: '{self.shown(name)}' must be true or false, not {value!r:.80}")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return a number; raises InputError for anything else."""
        value = self.get(name, default)
        if value is not None and not is_number(value):
            raise InputError(f"{self.where}: '{self.shown(name)}' must be a number of 0 or more, not {value!r:.80}")
        return None if value is None else float(value)

    def size(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0; raises InputError for anything else."""
        value = self.get(name, default)
        if not _is_size(value):
            raise InputError(f"{self.where}: '{self.shown(name)}' must be a whole number above 0, not {value!r:.80}")
        return value

    def experts(self) -> tuple[int, int]:
        """Return how many experts there are (`count`), and how many a token has (`chosen`)."""
        count, chosen = self.size("count"), self.size("chosen")
        if chosen > count:
            raise InputError(
                f"{self.where}: {self.shown('chosen')} ({chosen}) is more than {self.shown('count')} ({count})"
            )
        return count, chosen

    def numbers(self, name: str) -> list[int]:
        """Return a list of whole numbers of 0 or more, empty where it is absent; raises InputError for others."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(type(number) is int and number >= 0 for number in value):
            raise InputError(f"{self.where}: '{self.shown(name)}' must be a list of layers' numbers, not {value!r:.80}")
        return value

    def refuse(self, name: str, *allowed) -> None:
        """Raise InputError where a value is given that is none of those that are supported."""
        value = self.get(name)
        if value is not None and value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise InputError(f"{self.where}: '{self.shown(name)}' is {value!r:.80}; only {known} is supported")

    def partial_rotary(self, head_dim: int, default: float) -> int:
        """Return how many features of a head are turned, by `partial_rotary_factor`."""
        parameters = self.get("rope_parameters") or {}
        factor = self.number("partial_rotary_factor", parameters.get("partial_rotary_factor", default))
        found = int(head_dim * factor)
        if found % 2 or not 0 < found <= head_dim:
            raise InputError(f"{self.where}: {factor} of a head of {head_dim} features cannot be turned in pairs")
        return found

    def windows(self) -> tuple[int, ...]:
        """Return each layer's window of attention, 0 = none, where the file says which layers have one."""
        window, layers = self.get("sliding_window", 0), self.get("num_hidden_layers")
        kinds = self.get("layer_types")
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise InputError(f"{self.where}: 'layer_types' must be a list with an entry for each of {layers} layers")
        self._known_layers(kinds)
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    def _known_layers(self, kinds: list) -> None:
        known = ("full_attention", "sliding_attention")
        foreign = [kind for kind in kinds if kind not in known]
        if foreign:
            raise InputError(
                f"{self.where}: 'layer_types' has {foreign[0]!r:.80}; only {' and '.join(known)} are known"
            )

    def spec(self, family: str, activations: tuple[str, ...] = ("silu",), **more) -> ModelSpec:
        """Return the ModelSpec of the values that all decoders have; `more` are the family's own fields.

        Raises InputError naming every missing or impossible value.
        """
        problems = [f"{self.where}: {problem}" for problem in (*self._impossible(), *self._foreign(activations))]
        if problems:
            raise InputError(*problems)
        heads, hidden = self.get("num_attention_heads"), self.get("hidden_size")
        kv_heads, head_dim = self.get("num_key_value_heads", heads), self.get("head_dim", hidden // heads)
        if heads % kv_heads:
            raise InputError(
                f"{self.where}: {self.shown('num_attention_heads')} ({heads}) is no multiple of "
                f"{self.shown('num_key_value_heads')} ({kv_heads})"
            )
        theta, scaling = self._rope()
        layers, eos = self.get("num_hidden_layers"), self.get("eos_token_id")
        fields = {
            "norm_eps": float(self.get("norm_eps", 1e-6)),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rotary_dim": head_dim,
            "max_position_embeddings": self.get("max_position_embeddings", 2048),
            "tie_word_embeddings": bool(self.get("tie_word_embeddings", False)),
            "attention_scale": head_dim**-0.5,
            "windows": (0,) * layers,
            **more,
        }
        if fields["rotary_dim"] % 2:
            raise InputError(f"{self.where}: head_dim ({head_dim}) must be even for rotary embedding")
        return ModelSpec(
            family=family,
            vocab_size=self.get("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.get("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            initializer_range=float(self.get("initializer_range", 0.02)),
            bos_token_id=self.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            pad_token_id=self.get("pad_token_id"),
            hf_config=self.config,
            **fields,
        )

    def _impossible(self) -> list[str]:
        """Say what is wrong with each value by itself."""
        problems = []
        for name in SIZES + OPTIONAL_SIZES:
            value = self.get(name)
            if not (value is None and name in OPTIONAL_SIZES) and not _is_size(value):
                problems.append(f"'{self.shown(name)}' must be a whole number above 0, not {value!r:.80}")
        layers = self.get("num_hidden_layers")
        if _is_size(layers) and layers > MAX_LAYERS:
            problems.append(f"'{self.shown('num_hidden_layers')}' is {layers}, more than {MAX_LAYERS}")
        for name in NUMBERS:
            value = self.get(name)
            if value is not None and not is_number(value):
                problems.append(f"'{self.shown(name)}' must be a number, not {value!r:.80} (0 or more, and finite)")
        for name in FLAGS:
            if not isinstance(self.get(name), bool | None):
                problems.append(f"'{self.shown(name)}' must be true or false, not {self.get(name)!r:.80}")
        for name in TOKENS:
            value = self.get(name)
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            if not all(each is None or type(each) is int and abs(each) < 2**31 for each in ids):
                problems.append(f"'{self.shown(name)}' must be a token's number, not {value!r:.80}")
        for name in ("rope_parameters", "rope_scaling"):
            problems += _impossible_rope(name, self.get(name))
        return problems

    def _foreign(self, activations: tuple[str, ...]) -> list[str]:
        given = self.get("activation", activations[0])
        if given in activations:
            return []
        known = " or ".join(map(repr, activations))
        return [f"'{self.shown('activation')}' is {given!r:.80}; only {known} is supported"]

    def _rope(self) -> tuple[float, dict | None]:
        rope = dict(self.get("rope_parameters") or self.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", None) or self.get("rope_theta") or 10000.0)
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
        rope.pop("type", None)
        # How much of a head is turned is the family's to say.
        rope.pop("partial_rotary_factor", None)
        return theta, None if kind == "default" else {"rope_type": kind, **rope}


def _impossible_rope(key: str, rope) -> list[str]:
    """What `msft.models.rope` does not see: it checks the numbers that a kind needs."""
    if not isinstance(rope, dict | None):
        return [f"'{key}' must be an object, not {rope!r:.80}"]
    problems = []
    for name in ("rope_type", "type"):
        if rope and not isinstance(rope.get(name), str | None):
            problems.append(f"'{key}': '{name}' must be text, not {rope[name]!r:.80}")
    if rope and not (rope.get("rope_theta") is None or is_number(rope["rope_theta"])):
        problems.append(f"'{key}': 'rope_theta' must be a number of 0 or more, not {rope['rope_theta']!r:.80}")
    return problems


def _is_size(value) -> bool:
    return type(value) is int and 0 < value < 2**40
