"""``python -m genzoo [train|sample|evaluate] key=value ...``

Exit codes: 0 done, 2 bad input, 3 not finite, 130 interrupted, 1 a bug of ours.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED = 2, 130


def main() -> None:
    """Run one command of the command line."""
    from hydra._internal.utils import get_args_parser

    from genzoo.commands.config import VERBS, UsageError, nearest, preflight

    words = sys.argv[1:]
    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(words)
    if flags.config_name or flags.config_path:
        fail(f"--config-name and --config-path are set by the command: choose from {', '.join(VERBS)}")
    options, overrides = [word for word in words if word not in flags.overrides], flags.overrides
    verb = "train"
    if overrides and overrides[0].isidentifier():
        verb, *overrides = overrides
        if verb not in VERBS:
            fail(f"unknown command '{verb}': {nearest(verb, VERBS)}")

    job = None
    of_hydra = bool(flags.hydra_help or flags.shell_completion)
    shows = bool(flags.help or flags.cfg or flags.info)
    try:
        if not of_hydra and (overrides or not shows):
            job = preflight(verb, overrides, flags.config_dir, values=not shows, sweep=flags.multirun)
        if of_hydra or shows or flags.multirun:
            by_hydra(verb, options, overrides, sweep=flags.multirun)
        elif job and (problem := attempt(run, verb, *job)):
            fail(*problem)
    except UsageError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # genzoo --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def by_hydra(verb: str, options: list[str], overrides: list[str], *, sweep: bool) -> None:
    """Let Hydra show help or a configuration, or run every job of a sweep in a process of its own."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from genzoo.commands.config import CONF, UsageError, validate
    from genzoo.commands.sweep import Outcome, finished, run_job

    typed = sys.argv
    failed: list[tuple[str, Outcome]] = []

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        words = list(hydra_config.overrides.task)
        try:
            plain = validate(verb, config)
        except UsageError as error:
            failed.append((" ".join(words), Outcome(error.exit_code, str(error))))
            return
        done = finished(plain, dict(hydra_config.runtime.choices)) if verb == "train" else None
        if done:
            print(f"done before: {done}", flush=True)
            return
        outcome = run_job([verb, *child_options, *words], plain.get("timeout"))
        if outcome.code:  # and the sweep goes on
            failed.append((" ".join(words), outcome))

    child_options = [word for word in options if word not in ("-m", "--multirun")]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a bug of ours shows its real traceback
    with tempfile.TemporaryDirectory() as scratch:
        # Hydra writes down its sweeps, of which the runs themselves say enough.
        overrides = [f"hydra.sweep.dir={scratch}", *overrides] if sweep else overrides
        sys.argv = [typed[0], *options, *overrides]
        try:
            hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(job)()
        finally:
            sys.argv = typed
    for words, outcome in failed:
        complain(f"job {words}: {outcome.cause}")
    if failed:
        sys.exit(max(max(outcome.code, 1) for _, outcome in failed))


def run(verb: str, config: dict, choices: dict[str, str]) -> None:
    """Do the work of a command; heavy imports happen here."""
    if verb == "train":
        from genzoo.commands.train import train

        train(config, choices)
    elif verb == "sample":
        from genzoo.commands.sample import sample

        sample(config)
    else:
        from genzoo.commands.evaluate import evaluate

        evaluate(config)


def attempt(work: Callable[..., None], *arguments: Any) -> tuple[str, int] | None:
    """Do some work; return what to tell the user where it failed, and the exit code. A bug of ours is raised."""
    try:
        work(*arguments)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        return str(error), code
    return None


def complain(message: str) -> None:
    """Say in one line on stderr what is wrong."""
    print(f"genzoo: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Say in one line what is wrong, and stop."""
    complain(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
