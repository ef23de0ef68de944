"""Recurrent layers, step by step, so that each gate and each non-linearity in them can be a site.

    LSTM    c' = f c + i tanh(g),  h' = o tanh(c')        i, f, o = sigmoid(...), projected: h' = w_hr (o tanh(c'))
    GRU     h' = (1 - z) n + z h,  n = tanh(x_n + r h_n)  r, z = sigmoid(...)
    RNN     h' = tanh(...) or relu(...)

A packed sequence holds what its sequences have at the first step, then at the second, and so on; the longest sequence
comes first, so that fewer and fewer rows are left.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import Function

Weights = tuple[Tensor | None, ...]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next hidden and cell state."""
    hidden, cell = hx
    gates = (F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
    enter, forget, out = (gates[place].sigmoid() for place in (0, 1, 3))
    cell = forget * cell + enter * gates[2].tanh()
    hidden = out * cell.tanh()
    return hidden if w_hr is None else F.linear(hidden, w_hr), cell


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """The next state."""
    new, old = F.linear(input, w_ih, b_ih).chunk(3, -1), F.linear(hx, w_hh, b_hh).chunk(3, -1)
    reset, keep = (new[0] + old[0]).sigmoid(), (new[1] + old[1]).sigmoid()
    proposed = (new[2] + reset * old[2]).tanh()
    return (1 - keep) * proposed + keep * hx


def rnn_cell(activation: Function) -> Function:
    """The cell without gates, of an activation."""

    def cell(
        input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        return activation(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))

    return cell


def recurrent(cell: Function) -> Function:
    """Layers of a cell, as torch calls them: of an input [steps, n, C] (or [n, steps, C]), or of packed rows."""
    states = 2 if cell is lstm_cell else 1

    def run(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        packed = not isinstance(args[2], bool)
        batch_sizes, args = (args[0], args[1:]) if packed else (None, args)
        hx, weights, biased, layers, dropout, training, bidirectional, *batch_first = args
        axis = 1 if batch_first and batch_first[0] else 0
        steps = input.unbind(axis) if batch_sizes is None else torch.split(input, batch_sizes.tolist())
        starts = [state.unbind(0) for state in (hx if states == 2 else (hx,))]
        ways = 1 + bidirectional
        each = len(weights) // (layers * ways)
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            if layer:
                steps = tuple(F.dropout(step, dropout, training) for step in steps)
            found = []
            for place in range(layer * ways, (layer + 1) * ways):
                own = _arguments(weights[place * each : (place + 1) * each], biased)
                start = tuple(start[place] for start in starts)
                outputs, end = _sequence(cell, steps, start, own, backward=place % ways == 1)
                found.append(outputs)
                ends.append(end)
            steps = tuple(torch.cat(both, -1) for both in zip(*found, strict=True)) if bidirectional else found[0]
        last = (torch.stack([end[state] for end in ends]) for state in range(states))
        return (torch.stack(steps, axis) if batch_sizes is None else torch.cat(steps), *last)

    return run


def _arguments(weights: Sequence[Tensor], biased: bool) -> Weights:
    """The weights of a cell in its order: w_ih, w_hh, b_ih, b_hh and, of projected states, w_hr."""
    biases: Weights = tuple(weights[2:4]) if biased else (None, None)
    return (*weights[:2], *biases, *weights[4 if biased else 2 :])


def _sequence(
    cell: Function, steps: Sequence[Tensor], start: tuple[Tensor, ...], weights: Weights, backward: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs of all steps, in their order, and the last state of each row."""
    state: tuple[Tensor, ...] = ()
    outputs: list[Tensor] = []
    ended: list[tuple[Tensor, ...]] = []

    def run(step: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        after = cell(step, state if len(state) == 2 else state[0], *weights)
        return after if len(state) == 2 else (after,)

    for step in reversed(steps) if backward else steps:
        rows, left = len(state[0]) if state else 0, len(step)
        if left < rows:  # forward, shorter sequences end
            ended.append(tuple(part[left:] for part in state))
            state = tuple(part[:left] for part in state)
        parts = [run(step[:rows] if rows < left else step, state)] if state else []
        if rows < left:  # backward, they begin: on their own, as their first states may be constants
            parts.append(run(step[rows:], tuple(part[rows:left] for part in start)))
        state = parts[0] if len(parts) == 1 else _joined(*parts)
        outputs.append(state[0])
    return tuple(outputs[::-1] if backward else outputs), _joined(state, *reversed(ended)) if ended else state


def _joined(*states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """States of some rows and of those behind them."""
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
