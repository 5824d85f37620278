"""`rs-tools`: the same answers as over MCP, for scripts and people at a terminal."""

from __future__ import annotations

import io
import sys

import typer

from rs_tools.commands import places, service, words
from rs_tools.commands.asking import EXITS

app = typer.Typer(
    help="Look at satellite and aerial images: inspect, list, caption, vqa, classify, ground, segment, detect-change."
    "\n\n"
    "An IMAGE may be a folder or a pattern too: then each of its images is asked about, and with --json each answer is "
    "a line. The first question starts a model server for this user, which stays ready for a while; where something "
    "does not work, ask the doctor.",
    epilog=EXITS,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for group in (words.app, places.app, service.app):
    app.add_typer(group)


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name in another encoding must not end the work
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
