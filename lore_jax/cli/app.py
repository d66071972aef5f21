"""The commands of `lore`, with their examples."""

from typing import Annotated

import typer

import lore_jax as lore
from lore_jax.cli import commands, text_commands
from lore_jax.cli.options import option
from lore_jax.cli.output import start_log

_FEATURES = "--features x.npy"
_EXAMPLES = {  # Lines of at most 78 characters stay whole in a narrow terminal.
    "quickstart": "lore quickstart --splits 1",
    "fit": f"lore fit pairs.csv {_FEATURES} --rank 5 --out model.safetensors",
    "adapt": f"lore adapt model.safetensors new.csv {_FEATURES} --out users.csv",
    "score": f"lore score model.safetensors new.jsonl {_FEATURES} --user ann",
    "evaluate": f"lore evaluate model.safetensors heldout.csv {_FEATURES}",
    "embed": "lore embed pairs.jsonl --model my-reward-model --chat --out embedded",
    "export": "lore export model.safetensors --base my-reward-model --out exported",
}
_COMMANDS = {
    "quickstart": commands.quickstart_command,
    "fit": commands.fit,
    "adapt": commands.adapt,
    "score": commands.score,
    "evaluate": commands.evaluate,
    "embed": text_commands.embed,
    "export": text_commands.export,
}


def root(
    context: typer.Context,
    verbose: Annotated[
        bool, option("--verbose", help="More log, and tracebacks of errors.")
    ] = False,
    version: Annotated[bool, option("--version", help="Print the version.")] = False,
) -> None:
    """Low-rank reward models: one shared basis, a small mixture for every user.

    fit learns from pairwise choices, adapt adds users, score and evaluate use them.
    """
    start_log(verbose)
    if version:
        typer.echo(f"lore_jax {lore.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    callback=root,
    invoke_without_command=True,
    epilog=f"Example:\n\n{_EXAMPLES['fit']}",
)
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=f"Example:\n\n{_EXAMPLES[_name]}")(_command)
