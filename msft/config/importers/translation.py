"""From a document with a toolkit's keys to one with the recipe's, place by place."""

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError

from msft.config.block import Block
from msft.config.importers import Toolkit
from msft.config.markers import Refused, Unused, shown
from msft.config.problems import in_words
from msft.config.report import Ignored
from msft.config.schema import Recipe
from msft.config.yaml_lines import Document, Keys, Place, Problem
from msft.errors import did_you_mean

# Keys of a recipe that may stand beside another toolkit's, which says nothing about them.
OURS = (
    "backend",
    "device",
    "use_parallel",
    "hang_timeout",
    "strategy",
    "torch_compile",
    "parallel_config",
    "parallel",
    "context",
)


class Translation:
    """A toolkit's file on its way: `keys` are its checked values, `document` is what has been written so far.

    `told` is what the report says of keys that do nothing here, or otherwise than there. `given` are the dotted keys
    of the recipe that the command line sets.
    """

    def __init__(self, source: Document, toolkit: Toolkit, given: Collection[str] = ()):
        self.source, self.toolkit, self.given = source, toolkit, given
        self.document = Document(source.name, problems=list(source.problems))
        self.told: list[Ignored] = []
        self.keys: Any = self._checked()
        self._take_over_ours()

    def wrote(self, key: str) -> bool:
        """Whether the file has a key, with a value."""
        return self.source.data.get(key) is not None

    def put(self, path: str, value: Any, key: str) -> None:
        """Write a value at a dotted path of the recipe, at the place of the toolkit's key it comes from."""
        *way, last = path.split(".")
        block, here = self.document.data, ()
        for name in way:
            here = (*here, name)
            block = block.setdefault(name, {})
            self._stands(here, key)
        block[last] = value
        self._stands((*here, last), key)

    def stands(self, path: Keys, key: str) -> None:
        """Say that what is wrong at a path is the fault of a key."""
        self.document.keys[path] = self.document.values[path] = self.place(key)

    def place(self, key: str) -> Place:
        """Return the place of a key, with its name, or the toolkit's default of it."""
        found = self.source.keys.get((key,))
        if found is None or not self.wrote(key):
            return Place(0, f"{self.source.name}: {self.toolkit.name}'s default of {key}")
        return found if found.text.removeprefix("--") == key else Place(found.order, f"{found.text} {key}")

    def refuse(self, key: str, message: str) -> None:
        """Report a key that cannot be taken."""
        found = self.source.keys.get((key,))
        place = found if found else Place(0, self.source.name)
        self.document.problems.append(Problem(place, key, message))

    def tell(self, key: str, why: str) -> None:
        """Report a key that does nothing here, or something else than there."""
        self.told.append(Ignored(self.source.place((key,), of_key=True), key, why))

    def put_files(self, name: str, files: list[dict[str, Any]], key: str) -> bool:
        """Write the raw files of a dataset block and return True, unless the command line names a MindRecord."""
        at = f"{name}.data_loader"
        if f"{at}.dataset_dir" in self.given:
            self.tell(key, "the command line names a MindRecord file, which wins")
            return False
        self.put(f"{at}.raw.files", files, key)
        for index in range(len(files)):
            self.stands((name, "data_loader", "raw", "files", index, "path"), key)
        return True

    def _stands(self, path: Keys, key: str) -> None:
        if path not in self.document.values:
            self.stands(path, key)

    def _checked(self) -> Block:
        """The file's values, without those that are reported."""
        block, known = self.toolkit.keys, self.toolkit.keys.model_fields
        data = {key: value for key, value in self.source.data.items() if key in known}
        for key in self.source.data:
            if key not in known and key not in OURS:
                near = did_you_mean(key, known)
                self.refuse(key, f"unknown key in a file of {self.toolkit.name}{near}")
        try:
            keys = block.model_validate(data)
        except ValidationError as error:
            wrong = {item["loc"][0]: in_words(item, item["loc"][:1]) for item in error.errors(include_url=False)}
            for key, message in wrong.items():
                self.refuse(key, message)
            keys = block.model_validate({key: value for key, value in data.items() if key not in wrong})
        self._look_at_marks(keys)
        return keys

    def _look_at_marks(self, keys: Block) -> None:
        for key in self.source.data:
            field = type(keys).model_fields.get(key)
            value = getattr(keys, key, None)
            for mark in field.metadata if field else ():
                if isinstance(mark, Unused) and self.wrote(key):
                    self.tell(key, mark.why)
                if isinstance(mark, Refused) and value is not None and value not in mark.neutral:
                    self.refuse(key, f"{shown(value)} is not supported: {mark.why}")

    def _take_over_ours(self) -> None:
        for key in OURS:
            if key in self.source.data and key in Recipe.model_fields and key not in self.toolkit.keys.model_fields:
                self.document.data[key] = self.source.data[key]
                for places, old in ((self.document.keys, self.source.keys), (self.document.values, self.source.values)):
                    places.update({path: place for path, place in old.items() if path[:1] == (key,)})


def translated(source: Document, toolkit: Toolkit, given: Collection[str]) -> tuple[Document, list[Ignored]]:
    """Return the recipe's document of another toolkit's file, and what to report about its keys.

    `given` are the dotted keys of the recipe that the command line sets.
    """
    translation = Translation(source, toolkit, given)
    toolkit.translate(translation)
    return translation.document, translation.told
