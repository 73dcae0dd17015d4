"""`rediffuse sweep`."""

import click

from rediffuse.cli import complete, options


@click.command()
@options.run
@options.places
@options.run_id
@click.option(
    "--solver",
    "solvers",
    help="unipc,dpmpp_2m,ancestral@1000: @ is its own --steps.",
    shell_complete=complete.parts("solver", lists=True),
)
@click.option("--steps", help="10,20,50.")
@click.option("--guidance", help="1,2,3.")
@click.option("--weights", help="average,raw.")
@click.option("--n", "count", type=click.IntRange(2), help="Images of each; else 1,000.")
@options.judged
@options.drawn
@options.json_output
@options.root
@options.trust
def sweep(
    run_id: str | None,
    places: tuple[str, ...],
    option: str | None,
    solvers: str | None,
    steps: str | None,
    guidance: str | None,
    weights: str | None,
    **how: object,
) -> int:
    """Judge every combination of solvers, steps, guidance and weights, with the same noise.

    Ends in a table, a Pareto front (quality against evaluations of the network, and against
    seconds) and a picture, kept in the run's evaluation/. Killed and started again, it draws only
    what is missing.

    \b
    Examples:
      rediffuse sweep 3f2a91 --solver unipc,dpmpp_2m,ddim --steps 5,10,20
      rediffuse sweep 3f2a91 --guidance 1,1.5,2,3 --n 5000
      rediffuse sweep 3f2a91 --solver unipc,ancestral@1000 --weights average,raw
    """
    from rediffuse import sweep as door
    from rediffuse.evaluate import Asked
    from rediffuse.gallery import Options

    lists = [_words(given) for given in (solvers, steps, guidance, weights)]
    if any(not word.isdecimal() or int(word) < 1 for word in lists[1]):
        raise click.UsageError(f"--steps {steps}: expected numbers, as 10,20,50")
    if not {*lists[3]} <= {"average", "raw"}:
        raise click.UsageError(f"--weights {weights}: expected average, raw or both")
    axes = door.Axes(lists[0], tuple(map(int, lists[1])), lists[2], lists[3])
    asked = Asked(**{name: how.pop(name) for name in options.JUDGED})  # type: ignore[arg-type]
    sampling = Options(**how)  # type: ignore[arg-type]
    word = options.run_at(run_id, option, places, sampling.root, sampling.trust)
    return door.sweep(word, sampling, axes, asked)


def _words(given: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (given or "").split(",") if word.strip())
