"""Recurrent layers and cells: as if written by hand, row by row and step by step, by the formulas of torch's pages."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import attrbox

LENGTHS = (4, 2, 1)
X = images(3, 4, 6)
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "ReLU RNN": lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o),
}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


def step(kind: str, x: Tensor, state: tuple[Tensor, ...], weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The states behind one step of one row or of all."""
    into = F.linear(x, weights["ih"], weights.get("bias_ih"))
    over = F.linear(state[0], weights["hh"], weights.get("bias_hh"))
    if kind == "LSTM":
        i, f, g, o = (into + over).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return (F.linear(hidden, weights["hr"]) if "hr" in weights else hidden, cell)
    if kind == "GRU":
        (xr, xz, xn), (hr, hz, hn) = into.chunk(3, -1), over.chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return ((1 - z) * n + z * state[0],)
    return (torch.relu(into + over) if kind == "ReLU RNN" else torch.tanh(into + over),)


def by_hand(kind: str, layer: nn.RNNBase, row: Tensor, start: tuple[Tensor, ...] | None = None):
    """One sequence [steps, C] alone: its outputs [steps, ways * H], and the last states of each layer and way."""
    ways = 1 + layer.bidirectional
    names = {"weight_ih": "ih", "weight_hh": "hh", "bias_ih": "bias_ih", "bias_hh": "bias_hh", "weight_hr": "hr"}
    sequence, last, outputs = list(row), [], []
    for number, way in itertools.product(range(layer.num_layers), range(ways)):
        end = f"_l{number}" + "_reverse" * way
        own = {short: getattr(layer, name + end) for name, short in names.items() if hasattr(layer, name + end)}
        hidden, cell = row.new_zeros(own["hh"].shape[1]), row.new_zeros(layer.hidden_size)
        state = (hidden, cell) if kind == "LSTM" else (hidden,)
        if start is not None:
            state = tuple(part[number * ways + way] for part in start)
        found = []
        for x in sequence[::-1] if way else sequence:
            state = step(kind, x, state, own)
            found.append(state[0])
        last.append(state)
        both = found[::-1] if way else found
        outputs = [torch.cat([a, b]) for a, b in zip(outputs, both, strict=True)] if way else both
        if way == ways - 1:
            sequence = outputs
    return torch.stack(sequence), [torch.stack(parts) for parts in zip(*last, strict=True)]


class Net(nn.Module):
    """[N, 4, 6] -> linear -> recurrent layers in one of several ways, or by hand -> scores of outputs and states."""

    def __init__(self, kind: str, hand: bool, way: str, **options: object) -> None:
        super().__init__()
        self.kind, self.hand, self.way = kind, hand, way
        self.before = nn.Linear(6, 4)
        self.layer = KINDS[kind](4, 3, **options)

    def start(self, z: Tensor) -> tuple[Tensor, ...] | None:
        """First states that depend on the images: [layers * ways, N, H]."""
        if self.way != "started":
            return None
        ends = self.layer.num_layers * (1 + self.layer.bidirectional)
        hidden = z[:, :ends, : self.layer.proj_size or 3].transpose(0, 1).contiguous()
        cell = z[:, :ends, 1:].transpose(0, 1).contiguous()
        return (hidden, cell) if self.kind == "LSTM" else (hidden,)

    def called(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        lengths = torch.tensor(LENGTHS[: len(z)])
        start = self.start(z)
        if self.way == "packed":
            outputs, last = self.layer(pack_padded_sequence(z, lengths, batch_first=True))
            outputs = pad_packed_sequence(outputs, batch_first=True, total_length=4)[0]
        elif self.way == "packed, unsorted":
            outputs, last = self.layer(pack_padded_sequence(z, lengths.flip(0), batch_first=True, enforce_sorted=False))
            outputs = pad_packed_sequence(outputs, batch_first=True, total_length=4)[0]
        elif self.way == "packed, a list":
            outputs, last = self.layer(pack_sequence([row[:n] for row, n in zip(z, LENGTHS, strict=False)]))
            outputs = pad_packed_sequence(outputs, batch_first=True, total_length=4)[0]
        else:
            into = z if self.layer.batch_first else z.transpose(0, 1)
            begun = start if start is None or self.kind == "LSTM" else start[0]
            outputs, last = self.layer(into, begun)
            outputs = outputs if self.layer.batch_first else outputs.transpose(0, 1)
        return outputs, [part.transpose(0, 1) for part in (last if self.kind == "LSTM" else (last,))]

    def by_hand(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        lengths = LENGTHS[: len(z)] if "packed" in self.way else (4,) * len(z)
        lengths = lengths[::-1] if "unsorted" in self.way else lengths
        start, rows = self.start(z), []
        for n, length in enumerate(lengths):
            begun = None if start is None else tuple(part[:, n] for part in start)
            outputs, last = by_hand(self.kind, self.layer, z[n, :length], begun)
            rows.append((F.pad(outputs, (0, 0, 0, 4 - length)), last))
        outputs = torch.stack([row for row, _ in rows])
        return outputs, [torch.stack(parts) for parts in zip(*(last for _, last in rows), strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        outputs, last = (self.by_hand if self.hand else self.called)(self.before(x))
        flat = torch.cat([outputs.flatten(1), *(part.flatten(1) for part in last)], 1)
        return F.linear(flat, torch.linspace(-1, 2, 2 * flat.shape[1], dtype=x.dtype).view(2, -1))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "deep, both ways": {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "dropout": 0.5},
    "projected": {"proj_size": 2},
    "projected, deep, both ways": {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
}
WAYS = ("whole", "started", "packed", "packed, unsorted", "packed, a list")
METHODS = ["deeplift", "lrp_epsilon", "epsilon_plus", "epsilon_alpha2_beta1", "excitation_backprop", "attn_lrp"]
CASES = [
    (kind, options, way)
    for kind, options, way in itertools.product(KINDS, OPTIONS, WAYS)
    if kind == "LSTM" or "projected" not in options
]


def nets(kind: str, options: str, way: str) -> tuple[nn.Module, nn.Module]:
    return tuple(seeded(lambda hand=hand: Net(kind, hand, way, **OPTIONS[options])) for hand in (False, True))


@pytest.mark.parametrize(("kind", "options", "way"), CASES)
def test_maps_are_those_of_loops_written_by_hand(kind, options, way):
    model, hand = nets(kind, options, way)
    torch.testing.assert_close(model(X), hand(X))
    entries = [*METHODS, ("deeplift", {"baseline": images(3, 4, 6, seed=7)}), "guided_backprop"]
    # A loop over rows needs a reference for each: the number that stands for one is spelled out.
    by_row = [("deeplift", {"baseline": torch.zeros_like(X)}), *entries[1:]]
    got, expected = (attrbox.compare(*each, target=1) for each in ((model, X, entries), (hand, X, by_row)))
    for one, other in zip(got.values(), expected.values(), strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=1e-9, atol=1e-11, msg=one.method)
        assert not one.coverage.unknown
        if one.method == "deeplift":
            assert (one.gap.abs() / one.values.abs().flatten(1).sum(1)).max() < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_those_written_by_hand(kind, bias):
    class Cell(nn.Module):
        def __init__(self, hand: bool) -> None:
            super().__init__()
            self.cell, self.hand, self.before = CELLS[kind](4, 3, bias=bias), hand, nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.before(x)
            weights = {"ih": self.cell.weight_ih, "hh": self.cell.weight_hh}
            weights |= {"bias_ih": self.cell.bias_ih, "bias_hh": self.cell.bias_hh} if bias else {}
            state = (z[:, 0, :3], z[:, 0, 1:]) if kind == "LSTM" else (z[:, 0, :3],)
            for place in range(1, 4):
                if self.hand:
                    state = step(kind, z[:, place], state, weights)
                else:
                    after = self.cell(z[:, place], state if kind == "LSTM" else state[0])
                    state = after if kind == "LSTM" else (after,)
            return torch.cat(state, 1)

    model, hand = (seeded(lambda written=written: Cell(written)) for written in (False, True))
    torch.testing.assert_close(model(X), hand(X))
    got, expected = (attrbox.compare(one, X, METHODS, target=1) for one in (model, hand))
    for label in got:
        torch.testing.assert_close(got[label].values, expected[label].values, rtol=1e-9, atol=1e-11, msg=label)
        assert not got[label].coverage.unknown
    assert (got["deeplift"].gap.abs() / got["deeplift"].values.abs().flatten(1).sum(1)).max() < 1e-12


@pytest.mark.parametrize("way", ["whole", "started", "packed", "packed, a list"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_does_not_depend_on_shorter_batch_mates(kind, way):
    model, _ = nets(kind, "deep, both ways", way)
    for method in ("deeplift", "lrp_epsilon"):
        whole = attrbox.explain(model, X, method, target=1).values
        for count in (1, 2):
            few = attrbox.explain(model, X[:count], method, target=1).values
            torch.testing.assert_close(few, whole[:count])
