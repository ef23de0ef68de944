"""The command line, run in this process."""

from typer.testing import CliRunner, Result

from attrbox.pipeline.cli import app

TINY = f"{__name__}:tiny"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
