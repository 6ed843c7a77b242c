"""The command line of a recipe, and the runs that it asks for."""

import argparse
import math
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .recipe import UserError, find

DEFAULTS: dict[str, Any] = {
    "samples": [1, 8],
    "alpha": [1.0],
    "rate": [0.5],
    "strategy": "batched",
    "chunk": None,
    "keep": 1,
    "level": "example",
    "batch_norm": "per_sample",
    "expand": "axis",
    "seeds": 1,
    "first_seed": 0,
    "order_seed": None,
    "batch": 64,
    "accumulate": 1,
    "epochs": 10.0,
    "evaluate_every": 1.0,
    "test_batch": 500,
    "threads": 1,
}
# Options that may differ between the parts of one run: they change neither the numbers nor what is asked for.
FREE = {
    *("recipe", "out", "data", "resume", "seeds", "first_seed", "jobs", "workers"),
    *("checkpoint_every", "tensorboard", "quick", "time", "experiment"),
}


OWN = "{} alone"  # the group of a recipe's own options


def rate(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a dropout rate, at least 0 and under 1, got {text}")
    return value


def alpha(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, or inf, got {text}")
    return value + 0.0  # of -0 and 0 the same


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and under 1e9, got {text}")
    return value


def parser(name: str) -> argparse.ArgumentParser:
    """The options of a recipe, with its defaults."""
    recipe = find(name)
    p = argparse.ArgumentParser(
        prog=f"python -m recipes {name}",
        description=recipe.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what was given is looked up by its whole name
        epilog=f"""Several values of --samples, --alpha and --rate are all combined; each combination is trained with each seed. Examples:

  python -m recipes {name} --quick
  python -m recipes {name} --samples 1 8 --alpha 0 1 --rate 0.3 0.5 0.7 --seeds 3 --out out/{name}
  python -m recipes {name} ... --resume      the same command again: goes on where it stopped, bit for bit""",
    )
    noise = p.add_argument_group("noise samples")
    noise.add_argument("--samples", type=count, nargs="+", metavar="S", help="noise samples of each example; 1 is ordinary dropout")
    noise.add_argument("--alpha", type=alpha, nargs="+", metavar="A", help="1: importance weights, 0: equal weights, inf: the best sample")
    noise.add_argument("--rate", type=rate, nargs="+", metavar="P", help="dropout rates")
    noise.add_argument("--strategy", choices=("batched", "streamed", "resampled", "loop"), help="how S samples are paid for")
    noise.add_argument("--chunk", type=count, help="samples of one pass, with streamed and resampled")
    noise.add_argument("--keep", type=count, help="samples that go backward, with resampled")
    noise.add_argument("--level", choices=("example", "position"), help="one importance weight for each example, or each position")
    noise.add_argument("--batch-norm", choices=("per_sample", "joint", "frozen"), help="rows over which BatchNorm normalises")
    noise.add_argument("--expand", choices=("axis", "first", "input"), help="how one example becomes S: on an axis, or in rows")
    training = p.add_argument_group("training")
    training.add_argument("--seeds", type=count, metavar="N", help="runs of each combination, with the seeds 0, 1, ...")
    training.add_argument("--first-seed", type=natural, metavar="N", help="the first of these seeds")
    training.add_argument("--order-seed", type=natural, metavar="N", help="one order of the examples for all seeds (without: each its own)")
    training.add_argument("--batch", type=count, help="examples of a step")
    training.add_argument("--accumulate", type=count, metavar="N", help="parts of a batch that run one after another")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="passes over the training examples")
    length.add_argument("--steps", type=count, help="the same as a number of steps")
    training.add_argument("--evaluate-every", type=positive, metavar="EPOCHS", help="passes between evaluations and lines of the log")
    training.add_argument("--test-batch", type=count, metavar="N", help="examples of a batch in evaluations")
    training.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one (default here: %(default)s)"
    )
    training.add_argument("--amp", choices=("off", "bfloat16", "float16"), default="off", help="autocast's type (default: %(default)s)")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    training.add_argument("--threads", type=count, metavar="N", help="torch's, of each process")
    training.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, kernels that give the same bits in each run; --no-deterministic is quicker",
    )
    files = p.add_argument_group("files and processes")
    out = f"folder of logs, checkpoints, results (default: out/{name}, the recipe's own options in its name)"
    files.add_argument("--out", type=Path, help=out)
    files.add_argument("--data", type=Path, default=Path("data"), help="folder of the data that is read (default: %(default)s)")
    files.add_argument("--resume", action="store_true", help="go on with the runs that --out holds")
    files.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time, each in a process (default: %(default)s)")
    files.add_argument("--workers", type=natural, default=0, metavar="N", help="processes that read data (default: %(default)s)")
    files.add_argument(
        "--checkpoint-every", type=float, default=60.0, metavar="SECONDS", help="time between checkpoints (default: %(default)s)"
    )
    files.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=None, help="(default: where it is installed)")
    files.add_argument(
        "--time", type=natural, default=0, metavar="N", help="train nothing: time N steps of each combination, one of each in turn"
    )
    files.add_argument("--quick", action="store_true", help=f"a look: {_words(recipe.QUICK)}, unless they are given")
    recipe.add_options(p.add_argument_group(OWN.format(name)))
    unknown = sorted({*recipe.DEFAULTS, *recipe.QUICK} - {action.dest for action in p._actions})
    if unknown:
        raise UserError(f"recipes/{name}.py: expected names of options in DEFAULTS and QUICK, got {', '.join(unknown)}")
    p.set_defaults(**{**DEFAULTS, **recipe.DEFAULTS}, recipe=name)
    for action in p._actions:  # each help ends with its default, also where the recipe sets it
        told = action.help and ("default" in action.help or action.dest in ("help", "quick"))
        if not told and p.get_default(action.dest) not in (None, False):
            action.help += f" (default: {_word(p.get_default(action.dest))})"
    return p


def _word(value: Any) -> str:
    return " ".join(map(_word, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}{'' if value is True else f' {_word(value)}'}" for name, value in values.items())


def parse(name: str, arguments: list[str]) -> Namespace:
    p = parser(name)
    if p.parse_args(arguments).quick:
        p.set_defaults(**find(name).QUICK)
    settings = p.parse_args(arguments)
    recipe = find(name)
    given = {a.dest for a in p._actions if any(word.split("=")[0] in a.option_strings for word in arguments)}
    for option, value in recipe.protocol(settings).items():
        if option in given and getattr(settings, option) != value:
            got = _word(getattr(settings, option))
            p.error(f"--{option.replace('_', '-')}: {name}'s own options ask for {_word(value)}, got {got}; leave it out")
        setattr(settings, option, value)
    if settings.out is None:
        settings.out = Path("out") / _named(p, name, settings)
    if settings.batch % settings.accumulate:
        p.error(f"--accumulate: expected a divisor of --batch {settings.batch}, got {settings.accumulate}")
    if settings.keep != 1 and settings.strategy != "resampled":
        p.error("--keep: only with --strategy resampled")
    if settings.chunk is not None and settings.strategy not in ("streamed", "resampled"):
        p.error("--chunk: only with --strategy streamed or resampled")
    if settings.strategy == "resampled" and settings.level == "position":
        p.error("--strategy resampled: only with --level example, as an example keeps one noise sample whole")
    if settings.threads > 1024:
        p.error(f"--threads: expected at most 1024, got {settings.threads}")
    if settings.batch_norm == "joint" and (settings.expand == "axis" or settings.strategy in ("streamed", "loop")):
        p.error("--batch-norm joint: all samples must be rows of one pass; give --expand input (or first) and --strategy batched")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"--device {settings.device}: {str(error).splitlines()[0]}")
    return settings


def _named(p: argparse.ArgumentParser, name: str, settings: Namespace) -> str:
    """The recipe and what of its own options was asked for, so that other data and models have another folder."""
    (group,) = (g for g in p._action_groups if g.title == OWN.format(name))
    words = [name]
    for action in group._group_actions:
        value = getattr(settings, action.dest)
        if value != p.get_default(action.dest) or (action.dest in find(name).QUICK and settings.quick):
            option = action.dest.replace("_", "-")
            words.append(option if value is True else str(value) if isinstance(value, str) else f"{option}{_word(value)}")
    return "-".join(dict.fromkeys(words))


class Arm(Namespace):
    """The settings of one combination, for every seed; its name in tables, and that of its folder."""

    label: str
    folder: str


def method(samples: int, alpha: float) -> str:
    """The name of a combination in tables and pictures."""
    if samples == 1:
        return "dropout (S=1)"
    return {1.0: "IWSGD", 0.0: "mean", math.inf: "best sample"}.get(alpha, f"alpha={alpha:g}") + f" S={samples}"


def arms(settings: Namespace) -> list[Arm]:
    """Every combination of the swept options, or those that the recipe's own options name. With one sample alpha plays no part."""
    asked = find(settings.recipe).arms(settings)
    if not asked:
        swept = product(settings.rate, settings.samples, settings.alpha)
        asked = [{"rate": p, "samples": s, "alpha": a if s > 1 else 1.0} for p, s, a in swept]
    found: dict[str, Arm] = {}
    for values in asked:
        plain = {"rate": settings.rate[0], "alpha": 1.0, **{k: v for k, v in values.items() if k != "label"}}
        arm = Arm(**{**vars(settings), **plain})
        rest = [f"{k}{_word(v)}" for k, v in sorted(plain.items()) if k not in ("samples", "alpha", "rate")]
        arm.folder = "-".join([f"S{arm.samples}", f"alpha{arm.alpha:g}", f"p{arm.rate:g}", *rest])
        arm.label = values.get("label", method(arm.samples, arm.alpha))
        found.setdefault(arm.folder, arm)
    return list(found.values())


def identity(settings: Namespace) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON can hold it. A run goes on only under the same."""
    values = {k: v for k, v in vars(settings).items() if k not in FREE and k not in ("label", "folder")}
    return {k: str(v) if isinstance(v, Path) or v == math.inf else v for k, v in sorted(values.items())}
