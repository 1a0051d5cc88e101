"""The common entry of all commands: an error becomes one line and an exit status, without a traceback.

It imports no slow modules, because Ctrl-C must be handled while a command's modules are imported.
"""

import argparse
import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from g2rpo_ray.messages import one_line
from g2rpo_ray.paths import local_path

FAILED, INVALID, INTERRUPTED = 1, 2, 130
STOPPED = "stopped: nothing was started"

Main = Callable[[Sequence[str] | None], int]
SignalHandler = Callable[[int, FrameType | None], Any]


class RunFailed(RuntimeError):
    """A run or an evaluation failed; the message is one line, with the file that has the traceback."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run or an evaluation; its finished work is saved."""


class Parser(argparse.ArgumentParser):
    """A command's options; invalid ones raise ValueError, which `command` prints."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def path_option(text: str) -> Path:
    """The argparse type of an option that is a path on this machine."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command(
    make_parser: Callable[[], argparse.ArgumentParser], stopped: str = "stopped"
) -> Callable[[Callable[[argparse.Namespace], int]], Main]:
    """Decorate a function from options to an exit status as the `main` of a command.

    Exit status: 2 for an invalid option, a ValueError or an OSError; 1 for RunFailed; 130 for Ctrl-C. Each prints one
    line, Ctrl-C the text `stopped`. RunInterrupted prints nothing, because the run has printed its own line.
    """

    def decorate(work: Callable[[argparse.Namespace], int]) -> Main:
        @functools.wraps(work)
        def main(arguments: Sequence[str] | None = None) -> int:
            try:
                options = make_parser().parse_args(arguments)
                _refuse_empty(options)
                return work(options)
            except (ValueError, OSError) as error:
                _last_line(f"error: {one_line(error, 1000)}")
                return INVALID
            except RunFailed as error:
                _last_line(f"error: {error}")
                return FAILED
            except RunInterrupted:
                return INTERRUPTED
            except KeyboardInterrupt:
                _last_line(stopped)
                return INTERRUPTED

        return main

    return decorate


def _last_line(line: str) -> None:
    """Print a line to stderr, after the buffered lines of stdout."""
    sys.stdout.flush()
    print(line, file=sys.stderr)


def _refuse_empty(options: argparse.Namespace) -> None:
    """Raise ValueError for an option with an empty value, as an unset shell variable gives it."""
    for name, value in vars(options).items():
        if "" in (value if isinstance(value, list) else [value]):
            raise ValueError(f"{name}: '' given; give a value, or omit the option")


def start(module: str) -> NoReturn:
    """Run a command's `main`, and exit. A module calls it before its imports, which take seconds."""
    sys.exit(load(module)(None))


def load(module: str) -> Main:
    """Import a command's module, and return its `main`."""
    with loading():
        main: Main = importlib.import_module(module).main
    return main


@contextmanager
def loading() -> Iterator[None]:
    """Ctrl-C ends the process with one line. A KeyboardInterrupt could be caught by a module that is being imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def children_ignore_interrupts() -> Iterator[None]:
    """Processes started in this context ignore SIGINT, which a terminal sends to all; their parent ends them."""
    ensure_running()  # start multiprocessing's resource tracker first: its start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(*_: object) -> NoReturn:
    print(STOPPED, file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


@contextmanager
def sigterm_as_interrupt(handler: SignalHandler = signal.default_int_handler) -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, and SIGINT also where it is ignored: a shell does so for a process started with &.

    Only the main thread can handle signals; in another thread this context has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, other in zip(numbers, before, strict=True):
            signal.signal(number, other)
