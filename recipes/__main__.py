"""``python -m recipes NAME``: trains a recipe with several noise samples per example."""

import shlex
import sys
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.measure import Measurement
except ImportError as error:
    raise SystemExit(f"{error}: the recipes need the package rich: pip install 'iwsgd_ext[recipes]'") from None

from .options import FREE, arms, parse
from .recipe import RECIPES, UserError, find

USAGE = """usage: python -m recipes NAME [options]
       python -m recipes NAME --help
       python -m recipes --list

Trains a model of a recipe with S noise samples per example, for each combination of --samples, --alpha and --rate and each of --seeds,
and ends with a table of means and standard deviations. Stop it at any time, also by kill -9: the same command with --resume goes on,
and ends with the same bits."""


def listed() -> str:
    width = max(map(len, RECIPES))
    return "\n".join(f"{name:<{width}}  {(find(name).__doc__ or '').splitlines()[0]}" for name in RECIPES)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "--list"):
        print(listed() if arguments[:1] == ["--list"] else f"{USAGE}\n\n{listed()}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in RECIPES:
        there = Path(__file__).with_name(f"{name}.py").exists()
        hint = f"\n\nrecipes/{name}.py is there: add its name to RECIPES in recipes/recipe.py" if there else ""
        print(f"{USAGE}\n\nerror: no recipe of the name {name!r}; there are\n\n{listed()}{hint}", file=sys.stderr)
        return 2
    try:
        settings = parse(name, rest)
        return run(settings, arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step
        print("Stopped.", file=sys.stderr)
        return 130


def run(settings: Any, arguments: list[str]) -> int:
    from .run import Stopped
    from .summary import table, write_all
    from .sweep import results, step_times

    console, command = Console(markup=False, emoji=False), ["python", "-m", "recipes", *arguments]
    if settings.tensorboard is not False:
        settings.tensorboard = _has_tensorboard(console, asked=settings.tensorboard)
    recipe = find(settings.recipe)
    data = recipe.load(settings)
    todo = arms(settings)
    if settings.time:
        seconds = step_times(todo, data, console)
        for arm, of_arm in zip(todo, seconds, strict=True):
            ratio = f"{of_arm / seconds[0]:.2f}x" if arm is not todo[0] else "1x, the others are in its time"
            console.print(f"{arm.label:<24} p={arm.rate:<5g} {1000 * of_arm:>9.2f} ms/step  {ratio}", highlight=False)
        return 0
    runs = len(todo) * settings.seeds
    examples = f"{len(data.train)} training and {len(data.test)} test examples"  # type: ignore[arg-type]
    console.print(f"{settings.recipe}: {examples}, {runs} run{'s' * (runs > 1)}, logs and checkpoints in {settings.out}", highlight=False)
    try:
        found = results(todo, data, console)
    except (Stopped, KeyboardInterrupt) as stop:
        old = f"The last checkpoints are at most {settings.checkpoint_every:g} s old"
        what = "Each run has a checkpoint of its last step" if isinstance(stop, Stopped) else old
        again = shlex.join(command if "--resume" in command else [*command, "--resume"])
        console.print(f"Stopped. {what}; go on with\n\n  {again}\n", highlight=False, soft_wrap=True)
        return 130
    about = {
        "recipe": settings.recipe,
        "command": shlex.join([w for w in command if w != "--resume"]),
        "options": _options(settings),
        "facts": recipe.facts(settings),
    }
    shown = table(todo, found)  # whole: a narrower terminal wraps its lines, where rich would cut the numbers off
    wide = max(console.width, Measurement.get(console, console.options.update(max_width=1000), shown).maximum)
    Console(width=wide, markup=False, emoji=False).print(shown)
    console.print(f"{settings.out}: {', '.join(write_all(settings.out, todo, found, about))}", highlight=False)
    return 0


def _options(settings: Any) -> dict[str, Any]:
    return {k: v for k, v in sorted(vars(settings).items()) if k not in FREE}


def _has_tensorboard(console: Console, asked: bool | None) -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        if asked:
            raise UserError(f"--tensorboard: {error}; pip install tensorboard, or leave the option out") from None
        console.print("No TensorBoard log (pip install tensorboard); log.csv has the same numbers.", highlight=False)
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
