"""Linear maps of a recorded pass: outputs bit-equal, gradients and double gradients those of autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrbox.engine.linear_maps import LinearCalls
from attrbox.engine.site import Rule
from attrbox.engine.tape import record


def frozen(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.weight is not None:
                nn.init.normal_(norm.weight)
    return module.double().eval().requires_grad_(False)


NETS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 6)),
    "strided, dilated, grouped": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2, bias=False), (2, 4, 8, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, stride=2, padding=1), (2, 2, 5, 6, 7)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 7, 6)),
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4, bias=False), (3, 7, 5)),
    "batch-norm": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 5)),
    "batch-norm of vectors": (lambda: nn.BatchNorm1d(3, affine=False), (4, 3)),
    "conv and batch-norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
    "grouped conv1d and batch-norm": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6)),
        (2, 4, 8),
    ),
    "linear and batch-norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (3, 5)),
}


class Square(Rule):
    """Some rule, so that the pass is recorded."""

    def propagate(self, site, grad_output):
        return grad_output**2 * site.derivative()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_autograd(name, memory_format):
    build, shape = NETS[name]
    if len(shape) != 4 and memory_format is torch.channels_last:
        pytest.skip("channels_last is for four axes")
    net = frozen(build())
    images = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format)
    tape = record(net, images, [Square()], twice=True)
    leaf = images.clone().requires_grad_()
    output = net(leaf)
    assert torch.equal(tape.output, output)
    weights = torch.randn_like(output).requires_grad_()
    twin = weights.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(output, leaf, weights, create_graph=True)
    (got,) = torch.autograd.grad(tape.output, tape.images, twin, create_graph=True)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    again = torch.randn_like(wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got, twin, again)[0], torch.autograd.grad(wanted, weights, again)[0], rtol=1e-12, atol=1e-12
    )
    assert not tape.unknown


def test_third_gradients_of_a_rule_by_finite_differences():
    net = frozen(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))
    )
    tape = record(net, torch.randn(1, 2, 4, 4, dtype=torch.float64), [Square()], twice=True)
    seed = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def chain(seed: Tensor) -> Tensor:
        return tape.replay((tape.output * seed).sum(1), [tape.images], Square(), create_graph=True)[0]

    assert torch.autograd.gradcheck(chain, seed)
    assert torch.autograd.gradgradcheck(chain, seed)


def test_a_convolution_used_past_its_batch_norm_keeps_both_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            features = self.conv(x)
            return self.norm(features) * 2 + features

    net = frozen(Net())
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    tape = record(net, images, [Square()], twice=True)
    leaf = images.clone().requires_grad_()
    seed = torch.randn_like(tape.output)
    wanted = torch.autograd.grad(net(leaf), leaf, seed)[0]
    torch.testing.assert_close(torch.autograd.grad(tape.output, tape.images, seed)[0], wanted)


def test_what_is_no_fixed_linear_map_is_left_to_autograd():
    calls = LinearCalls()
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3)
    assert calls.run(torch.conv2d, (x, weight), {}) is not None
    assert calls.run(torch.conv2d, (x.detach(), weight), {}) is None
    assert calls.run(torch.conv2d, (x, weight.requires_grad_()), {}) is None
    assert calls.run(torch.conv2d, (x[0], weight.detach()), {}) is None
    assert calls.run(F.batch_norm, (x, None, None), {"training": True}) is None
    assert calls.run(torch.relu, (x,), {}) is None
