"""``python -m genzoo [train|sample|evaluate|edit|compare|encode|interpolate|compress|serve|...|explain] key=value ...``

Exit codes: 0 success, 1 internal error, 2 invalid input, 3 not finite, 4 resources (disk, memory, time, another process), 129,
130 or 143 stopped by a signal (training writes a checkpoint), 141 broken pipe after success.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import genzoo
from genzoo import console
from genzoo.runs import ResourceError, writing
from genzoo.runs.redact import redact, redact_words, remember
from genzoo.training.stopping import Signals, Stopped

BAD_INPUT, INTERRUPTED = 2, 130
EXPLAIN = """python -m genzoo explain [command] [key=value ...] key ...

Prints the file and line that set each key, such as: python -m genzoo explain model=ddpm data=digits optimizer.lr"""
OWN_FILES = (
    "sample", "edit", "vary", "encode", "decode", "reconstruct", "interpolate", "traverse", "attribute", "trajectory",
    "compress", "decompress",
)  # fmt: skip
LONGEST = 2000  # characters of a line on stderr


def main() -> None:
    """Run a command; lost output does not stop it but sets the exit code."""
    leaving: SystemExit | None = None
    with console.fault_tolerant_streams() as out:
        try:
            command()
        except SystemExit as error:
            leaving = error
    if out.failure and not (leaving and leaving.code):
        if (code := console.exit_code(out.failure)) != console.BROKEN_PIPE:
            log_error(f"the output cannot be written: {out.failure}")
        sys.exit(code)
    if leaving:
        raise leaving


def command() -> None:
    """Parse the command line and run the command."""
    from hydra._internal.utils import get_args_parser

    from genzoo.config.budgets import clearing_overrides
    from genzoo.config.help import help_text
    from genzoo.config.overrides import expand_shorthands, join_runs
    from genzoo.config.paths import VERBS
    from genzoo.errors import UsageError, nearest

    words = sys.argv[1:]
    if "--version" in words:  # before Hydra prints its own version
        print(f"genzoo {genzoo.__version__}")
        return
    remember({}, words)
    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(words)
    if flags.config_name or flags.config_path:
        fail(f"--config-name and --config-path are set by the command: choose from {', '.join(VERBS)}")
    options, overrides = [word for word in words if word not in flags.overrides], flags.overrides
    verb = "train"
    if overrides and overrides[0].isidentifier():
        verb, *overrides = overrides
        if verb == "explain":
            verb, *overrides = overrides if overrides and overrides[0] in VERBS else ("train", *overrides)
            if flags.help:
                print(EXPLAIN)
                return None
            return explain(verb, overrides, flags.config_dir)
        if verb not in VERBS:
            fail(f"unknown command '{verb}': {nearest(verb, [*VERBS, 'explain'])}")
    overrides = expand_shorthands(verb, overrides)
    if not flags.multirun:
        overrides = join_runs(verb, overrides)

    job = None
    of_hydra = bool(flags.hydra_help or flags.shell_completion)
    shows = bool(flags.help or flags.cfg or flags.info)
    try:
        with Signals():
            if not of_hydra and (overrides or not shows):
                from genzoo.config.compose import preflight  # slow, and not needed for --help

                job = preflight(verb, overrides, flags.config_dir, values=not shows, sweep=flags.multirun)
            if job and verb == "train" and not shows:
                clean_up(job.config["outputs"])
            if flags.help:
                print(help_text(verb, overrides, flags.config_dir))
            elif of_hydra or shows or flags.multirun:
                cleared = [] if of_hydra or flags.multirun else clearing_overrides(verb, overrides, flags.config_dir)
                run_hydra(verb, options, [*overrides, *cleared], flags.config_dir, sweep=flags.multirun)
            elif job and (problem := attempt(run, verb, *job)):
                fail(*problem)
    except (UsageError, ResourceError, Stopped) as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)


def explain(verb: str, words: list[str], config_dir: str | None) -> None:
    """Print the origins of the values of some keys."""
    from genzoo.config.compose import preflight
    from genzoo.config.help import explain_text
    from genzoo.errors import UsageError

    try:
        preflight(verb, [word for word in words if "=" in word], config_dir, values=False)
        print(explain_text(verb, words, config_dir))
    except UsageError as error:
        fail(str(error))


def run_hydra(verb: str, options: list[str], overrides: list[str], config_dir: str | None, *, sweep: bool) -> None:
    """Show a configuration or Hydra's help, or run each job of a sweep in a process of its own and compare the runs."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from genzoo.config.budgets import clearing_overrides
    from genzoo.config.compose import names_sampler, validate
    from genzoo.config.loader import COMPOSING
    from genzoo.config.paths import CONF
    from genzoo.errors import UsageError, one_line
    from genzoo.jobs.sweep import JobResult, chooses_on_validation, finish, name_of, objective, run_job, run_jobs
    from genzoo.runs import claims

    typed, sweep_name = sys.argv, name_of(verb, overrides)
    child_options = [word for word in options if word not in ("-m", "--multirun")]
    # Preferably shared with jobs on other machines.
    here = Path("." if os.access(".", os.W_OK) else tempfile.gettempdir())
    written: set[str | None] = set()  # files of jobs
    internal_errors: list[Exception] = []  # of a job; other exceptions are usage errors of Hydra or a plugin
    claimed: list[tuple[int, Callable[[], JobResult | None]]] = []  # jobs of another sweep, retried at the end
    with claims.scratch(here) if sweep else contextlib.nullcontext(Path()) as name:
        scratch = os.path.abspath(name)

        def job(config: DictConfig) -> float | None:
            try:
                return one(config)
            except Exception as error:
                internal_errors.append(error)
                raise

        def one(config: DictConfig) -> float | None:
            hydra_config = HydraConfig.get()
            words, searches = list(hydra_config.overrides.task), not _is_basic(hydra_config.sweeper)
            if searches and verb == "train":
                words.append(chooses_on_validation(words))
                OmegaConf.update(config, *words[-1].split("="))
            for cleared in clearing_overrides(verb, words, config_dir):
                OmegaConf.update(config, cleared.partition("=")[0], None)
            ended: JobResult | None
            try:
                plain = validate(verb, config, names_sampler(hydra_config))
            except UsageError as error:
                ended = JobResult(" ".join(redact_words(words)), error.exit_code, str(error), None)
            else:
                if (out := plain.get("out")) in written and verb in OWN_FILES:
                    raise UsageError(
                        f"out={out}: several jobs write it; name the file by what differs, out='${{seed}}.png'"
                    )
                written.add(out)
                work = functools.partial(
                    run_job, sweep_name, verb, child_options, words, plain, dict(hydra_config.runtime.choices)
                )
                # A search needs each value, and a launcher's process does not share the list of claimed jobs.
                waits = searches or not _is_basic(hydra_config.launcher)
                ended = work(wait=waits)
                if ended is None:
                    claimed.append((hydra_config.job.num, functools.partial(work, wait=False)))
                    return None
            ended.write(Path(scratch), hydra_config.job.num)
            return objective(ended, config.get("objective")) if searches else None

        os.environ["HYDRA_FULL_ERROR"] = "1"  # full tracebacks of internal errors
        # Hydra's own sweep files are temporary.
        overrides = [f"hydra.sweep.dir={scratch}/hydra", *overrides] if sweep else overrides
        sys.argv = [typed[0], *options, *overrides]
        try:
            hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(job)()
        except Exception as error:
            if internal_errors or not (sweep or isinstance(error, COMPOSING)):
                raise
            raise UsageError(f"hydra: {one_line(error)}") from error
        finally:
            sys.argv = typed
        for number, ended in run_jobs(claimed):
            ended.write(Path(scratch), number)
        jobs = JobResult.read_all(Path(scratch)) if sweep else []
    codes = [0]
    for ended in jobs:
        if ended.code:
            log_error(f"job {ended.words}: {ended.cause}")
            codes.append(max(ended.code, 1))  # negative for a signal
    if problem := attempt(finish, verb, jobs):
        log_error(problem[0])
        codes.append(problem[1])
    if max(codes):
        sys.exit(max(codes))


def clean_up(outputs: str) -> None:
    """Remove temporary folders and claims of killed processes, and mark their runs as failed."""
    from genzoo.runs import mark_dead_runs
    from genzoo.runs.claims import remove_abandoned, remove_abandoned_claims

    remove_abandoned(Path())
    remove_abandoned_claims(outputs)
    mark_dead_runs(Path(outputs).glob("*/*"))


def _is_basic(plugin: Any) -> bool:
    """Whether a sweeper or launcher is Hydra's sequential, in-process one."""
    return str(plugin._target_).endswith(("BasicSweeper", "BasicLauncher"))


def run(verb: str, config: dict, choices: dict[str, str]) -> None:
    """Run a command; heavy imports happen here."""
    from genzoo.environment import ensure_home
    from genzoo.jobs.allocator import tune

    ensure_home()
    tune()  # before torch allocates anything
    if verb == "train":
        from genzoo.jobs.train import train

        train(config, choices)
        return
    command = getattr(importlib.import_module(f"genzoo.cli.{verb}"), verb)
    with writing(Path(config["out"])) if config.get("out") else contextlib.nullcontext():
        command(config)


def attempt(work: Callable[..., None], *arguments: Any) -> tuple[str, int] | None:
    """Call a function; return message and exit code of an expected error, and raise others."""
    try:
        work(*arguments)
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        return str(error), code
    return None


def log_error(message: str) -> None:
    """Write one line to stderr, with secrets redacted and control characters escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in redact(" ".join(message.split())))
    console.log_stderr(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Log an error and exit."""
    log_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
