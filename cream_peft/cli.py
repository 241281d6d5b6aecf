"""cream-peft: the command line. The commands themselves are in commands.py."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from .commands import COMMANDS
from .plugins import load_plugins
from .terminal import UserError, close_progress_bars, quiet_libraries

logger = logging.getLogger("cream_peft")

USAGE = """usage: cream-peft COMMAND [OPTIONS]

commands:
  train     train an adapter from a recipe: cream-peft train --config recipe.yaml [--any_field value]
  evaluate  measure models by length and depth: cream-peft evaluate --compare MODEL [MODEL ...]
  lm-eval   the field's own benchmarks: cream-peft lm-eval --adapter ID_OR_DIR --preset short
  plan      peak memory of a recipe and the GPUs that it fits: cream-peft plan --config recipe.yaml
  plot      draw results: cream-peft plot RESULTS.json [...] --output picture.png
  bench     train a recipe on random weights: peak memory and speed here: cream-peft bench --config recipe.yaml
  push      publish an adapter on the Hub: cream-peft push --adapter DIR --repo user/name
  check     what an adapter is, and what a plain load makes of it: cream-peft check --adapter ID_OR_DIR
  merge     put an adapter into its 16-bit base: cream-peft merge --adapter ID_OR_DIR --output DIR
  chat      talk to an adapter, over a long document: cream-peft chat --adapter ID_OR_DIR --document FILE

Every command takes --help, and --debug for the whole traceback of an error. Without --config, train, plan and bench
take the recipe of the embedded tiny model.
"""
RESUMES = {
    "train": ", --resume_from_checkpoint true resumes from the newest checkpoint, if one was saved",
    "evaluate": ", what was measured stays: the same command resumes",
    "lm-eval": ", the tasks that were measured stay: the same command resumes with the next",
    "push": ": the same command resumes, and does not send again what has arrived",
}


class Stopped(SystemExit):
    """SIGTERM or SIGHUP, which end a command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.exit_code = 128 + number


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def _stopped_by_signals() -> Generator[None]:
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What is ignored stays ignored, as under nohup. Outside the main thread nothing can be set.
    is_main = threading.current_thread() is threading.main_thread()
    earlier = {number: signal.getsignal(number) for number in numbers if is_main}
    earlier = {number: handler for number, handler in earlier.items() if handler is not signal.SIG_IGN}
    for number in earlier:
        signal.signal(number, _stop)
    # To this thread, whose sleeping and waiting it ends too; Windows lacks that.
    send = (
        partial(signal.pthread_kill, threading.get_ident()) if hasattr(signal, "pthread_kill") else signal.raise_signal
    )
    hook = sys.unraisablehook

    def again(ignored: Any) -> None:
        # Python drops what is raised within a finalizer or a weak reference's callback: the signal is sent once more.
        stopped = ignored.exc_value
        if is_main and isinstance(stopped, (KeyboardInterrupt, Stopped)):
            number = stopped.exit_code - 128 if isinstance(stopped, Stopped) else signal.SIGINT
            threading.Timer(0.01, send, [number]).start()
        else:
            hook(ignored)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in earlier.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after an error of one line, 130 after Ctrl-C, 143 after SIGTERM, 129
    after SIGHUP."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    quiet_libraries()
    # On our own logger: with a handler on the root one, the libraries would say everything twice.
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]!r}: use one of {', '.join(COMMANDS)}")
        with _stopped_by_signals():
            load_plugins()
            COMMANDS[arguments[0]](arguments[1:])
    except (KeyboardInterrupt, Stopped) as stopped:
        close_progress_bars()
        print(f"interrupted{RESUMES.get(arguments[0], '')}", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, Stopped) else 130
    except Exception as error:
        close_progress_bars()
        if debug:
            raise
        from .errors import explain

        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
