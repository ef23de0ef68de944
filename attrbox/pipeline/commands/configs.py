"""`attrbox configs`: the keys of config files, and what one of them says."""

from pathlib import Path
from typing import Annotated

import typer

from attrbox.pipeline.commands.options import AsJson, say, say_json

SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="A change, as in run.seed=3; repeated.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code of a model factory that the file names.")]


def configs(
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A TOML file to check.")] = None,
    sets: SetOption = [],  # noqa: B006 - typer copies it
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """The keys of config files with their defaults; with a file, what it says once all is filled in.

    Nothing is run. Exit status 2 if the file is wrong; the message says where.

    Examples: `attrbox configs`, `attrbox configs configs/imagenet.toml --set run.device=cuda`
    """
    from attrbox.pipeline.config import described, load

    if file is not None or sets:
        config = load(file, sets, trust=trust)
        if as_json:
            say_json(config.model_dump())
        else:
            say(config.to_toml())
        return
    rows = described()
    if as_json:
        say_json([dict(zip(("table", "key", "default", "help"), row, strict=True)) for row in rows])
        return
    table = ""
    for name, key, default, help in rows:
        if name != table:
            say(f"\n[{name}]")
            table = name
        say(f"{key} = {'(not set)' if default is None else repr(default)}    # {help}")
