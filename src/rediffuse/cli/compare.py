"""`rediffuse compare`."""

from pathlib import Path

import click

from rediffuse.cli import complete, options


@click.command()
@click.argument("first", metavar="A", shell_complete=complete.run_ids)
@click.argument("second", metavar="B", shell_complete=complete.run_ids)
@click.option(
    "--n", "count", type=click.IntRange(1, 1000), default=16, show_default=True, help="Pairs."
)
@click.option(
    "--solver",
    shell_complete=complete.parts("solver"),
    help="For both, as in `rediffuse sample`; else each one's own.",
)
@click.option("--steps", type=click.IntRange(1), help="For both; else each one's own.")
@click.option(
    "--guidance", shell_complete=complete.parts("guidance"), help="For both; else each one's own."
)
@click.option("--no-images", "--no_images", is_flag=True, help="Draw nothing.")
@click.option(
    "--output-dir",
    "--output_dir",
    type=options.OUTPUT,
    help="Else in comparisons/, beside A.",
)
@click.option("--html", type=options.FILE, metavar="FILE.html", help="Also write a page of it.")
@options.json_output
@options.root
@options.trust
def compare(
    first: str,
    second: str,
    no_images: bool,
    html: Path | None,
    as_json: bool,
    root: Path | None,
    **how: object,
) -> int:
    """Compare two runs: configuration, environment, metrics, and images of the same noise.

    A and B are ids, the first 6 digits of them, or paths.

    \b
    Examples:
      rediffuse compare 3f2a91 77c0de
      rediffuse compare 3f2a91 77c0de --n 40 --solver heun --html page.html
    """
    from rediffuse import compare as two
    from rediffuse.gallery import Options

    asked = Options(root=root, **how)  # type: ignore[arg-type]
    return two.compare(first, second, asked, images=not no_images, as_json=as_json, html=html)
