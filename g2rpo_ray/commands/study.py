"""Runs a study: `python -m g2rpo_ray.study STUDY.yaml`. The same command resumes an interrupted one."""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor

from tqdm import tqdm

from g2rpo_ray.analysis.tables import to_csv
from g2rpo_ray.exits import FAILED, INTERRUPTED, Parser, command, path_option, sigterm_as_interrupt
from g2rpo_ray.messages import one_line
from g2rpo_ray.paths import local_path
from g2rpo_ray.preflight import require_lasting
from g2rpo_ray.rehearsal.devices import fleet
from g2rpo_ray.runs.lease import Lease
from g2rpo_ray.runs.storage import Folder, replace_text
from g2rpo_ray.runs.tracking import to_json
from g2rpo_ray.study.check import describe_study
from g2rpo_ray.study.figures import curves, pictures
from g2rpo_ray.study.plan import Case, Plan
from g2rpo_ray.study.record import Record
from g2rpo_ray.study.rows import Results, VariantRow
from g2rpo_ray.study.runner import workers
from g2rpo_ray.study.schema import read_study
from g2rpo_ray.study.tables import to_json_table, to_markdown


def waves(plan: Plan, results: Results) -> Iterator[list[Case]]:
    """Groups of independent cases, table by table: the base and the grids, then all variants, seed by seed."""
    for table, has in plan.study.tables.items():
        yield [plan.base(table), *(case for variant in has.variants for case in plan.tuning(table, variant))]
        rates = {variant: results.rate(table, variant) for variant in has.variants}
        runs = [plan.runs(table, variant, rate[0]) for variant, rate in rates.items() if rate]
        yield [case for of_seed in zip(*runs, strict=True) for case in of_seed]


def run(plan: Plan, record: Record, lease: Lease, jobs: int, address: str | None) -> None:
    """Does all runs that the record lacks, and writes the tables after each wave."""
    with workers(plan.study.runner, jobs, record.folder, address) as pool:
        for wave in waves(plan, Results(plan, record.lines)):
            missing = {case.key: case for case in wave if case.key not in record.lines}
            with tqdm(total=len(missing), unit="run", desc=plan.study.name, disable=None if missing else True) as bar:
                for case, lines in pool.each(list(missing.values())):
                    lease.check()
                    for line in lines:
                        if line["key"] not in record.lines:
                            record.add(line)
                    bar.update()
                    bar.write(f"done: {case.words}" + "".join(f": {one['failed']}" for one in lines if "failed" in one))
            if missing:
                write(plan, record)


def write(plan: Plan, record: Record) -> str:
    """Writes tables, curves and images from the record; returns the Markdown."""
    results = Results(plan, record.lines)
    rows = list(results.rows())
    markdown = to_markdown(results, rows)
    record.folder.mkdir(parents=True, exist_ok=True)
    replace_text(record.folder / "table.md", markdown)
    replace_text(record.folder / "table.csv", to_csv(rows, VariantRow))
    replace_text(record.folder / "table.json", to_json(to_json_table(results, rows), indent=1) + "\n")
    curves(results, record.folder)
    pictures(plan, results, record.folder)
    return markdown


def make_parser() -> argparse.ArgumentParser:
    """The parser of `g2rpo study`."""
    parser = Parser(
        prog="python -m g2rpo_ray.study",
        description="Compare methods at equal cost: variants × seeds, tables with intervals, curves.",
        epilog="example: python -m g2rpo_ray.study configs/studies/paper.yaml --jobs 2",
    )
    parser.add_argument("study", metavar="STUDY", help="a study's YAML file, or the name of a packaged one")
    parser.add_argument(
        "--output", metavar="DIR", type=path_option, help="record, tables, figures; default: studies/<name>"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting of all runs")
    parser.add_argument("--jobs", type=int, help="concurrent runs; default: the number of cores, with Ray 1")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster, for `runner: ray`; default: RAY_ADDRESS")
    parser.add_argument("--table", action="store_true", help="write tables and figures from the record, run nothing")
    parser.add_argument("--check", action="store_true", help="check all variants, and print their cost")
    parser.add_argument(
        "--devices", metavar="KIND:NUMBER[@PRICE]", type=fleet,
        help="with --check: print hours on these devices, such as h100:16@2.50",
    )  # fmt: skip
    return parser


@command(make_parser)
def main(options: argparse.Namespace) -> int:
    """Do the study; returns the exit status: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    try:
        study, file = read_study(options.study)
        plan = Plan(study, file, options.set)
        folder = options.output or local_path(f"studies/{study.name}")
        require_lasting("--output", str(folder))
        cores = 1 if study.runner == "ray" else len(os.sched_getaffinity(0))
        jobs = cores if options.jobs is None else options.jobs
        if not 1 <= jobs <= 1000:
            raise ValueError(f"--jobs: {jobs} given; must be from 1 to 1000")
        if options.devices and not options.check:
            raise ValueError("--devices: given without --check; add it")
        if options.check:
            print(describe_study(plan, Record(folder).lines, options.devices))
            return 0
        if not options.table:
            with sigterm_as_interrupt(), Lease(Folder(folder)) as lease:
                run(plan, Record(folder), lease, jobs, options.address)
        print(write(plan, Record(folder)))
    except KeyboardInterrupt:
        print("stopped; finished runs are in the record, and the same command resumes")
        return INTERRUPTED
    except (RuntimeError, OSError, BrokenExecutor) as error:
        print(f"error: {one_line(error, 500)}; the same command resumes from the record", file=sys.stderr)
        return FAILED
    print(f"written to {folder}: table.md, table.csv, table.json, curves and pictures")
    return 0
