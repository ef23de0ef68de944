"""The command line, run in this process."""

import torch
from torch import nn
from typer.testing import CliRunner, Result

from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.pipeline.cli import app

TINY = f"{__name__}:tiny"


def tiny() -> LoadedModel:
    """Three classes of coloured pictures; the scores depend on the mean red, green and blue."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        for channel in range(3):
            model[0].weight[channel, channel, 1, 1] = 1
        model[4].weight.copy_(4 * torch.eye(3, 6))
        model[4].bias.zero_()
    mean, std = (0.0,) * 3, (1.0,) * 3
    return LoadedModel(model.eval(), "tiny", Preprocess(16, 16, mean, std), mean, std, ("red", "green", "blue"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
