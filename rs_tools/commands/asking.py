"""One question to one image, or to many in turn: a refused image does not stop the rest, a lost model server does."""

from __future__ import annotations

import asyncio
import glob
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rs_tools.commands.options import FilesView, View
from rs_tools.errors import ArtifactError, PerceptionError, ServerBusy, ServerUnavailable

if TYPE_CHECKING:  # what is heavy comes with the first question
    from rs_tools import looking
    from rs_tools.results import Result
    from rs_tools.tools import Tools

EXIT_REFUSED = 1  # the image, the region or the question cannot be answered; typer exits with 2 on wrong usage
EXIT_SOME_REFUSED = 3
EXIT_NO_SERVER = 4
EXITS = (
    "Exit status: 0 all answered, 1 refused (the reason is on stderr), 2 wrong usage, 3 some images answered and "
    "others refused, 4 no model server answers, 130 interrupted."
)
_WORDS_ON_MANY = "image", "before", "after"


@dataclass(frozen=True)
class Subject:
    """What one question is about: one image, or an earlier and a later one."""

    images: tuple[Path, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(image.absolute()) for image in self.images)

    @property
    def shown(self) -> str:
        return " -> ".join(map(str, self.images))

    def labelled(self, **outcome: Any) -> dict[str, Any]:
        """A line of JSON for one of many."""
        words = _WORDS_ON_MANY[:1] if len(self.images) == 1 else _WORDS_ON_MANY[1:]
        return dict(zip(words, map(str, self.images), strict=True)) | outcome


Ask = Callable[["Tools", str, list[float], "looking.Progress"], Awaitable["Result"]]
"""With an image and the region in its pixels."""

AskPair = Callable[["Tools", str, str, list[float], "looking.Progress"], Awaitable["Result"]]
_AskSubject = Callable[["Tools", Subject, "looking.Progress"], Awaitable["Result"]]


@dataclass
class Kept:
    """Where a caller wants the files of answers, and what is added to an image's name.

    `folder`: None leaves them where the tools put them.
    """

    folder: Path | None
    ending: str
    _stems: set[str] = field(default_factory=set)

    def keep(self, subject: Subject, result: Result) -> None:
        """Copy the files, each image's under a name of its own; raises ArtifactError where that fails."""
        if self.folder is None:
            return
        name = "-".join(image.stem for image in subject.images)
        stem, number = f"{name}-{self.ending}", 1
        while stem in self._stems:  # of another folder, or another kind of file
            number += 1
            stem = f"{name}_{number}-{self.ending}"
        self._stems.add(stem)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in result.artifacts:
                target = self.folder / f"{stem}{file.name[file.name.index('.') :]}"
                for suffix in ("", ".aux.xml"):  # class names that a GeoTIFF cannot hold
                    if Path(file.path + suffix).exists():
                        shutil.copyfile(file.path + suffix, f"{target}{suffix}")
                file.path = str(target)
        except OSError as error:
            raise ArtifactError(f"The files cannot be put into {self.folder}: {error.strerror}.") from error


def each(images: Sequence[Path], ask: Ask, view: View, ending: str = "") -> None:
    """Ask about every image that is named, those of a folder and of a pattern included."""
    with refusing():
        found = [file for name in images for file in images_of(name)]
    many = len(images) > 1 or any(name.is_dir() or _is_pattern(name) for name in images)
    subjects = [Subject((file,)) for file in dict.fromkeys(found)]

    async def ask_one(tools: Tools, one: Subject, progress: looking.Progress) -> Result:
        (image,) = one.names
        return await ask(tools, image, await view.region_in(tools, image), progress)

    ask_all(subjects, ask_one, view, ending, many)


def each_pair(before: Path, after: Path, ask: AskPair, view: View, ending: str) -> None:
    """Ask about two images, or about those of two folders that have the same place and name in both."""
    if before.is_dir() != after.is_dir():
        raise typer.BadParameter("give two images, or two folders whose images have the same names")
    pairs = [Subject((before, after))]
    if many := before.is_dir():
        with refusing():
            pairs = [Subject((file, after / file.relative_to(before))) for file in images_of(before)]

    async def ask_pair(tools: Tools, pair: Subject, progress: looking.Progress) -> Result:
        early, late = pair.names
        return await ask(tools, early, late, await view.region_in(tools, early), progress)

    ask_all(pairs, ask_pair, view, ending, many)


def images_of(name: Path) -> list[Path]:
    """The files that a name on the command line stands for.

    Raises:
        AccessError: a folder holds no image, or nothing fits a pattern.
    """
    from rs_tools.errors import AccessError

    if name.is_dir():
        from rs_tools.imagery.access import AccessPolicy

        if files := [name / file.relative_to(name.resolve()) for file in AccessPolicy([name]).images()]:
            return files
        raise AccessError(f"There is no image in the folder {name}.")
    if not _is_pattern(name):
        return [name]
    if files := [Path(one) for one in sorted(glob.glob(str(name), recursive=True)) if Path(one).is_file()]:
        return files
    raise AccessError(f"No file fits the pattern {name}.")


def _is_pattern(name: Path) -> bool:
    return glob.has_magic(str(name)) and not name.exists()


def ask_all(subjects: Sequence[Subject], ask: _AskSubject, view: View, ending: str = "", many: bool = False) -> None:
    """Ask, print what is answered as it comes, and leave with the status that `EXITS` says.

    Whoever names a file at a terminal may read it: the folders of the images are the allowed roots.
    """
    from rs_tools.client import ModelClient
    from rs_tools.imagery.access import AccessPolicy, refuse_address
    from rs_tools.tools import Tools

    with refusing():
        named = [image for subject in subjects for image in subject.images]
        for image in named:
            refuse_address(image)
        policy = AccessPolicy(_roots([*named, Path(view.known)] if view.known else named))

    upstream = view.upstream
    printed, token = _Printed(view.as_json, many), view.token
    kept = Kept(view.out if isinstance(view, FilesView) else None, ending)

    async def run() -> int:
        async with upstream.open() if upstream else ModelClient(view.model_url, token) as client:
            return await _over(subjects, Tools(policy, client), ask, printed, kept)

    if status := asyncio.run(run()):
        raise typer.Exit(status)


@contextmanager
def refusing() -> Iterator[None]:
    """Say why on stderr and leave, where a question cannot be put at all."""
    try:
        yield
    except PerceptionError as error:
        say_error(error)
        raise typer.Exit(EXIT_REFUSED) from error


def say_error(error: Exception | str, about: str = "") -> None:
    text = f"{about}: {error}" if about else str(error)
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)


@dataclass(frozen=True)
class _Printed:
    """How answers and refusals are printed: `many`, each with its image's name."""

    as_json: bool
    many: bool

    def answer(self, subject: Subject, result: Result) -> None:
        from rs_tools.commands.showing import show

        if not self.as_json:
            show(result, subject.shown if self.many else "")
        elif self.many:
            _line(subject, answer=result.model_dump(mode="json"))
        else:
            print(result.model_dump_json(indent=2))

    def refusal(self, subject: Subject, error: PerceptionError) -> None:
        say_error(error, subject.shown if self.many else "")
        if self.as_json and self.many:
            _line(subject, error={"type": type(error).__name__, "message": str(error)})


def _line(subject: Subject, **outcome: Any) -> None:
    print(json.dumps(subject.labelled(**outcome), ensure_ascii=False), flush=True)


async def _over(subjects: Sequence[Subject], tools: Tools, ask: _AskSubject, printed: _Printed, kept: Kept) -> int:
    """The exit status."""
    refused = 0
    for number, subject in enumerate(subjects, 1):
        title = f"{number}/{len(subjects)} {subject.shown}" if printed.many else "looking"
        try:
            with _bar(title, printed.many) as progress:
                result = await ask(tools, subject, progress)
            kept.keep(subject, result)
        except (ServerUnavailable, ServerBusy) as error:
            printed.refusal(subject, error)
            return EXIT_NO_SERVER
        except PerceptionError as error:
            printed.refusal(subject, error)
            refused += 1
        else:
            printed.answer(subject, result)
    return 0 if not refused else EXIT_REFUSED if refused == len(subjects) else EXIT_SOME_REFUSED


def _roots(images: Iterable[Path]) -> list[Path]:
    """The folders of these images, without those inside another one."""
    folders = sorted({one if (one := image.absolute()).is_dir() else one.parent for image in images})
    return [one for one in folders if not any(parent in folders for parent in one.parents)]


@contextmanager
def _bar(title: str, always: bool) -> Iterator[looking.Progress]:
    """A bar on the terminal where there is more than one look or image; nothing where stderr is no terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    # stdout stays what it is: an answer must not end up in the bar's stream.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=None, visible=always)

        def heard(done: int, total: int, message: str) -> None:
            bar.update(task, completed=done, total=total, visible=always or total > 1)

        yield heard
