"""`rediffuse completion`."""

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, run ids, parts and keys.

    bash and zsh read it with eval "$(rediffuse completion bash)", in ~/.bashrc or ~/.zshrc.

    \b
    Examples:
      rediffuse completion bash > ~/.rediffuse.bash
      rediffuse completion zsh > ~/.zfunc/_rediffuse
      rediffuse completion fish > ~/.config/fish/completions/rediffuse.fish
    """
    kind = get_completion_class(shell)
    assert kind
    script = kind(ctx.find_root().command, {}, "rediffuse", "_REDIFFUSE_COMPLETE").source()
    for place, line in _NO_SPACE.items():
        script = script.replace(place, line)
    click.echo(script)


_NO_SPACE = {
    "    return 0\n": (
        "    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n"
        "    return 0\n"
    ),
    "        compadd -U -V unsorted -a completions\n": (
        "        local -a suffix\n"
        "        [[ ${#completions[@]} == 1 && ${completions[1]} == *= ]] && suffix=(-S '')\n"
        '        compadd -U -V unsorted "${suffix[@]}" -a completions\n'
    ),
}
"""Lines of click's bash and zsh: after a key and its =, the value follows at once, as in fish."""
