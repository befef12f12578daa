"""Selective scans over a line of tokens, a strip of them at a time, and their exact gradients; all in float32.

A strip takes the state that the one before it leaves. Of what happens within a strip nothing is kept: on its way back
it is computed again, so that memory follows the strip. Where an example begins, its state is 0.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional

from msft.models.state_space import StateSpace

STRIP = 64
# Mamba's strips are chunks of so many tokens, which are computed at once, token by token.
CHUNK = 16
FORGET = 1e30


def described(space: StateSpace) -> str:
    """Say in words how layers without attention are computed."""
    kind = "products of matrices" if space.num_heads else f"chunks of {CHUNK} at once"
    return f"none: states, scanned in float32 by plain operators, strips of {STRIP} tokens, {kind}"


class Scan:
    """The scan of one kind of layer: what it takes of a token, and the state, are as `StateSpace` says.

    A state is [state_size, channels].
    """

    def __init__(self, space: StateSpace):
        self.space = space
        self.strip = strip_of(space)
        by_hand = functools.partial(_channels_gradients, space)
        self.gradients = functools.partial(_heads_gradients, self.strip) if space.num_heads else by_hand

    def forward(self, packed: torch.Tensor, tensors: tuple[torch.Tensor, ...], places: torch.Tensor) -> torch.Tensor:
        """Return outputs float32 [length, channels] for what the scan takes [length, packed] and a layer's tensors.

        `places` int32 [length] are the tokens' places in their examples.
        """
        length = len(packed)
        fill = -length % STRIP
        packed, places = functional.pad(packed, (0, 0, 0, fill)), functional.pad(places, (0, fill))
        return _Scanned.apply(self, packed, places, *tensors)[:length]

    def results(self, packed: torch.Tensor, tensors: tuple[torch.Tensor, ...], places: torch.Tensor):
        """Yield each strip's state before it, its outputs, and the state behind it; length is a multiple of STRIP."""
        state = packed.new_zeros(self.space.state_size, self.space.intermediate_size, dtype=torch.float32)
        for begin in range(0, len(packed), STRIP):
            part = slice(begin, begin + STRIP)
            outputs, behind = self.strip(packed[part], places[part], state, *tensors)
            yield state, outputs, behind
            state = behind


class _Scanned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan, packed, places, *tensors):
        with torch.autocast(packed.device.type, enabled=False):
            befores, outputs, _ = zip(*scan.results(packed, tensors, places), strict=True)
        ctx.scan, ctx.count = scan, len(tensors)
        ctx.save_for_backward(packed, places, *tensors, *befores)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx, gradient):
        packed, places, *saved = ctx.saved_tensors
        tensors, befores = saved[: ctx.count], saved[ctx.count :]
        by_state, by_packed = torch.zeros_like(befores[0]), torch.empty_like(packed)
        needed = zip(tensors, ctx.needs_input_grad[3:], strict=True)
        totals = [torch.zeros_like(one) if needs else None for one, needs in needed]
        with torch.autocast(packed.device.type, enabled=False):
            for number in reversed(range(len(befores))):
                part = slice(number * STRIP, (number + 1) * STRIP)
                taken = packed[part], places[part], befores[number], tensors, gradient[part], by_state
                by_packed[part], by_state, found = ctx.scan.gradients(*taken)
                for total, one in zip(totals, found, strict=True):
                    if total is not None:
                        total += one
        return None, by_packed, None, *totals


def _heads_gradients(strip, packed, places, state, tensors, gradient, by_state):
    """What `_channels_gradients` gives, by torch's own differentiation."""
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in (packed, state, *tensors)]
        results = strip(leaves[0], places, *leaves[1:])
        by_packed, by_state, *by_tensors = torch.autograd.grad(results, leaves, (gradient, by_state))
    return by_packed, by_state, by_tensors


def strip_of(space: StateSpace):
    """Return (packed [STRIP, n], places [STRIP], state, decays, biases of steps, what passes) -> outputs, state."""
    return _heads_strip(space) if space.num_heads else _channels_strip(space)


class _Chunks(NamedTuple):
    """A strip of Mamba as chunks that go on together: for each token a tensor of all chunks; states before and after.

    `kept` and `states` are [chunks, state_size, channels], the others [chunks, n]; `steps` forget where examples begin.
    """

    inputs: torch.Tensor
    biased: torch.Tensor
    plain_steps: torch.Tensor
    decays: torch.Tensor
    written: tuple[torch.Tensor, ...]
    steps: tuple[torch.Tensor, ...]
    write: tuple[torch.Tensor, ...]
    read: tuple[torch.Tensor, ...]
    kept: list[torch.Tensor]
    ends: torch.Tensor
    states: list[torch.Tensor]
    behind: torch.Tensor


def _by_token(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.unflatten(0, (STRIP // CHUNK, CHUNK)).transpose(0, 1).unbind()


def _in_order(by_token: list[torch.Tensor]) -> torch.Tensor:
    """What `_by_token` took apart."""
    return torch.stack(by_token, 1).flatten(0, 1)


def _chunks(space: StateSpace, packed, places, state, decays, biases) -> _Chunks:
    """Chunks go through their tokens twice: from nothing to find what each leaves, then from what that gives it."""
    channels, states = space.intermediate_size, space.state_size
    inputs, raw, write, read = packed.float().split((channels, channels, states, states), 1)
    biased = raw + biases.float()
    plain_steps = functional.softplus(biased)
    # Where an example begins, a step that is long enough for every decay to forget what was before.
    steps = plain_steps.masked_fill((places == 0).unsqueeze(-1), FORGET)
    decays = -decays.float().exp().t()
    ends = (steps.unflatten(0, (-1, CHUNK)).sum(1).unsqueeze(1) * decays).exp_()
    written, steps, write, read = (_by_token(one) for one in (plain_steps * inputs, steps, write, read))
    kept = [(step.unsqueeze(1) * decays).exp_() for step in steps]
    added = [one.unsqueeze(1) * to.unsqueeze(2) for one, to in zip(written, write, strict=True)]
    leaves = added[0]
    for keep, add in zip(kept[1:], added[1:], strict=True):
        leaves = torch.addcmul(add, keep, leaves)
    starts = []
    for end, leave in zip(ends, leaves, strict=True):
        starts.append(state)
        state = torch.addcmul(leave, end, state)
    found = [torch.stack(starts)]
    for keep, add in zip(kept, added, strict=True):
        found.append(add.addcmul_(keep, found[-1]))
    return _Chunks(inputs, biased, plain_steps, decays, written, steps, write, read, kept, ends, found, state)


def _channels_strip(space: StateSpace):
    def strip(packed, places, state, decays, biases, passed):
        chunks = _chunks(space, packed, places, state, decays, biases)
        outputs = [torch.bmm(to.unsqueeze(1), one) for to, one in zip(chunks.read, chunks.states[1:], strict=True)]
        return torch.cat(outputs, 1).flatten(0, 1) + chunks.inputs * passed.float(), chunks.behind

    return strip


def _channels_gradients(space: StateSpace, packed, places, state, tensors, gradient, by_state):
    """The gradients of what tokens give, of the state before, and of the tensors; written out, with few large tensors.

    Backwards too chunks go through their tokens twice.
    """
    decays, biases, passed = tensors
    chunks = _chunks(space, packed, places, state, decays, biases)
    by_output, leaves = _by_token(gradient), None
    into = [to.unsqueeze(2) * one.unsqueeze(1) for to, one in zip(chunks.read, by_output, strict=True)]
    for keep, one in zip(reversed(chunks.kept), reversed(into), strict=True):
        leaves = keep * one if leaves is None else (leaves + one).mul_(keep)
    starts = []
    for end, leave in zip(reversed(chunks.ends), reversed(leaves), strict=True):
        starts.insert(0, by_state)
        by_state = torch.addcmul(leave, end, by_state)
    later, by_decays = torch.stack(starts), torch.zeros_like(chunks.states[0])
    by_write, by_read, by_written, by_steps = [], [], [], []
    for token in reversed(range(CHUNK)):
        by_this = into[token].add_(later)
        by_written.insert(0, torch.bmm(chunks.write[token].unsqueeze(1), by_this).squeeze(1))
        by_write.insert(0, torch.bmm(by_this, chunks.written[token].unsqueeze(2)).squeeze(2))
        by_read.insert(0, torch.bmm(chunks.states[token + 1], by_output[token].unsqueeze(2)).squeeze(2))
        later = by_this.mul_(chunks.kept[token])
        by_exponent = chunks.states[token] * later
        by_decays.addcmul_(by_exponent, chunks.steps[token].unsqueeze(1))
        by_steps.insert(0, by_exponent.mul_(chunks.decays).sum(1))
    by_written, by_write, by_read, by_steps = map(_in_order, (by_written, by_write, by_read, by_steps))
    by_inputs = gradient * passed.float() + by_written * chunks.plain_steps
    by_raw = (by_steps + by_written * chunks.inputs) * chunks.biased.sigmoid()
    by_packed = torch.cat((by_inputs, by_raw, by_write, by_read), 1).to(packed.dtype)
    by_tensors = (by_decays.sum(0) * chunks.decays).t(), by_raw.sum(0), (gradient * chunks.inputs).sum(0)
    return by_packed, by_state, by_tensors


def _heads_strip(space: StateSpace):
    """Mamba2: section 6 of arXiv 2405.21060, products of matrices within the strip and with the state before it."""
    states, channels = space.state_size, space.intermediate_size
    heads, dim, groups = space.num_heads, space.head_dim, space.n_groups
    sizes = channels, groups * states, groups * states, heads

    def by_group(values):
        return values.reshape(STRIP, groups, -1).transpose(0, 1)

    def strip(packed, places, state, decays, biases, passed):
        inputs, write, read, raw = packed.float().split(sizes, 1)
        steps = steps_of(raw, biases, space.time_step_limit)
        falls = (steps * -decays.float().exp()).t()
        order = torch.arange(STRIP, device=packed.device)
        until, later = (order <= order[:, None]).float(), (order[:, None] > order).float()
        # What a token's example has in the strip begins here; below 0 it began before.
        begins = order - places
        sees, goes_on = until * (order >= begins[:, None]), (begins < 0).float()
        # Sums from each token to each later one, not differences of sums, which lose small ones beside large ones.
        weights = (until @ (falls.unsqueeze(-1) * later)).exp() * sees
        since = (falls @ until.t()).exp() * goes_on
        by_head = inputs.unflatten(1, (heads, dim))
        written = by_head * steps.unsqueeze(-1)
        write, read = by_group(write), by_group(read)
        scores = (read @ write.mT).unsqueeze(1) * weights.unflatten(0, (groups, -1))
        within = (scores.flatten(0, 1) @ written.transpose(0, 1)).transpose(0, 1)
        before = state.reshape(states, groups, -1).transpose(0, 1)
        reached = (read @ before).transpose(0, 1).reshape(STRIP, heads, dim)
        outputs = within + reached * since.t().unsqueeze(-1) + by_head * passed.float().unsqueeze(-1)
        leaves = by_group(written * weights[:, -1].t().unsqueeze(-1))
        left = (write.mT @ leaves).transpose(0, 1).reshape(states, heads, dim)
        behind = state.reshape(states, heads, dim) * since[:, -1].unsqueeze(-1) + left
        return outputs.flatten(1), behind.flatten(1)

    return strip


def steps_of(raw: torch.Tensor, biases: torch.Tensor, limit: tuple[float, float]) -> torch.Tensor:
    """Return time steps [tokens, n]: softplus of what a layer gives and their biases, within the limit."""
    found = functional.softplus(raw + biases.float())
    return found if limit == (0.0, float("inf")) else found.clamp(*limit)


def step_of(space: StateSpace):
    """Return (packed [rows, n], state [rows, state_size, channels], decays, biases, what passes) for one token a row.

    It gives the outputs [rows, channels] and the state behind them.
    """
    return _heads_step(space) if space.num_heads else _channels_step(space)


def _channels_step(space):
    states, channels = space.state_size, space.intermediate_size

    def step(packed, state, decays, biases, passed):
        inputs, raw, write, read = packed.float().split((channels, channels, states, states), 1)
        steps = steps_of(raw, biases, space.time_step_limit)
        keep = (steps.unsqueeze(1) * -decays.float().exp().t()).exp()
        state = torch.addcmul((steps * inputs).unsqueeze(1) * write.unsqueeze(2), keep, state)
        return torch.bmm(read.unsqueeze(1), state).squeeze(1) + inputs * passed.float(), state

    return step


def _heads_step(space):
    states, channels, groups = space.state_size, space.intermediate_size, space.n_groups
    heads, dim = space.num_heads, space.head_dim

    def by_group(values):
        return values.unflatten(1, (groups, states)).transpose(1, 2)[..., None, None]

    def step(packed, state, decays, biases, passed):
        sizes = channels, groups * states, groups * states, heads
        inputs, write, read, raw = packed.float().split(sizes, 1)
        steps = steps_of(raw, biases, space.time_step_limit)
        keep = (steps * -decays.float().exp()).exp()
        by_head = inputs.unflatten(1, (heads, dim))
        written = (by_head * steps.unsqueeze(-1)).unflatten(1, (groups, -1)).unsqueeze(1)
        state = state.unflatten(2, (groups, -1, dim)) * keep.unflatten(1, (groups, -1))[:, None, ..., None]
        state = state + by_group(write) * written
        outputs = (by_group(read) * state).sum(1).flatten(1, 2) + by_head * passed.float().unsqueeze(-1)
        return outputs.flatten(1), state.flatten(2)

    return step
