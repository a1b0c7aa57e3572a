"""``python -m genzoo [train|sample|evaluate] key=value ...``

Exit codes: 0 done, 2 bad input, 3 not finite, 1 a bug of ours.
"""

from __future__ import annotations

import os
import sys

BAD_INPUT, NOT_FINITE = 2, 3


def main() -> None:
    """Run one command of the command line."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from genzoo.commands.config import CONF, VERBS, UsageError, nearest, preflight, validate

    arguments = sys.argv[1:]
    verb = "train"
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0]:
        verb = arguments.pop(0)
        if verb not in VERBS:
            fail(f"unknown command '{verb}': {nearest(verb, VERBS)}")
    flags = get_args_parser().parse_args(arguments)
    asks = flags.help or flags.hydra_help or flags.info or flags.shell_completion
    if not asks:
        try:
            preflight(verb, flags.overrides, flags.config_dir)
        except UsageError as error:
            fail(str(error))

    def job(config: DictConfig) -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # a bug of ours shows its real traceback
        try:
            plain = validate(verb, config)
            run(verb, plain, dict(HydraConfig.get().runtime.choices))
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            if HydraConfig.get().mode is not None and HydraConfig.get().mode.name == "MULTIRUN":
                print(f"genzoo: {' '.join(str(error).split())}", file=sys.stderr)
                raise  # the sweep goes on with its other jobs
            fail(str(error), code)

    sys.argv = [sys.argv[0], *arguments]
    hydra.main(config_path=str(CONF), config_name=verb, version_base="1.3")(job)()


def run(verb: str, config: dict, choices: dict[str, str]) -> None:
    """Do the work of a command; heavy imports happen here."""
    if verb == "train":
        from genzoo.commands.train import train

        train({**config, "hydra_choices": choices})
    elif verb == "sample":
        from genzoo.commands.sample import sample

        sample(config)
    else:
        from genzoo.commands.evaluate import evaluate

        evaluate(config)


def exit_code(error: Exception) -> int | None:
    """Say which exit code an error stands for, None for a bug of ours."""
    from genzoo.commands.config import UsageError
    from genzoo.runs import RunError

    expected: tuple[type[Exception], ...] = (UsageError, RunError)
    if "genzoo.data.dataset" in sys.modules:
        from genzoo.data.dataset import DataError

        expected += (DataError,)
    if isinstance(error, expected):
        return BAD_INPUT
    if "genzoo.training.module" in sys.modules:
        from genzoo.training.module import NonFiniteError

        if isinstance(error, NonFiniteError):
            return NOT_FINITE
    return None


def fail(message: str, code: int = BAD_INPUT) -> None:
    """Say in one line what is wrong, and stop."""
    print(f"genzoo: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
