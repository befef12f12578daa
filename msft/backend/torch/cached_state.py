"""Generation with state spaces: what a layer remembers of each row is a state and its convolution's last inputs."""

import numpy as np
import torch

from msft.backend.torch import block, ops, state_block
from msft.backend.torch.state_space import STRIP, Scan, step_of


class StateSession:
    """A batch being generated; see `decoding.Session`."""

    bucket = STRIP

    def __init__(self, model, max_new_tokens: int):
        self.decoder, self.space = model.decoder, model.decoder.spec.state_space
        self.compute = ops.dtype(model.runtime.precision.compute)
        self.scan, self.step = Scan(self.space), step_of(self.space)
        spec = self.decoder.spec
        names = [spec.layer(number).removesuffix(".") for number in range(spec.num_hidden_layers)]
        self.layers = [self.decoder.network.get_submodule(name) for name in names]

    @torch.inference_mode()
    def prefill(self, input_ids: np.ndarray, padding: np.ndarray) -> np.ndarray:
        """Take left-padded prompts int32 [rows, length] with `padding` int32 [rows]; return the last logits."""
        rows, length = input_ids.shape
        slots = np.arange(length) - padding[:, None]
        places = self.decoder.tensor(np.maximum(slots, 0).astype(np.int32).reshape(-1))
        inside = self.decoder.tensor(slots[:, 1 - self.space.conv_kernel :] >= 0)
        self.weight, self.memories = self.decoder.head_weight(), []
        hidden = self.decoder.entered(input_ids.reshape(1, -1), slots.reshape(1, -1))
        with self.decoder.autocast():
            for layer in self.layers:
                hidden = self._through(layer, hidden, places, inside)
            return self._logits(hidden.unflatten(1, (rows, length))[0, :, -1])

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Take one more token for each row, int32 [rows]; return the next logits, float32 [rows, vocabulary]."""
        hidden = self.decoder.entered(tokens[None], tokens[None])
        with self.decoder.autocast():
            for number, layer in enumerate(self.layers):
                hidden = self._next(number, layer, hidden)
            return self._logits(hidden[0])

    def _through(self, layer, hidden, places, inside):
        """The hidden states of whole prompts behind a layer, which remembers how they end."""
        mixer, rows = layer.mixer, len(inside)
        gate, columns, steps = state_block.projected(layer, self.space, hidden)
        found = state_block.convolved(mixer, self.space, columns, places)
        taken = state_block.packed(mixer, self.space, self.compute, found, steps).squeeze(0)
        with torch.autocast(taken.device.type, enabled=False):
            tensors = state_block.scanned(mixer, self.space)
            results = [result[1:] for result in self.scan.results(taken, tensors, places)]
        outputs, states = zip(*results, strict=True)
        strips = len(states) // rows
        inputs = columns.unflatten(1, (rows, -1))[0, :, 1 - self.space.conv_kernel :] * inside.unsqueeze(-1)
        self.memories.append((inputs, torch.stack(states[strips - 1 :: strips])))
        return state_block.left(mixer, self.space, self.compute, hidden, torch.cat(outputs).unsqueeze(0), gate)

    def _next(self, number, layer, hidden):
        """The hidden states [1, rows, hidden] of one token a row behind a layer, which remembers it."""
        (inputs, state), mixer = self.memories[number], layer.mixer
        gate, columns, steps = state_block.projected(layer, self.space, hidden)
        window = torch.cat((inputs, columns[0].unsqueeze(1)), 1)
        found = state_block.mixed_window(mixer, list(window.unbind(1))).unsqueeze(0)
        taken = state_block.packed(mixer, self.space, self.compute, found, steps).squeeze(0)
        with torch.autocast(taken.device.type, enabled=False):
            outputs, state = self.step(taken, state, *state_block.scanned(mixer, self.space))
        self.memories[number] = window[:, 1:], state
        return state_block.left(mixer, self.space, self.compute, hidden, outputs.unsqueeze(0), gate)

    def _logits(self, last):
        spec = self.decoder.spec
        last = self.decoder.network.get_submodule(spec.outside.norm)(last)
        return ops.to_numpy(block.few_rows(last.to(self.weight.dtype), self.weight).float())
