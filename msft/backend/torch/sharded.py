"""The model and the optimizer of a run whose ranks hold a part of everything each (`sharding`)."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from msft.backend import slices
from msft.backend.contract import Place, Runtime, Tuning
from msft.backend.engine import FrameworkEngine
from msft.backend.torch import ops, placed, sharding
from msft.backend.torch.model import Model
from msft.backend.torch.optimizer import AdamW
from msft.models.spec import ModelSpec


class ShardedModel(Model):
    """A model that is whole nowhere: `tuned` holds what is this rank's of the tensors `parts`.

    All ranks make each call together; arrays go in whole, and come out whole on the first rank.
    """

    def __init__(self, spec: ModelSpec, source, tuning: Tuning, runtime: Runtime):
        super().__init__(spec, source, tuning, runtime)
        self.parts = self.decoder.tuned
        with torch.no_grad():
            self.tuned = {name: part.to_local() for name, part in self.parts.items()}

    def _backward(self, hidden: torch.Tensor, d_hidden: torch.Tensor, d_head: torch.Tensor | None):
        """This rank's rows of the gradients, summed over the ranks: gathering and summing hang on `backward`."""
        roots, gradients = [hidden], [d_hidden]
        if d_head is not None:
            roots.append(placed.local(self.decoder.network.get_output_embeddings()))
            gradients.append(d_head)
        torch.autograd.backward(roots, gradients)
        found = {name: part.grad.to_local() for name, part in self.parts.items()}
        for part in self.parts.values():
            part.grad = None
        return found

    def parameter(self, name: str, dtype: str) -> np.ndarray:
        """Return a whole tensor by its canonical name as it is computed with in a dtype, on every rank."""
        part = self.parts[name] if name in self.parts else self.decoder.parameter(name)
        return ops.to_numpy(sharding.whole(part.detach()).to(ops.dtype(dtype)))

    def export_tuned(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return tuned tensors by name."""
        return sharding.whole_arrays({name: self.tuned[name] for name in names}, self.parts)

    def import_tuned(self, weights: Mapping[str, np.ndarray]) -> None:
        """Overwrite tuned tensors by name."""
        for name, array in weights.items():
            sharding.keep(self.parts[name], ops.from_numpy(array, "cpu", "float32"))

    def tuned_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the whole tuned tensors."""
        return {name: tuple(part.shape) for name, part in self.parts.items()}

    def describe(self) -> dict[str, str]:
        """Say what was applied."""
        slices_of = f" of each of {self.mesh.tensor} slices" if self.mesh.tensor > 1 else ""
        parts = f"{self.mesh.replicas} parts{slices_of}"
        return {
            **super().describe(),
            "strategy": f"fsdp: parameters, gradients and moments in {parts}, gathered block by block",
        }


class ShardedAdamW(AdamW):
    """AdamW over this rank's rows of the gradients and moments."""

    def shares(self) -> list[dict[str, np.ndarray]]:
        """Return copies of this rank's rows of the tuned tensors, the first and the second moments."""
        kinds = (self.model.tuned, self.first, self.second)
        return [{name: ops.to_numpy(tensor) for name, tensor in tensors.items()} for tensors in kinds]

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return sharding.place(self.model.parts[name]).of(whole)

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return self.to_numpy(tensors)

    def to_numpy(self, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Return whole float32 copies on the first rank, none on the others."""
        return sharding.whole_arrays(tensors, self.model.parts)


class ShardedEngine(FrameworkEngine):
    """The shared engine over tensors that are whole as a model of DTensors sees them; ranks give what they hold."""

    def _norm(self, gradients: dict[str, torch.Tensor]) -> float:
        return math.sqrt(self.distributed.sum_numbers([super()._norm(gradients) ** 2])[0])

    def _whole(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return arrays

    def _own(self, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return arrays

    def _held_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.model.tuned_shapes()

    def _places(self) -> dict[str, Place]:
        found = {name: sharding.place(part) for name, part in self.model.parts.items()}
        return {name: place for name, place in found.items() if place.shape[0] and slices.counts(name, self.mesh)}
