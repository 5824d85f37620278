"""`python -m model_server.evaluation DATA_DIR --sets ucm --tasks caption,classify,vqa --out results.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from model_server.evaluation import scale
from model_server.evaluation.answering import evaluate_answers
from model_server.evaluation.asking import Model
from model_server.evaluation.captioning import evaluate_captions
from model_server.evaluation.changing import evaluate_change
from model_server.evaluation.classification import evaluate_classes
from model_server.evaluation.counting import evaluate_counts
from model_server.evaluation.dataset import EvaluatedSet, read_set
from model_server.evaluation.grounding import evaluate_grounding
from model_server.evaluation.options import named
from model_server.evaluation.referring import evaluate_referring
from model_server.evaluation.report import markdown, print_tables
from model_server.evaluation.results import Results
from model_server.evaluation.retrieval import evaluate_retrieval
from model_server.evaluation.sections import appendix
from model_server.evaluation.segmenting import evaluate_segmentation
from model_server.perceiver import DEFAULT_WEIGHTS, Perceiver, WeightsError
from model_server.protocol import TaskNotServed
from model_server.training.records import DataError, set_names

TASKS: dict[str, Callable[[Model, EvaluatedSet, Results], None]] = {
    "caption": evaluate_captions,
    "classify": evaluate_classes,
    "vqa": evaluate_answers,
    "ground": evaluate_grounding,
    "segment": evaluate_segmentation,
    "detect_change": evaluate_change,
    "refer": evaluate_referring,
    "count": evaluate_counts,
    "retrieve": evaluate_retrieval,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the model on a data directory, write and print what was measured; 2 when there is no model or no set."""
    options = parser().parse_args(arguments)
    try:
        model = Perceiver.load(options.weights)
        results = evaluate(model, options)
    except (DataError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.write(options.out)
    if options.report is not None:
        folder = options.report.parent
        if options.scale:
            scale.run(model, options.data_dir, options.sets, options.split, options.limit, folder)
        today = datetime.now(UTC).date().isoformat()
        page = markdown(results, model.info, _command(options), today, appendix(folder))
        folder.mkdir(parents=True, exist_ok=True)
        options.report.write_text(page)
    # A file or pipe has no width of its own; the tables need this much.
    print_tables(results, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def evaluate(model: Model, options: argparse.Namespace) -> Results:
    """Run every task on every set. A set that is not there is noted; raises DataError when none of them is."""
    results = Results()
    there = set_names(options.data_dir)
    if not any(name in there for name in options.sets):
        raise DataError(
            f"{options.data_dir} holds none of {', '.join(options.sets)}; it has: {', '.join(there) or 'none'}"
        )
    train_dir = options.train_data or options.data_dir
    for name in options.sets:
        if name not in there:
            results.notes.append(f"{name}: the data directory has no such set")
            continue
        data = read_set(options.data_dir, train_dir, name, options.split, options.limit, options.out.parent)
        if not data.records:
            results.notes.append(f"{name}: no record of split {options.split!r}")
            continue
        results.sets.append(data.info)
        for task in options.tasks:
            try:
                TASKS[task](model, data, results)
            except TaskNotServed as error:
                results.notes.append(f"{name}: no {task} figures, {error}")
        results.write(options.out)  # a long run that is cut short leaves what it has measured
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m model_server.evaluation", description="Measure the model on labelled data."
    )
    arguments.add_argument("data_dir", type=Path, help="folder of sets, each with a records.jsonl")
    arguments.add_argument("--sets", type=named, required=True, help="comma-separated, e.g. ucm,rsicd_aid")
    arguments.add_argument("--split", default="val")
    arguments.add_argument("--tasks", type=_tasks, default=list(TASKS), help=f"of {','.join(TASKS)}; default all")
    arguments.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    arguments.add_argument("--weights", type=Path, default=DEFAULT_WEIGHTS, help="checkpoint; default the embedded one")
    arguments.add_argument("--limit", type=_positive, help="this many images of each set, evenly spread")
    arguments.add_argument("--report", type=Path, help="Markdown page to write, e.g. docs/RESULTS.md")
    arguments.add_argument(
        "--scale", action="store_true", help="also the experiment on scale, figures and plot beside the report"
    )
    arguments.add_argument(
        "--train-data", type=Path, help="where the training records for the controls are; default DATA_DIR"
    )
    return arguments


def _tasks(text: str) -> list[str]:
    names = named(text)
    if not names or not set(names) <= TASKS.keys():
        raise argparse.ArgumentTypeError(f"{text!r}: the tasks are {', '.join(TASKS)}")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of images")
    return int(text)


def _command(options: argparse.Namespace) -> str:
    """The command that measures the same again; folders that differ between machines stand as names."""
    parts = [
        "python -m model_server.evaluation DATA_DIR",
        f"--sets {','.join(options.sets)}",
        f"--split {options.split}",
    ]
    parts += [f"--tasks {','.join(options.tasks)}", f"--out {options.out.name}"]
    if options.weights != DEFAULT_WEIGHTS:
        parts.append("--weights WEIGHTS_DIR")
    if options.limit is not None:
        parts.append(f"--limit {options.limit}")
    if options.train_data is not None:
        parts.append("--train-data TRAIN_DATA_DIR")
    parts.append("--report docs/RESULTS.md")
    if options.scale:
        parts.append("--scale")
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
