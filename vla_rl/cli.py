"""The command line: `vla-rl COMMAND`; `USAGE` says which there are.

A recipe names a complete configuration, and its fields are options, as `--train.num-iterations 50`. What kind of
policy, sampler and algorithm it has is the recipe's own; `module:function` names a recipe of yours.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

WITH_RECIPE = ("run", "demos", "sft", "train")
EVALUATION = ("eval", "compare", "forgetting", "report", "runs")
COMMANDS = (
    *WITH_RECIPE,
    *EVALUATION,
    "doctor",
    "recipes",
    "env",
    "checkpoint",
    "serve",
    "twin",
    "deploy",
    "replay",
)
USAGE = """vla-rl: take a vision-language-action policy from demonstrations to a real arm with reinforcement learning

  vla-rl doctor                              what this machine can run, and how to get what is missing
  vla-rl recipes                             the complete configurations that there are
  vla-rl env install NAME | list             simulators in an environment of their own: robosuite, libero, ...
  vla-rl run RECIPE --run-dir DIR            all stages: demonstrations, SFT, RL, evaluation, report
  vla-rl demos RECIPE --out DIR              record demonstrations (a LeRobot dataset)
  vla-rl sft RECIPE --dataset DIR --run-dir DIR      fit a new policy to demonstrations
  vla-rl train RECIPE --policy DIR --run-dir DIR     improve a policy by reinforcement learning
  vla-rl eval --policy DIR --out DIR         success on held-out episodes, with intervals
  vla-rl compare A B [C ...]                 evaluations, episode by episode; --out page.html, --fail-under 0.8
  vla-rl forgetting BASE A [B ...] --new-tasks T --out F.json    success on the other tasks, KL(base || policy)
  vla-rl report DIR                          the report of a run or an evaluation once more
  vla-rl runs DIR                            one page of all runs and evaluations in a folder
  vla-rl serve --policy DIR                  a policy over a websocket; eval --policy ws://host:port asks it
  vla-rl twin --task TASK                    the tabletop's arm as a process behind ROS 2 topics, in real time
  vla-rl deploy --robot twin --policy DIR --out DIR    the policy on that arm, through the safety filter
  vla-rl replay LOG --policy DIR             a policy's answers to an arm's log, against what was done there
  vla-rl checkpoint inspect DIR | convert FROM TO    public checkpoints: pi0, pi0.5, SmolVLA, OpenVLA

  vla-rl COMMAND --help shows how to see all options; add --resume to go on with what was interrupted.
  --import MODULE, with any of them, imports a module that registers a policy of yours."""

_HELP = {
    **{name: f"\n\nOptions depend on the recipe: vla-rl {name} demo --help" for name in WITH_RECIPE},
    "eval": "\n\nOptions depend on the episodes: vla-rl eval --policy DIR --suite reach --help, or --recipe demo",
    "recipes": "",
}


class UsageError(ValueError):
    """The command line does not make sense."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the command did its work, 1 when it failed, 2 for a wrong command line, 3 where
    `compare --fail-under` found less, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE, flush=True)
            return 0 if arguments else 2
        name, *rest = arguments
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            raise UsageError(f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if rest[:1] in (["-h"], ["--help"]) and name in _HELP:
            print(f"{USAGE}{_HELP[name]}", flush=True)
            return 0
        rest = _import_named(name, rest)
        # torch and the simulator take seconds to import: not for a list of commands
        module = importlib.import_module(f"vla_rl.commands{'_eval' if name in EVALUATION else ''}")
        return getattr(module, f"{name}_command")(rest)
    except BrokenPipeError:  # whoever read the output has seen enough: `vla-rl recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved stays, --resume goes on from there", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _report_error(error)


def _import_named(command: str, argv: list[str]) -> list[str]:
    """Import what every `--import MODULE` names, which registers policies of yours, and return the other arguments."""
    modules: list[str] = []
    module, rest = take_option(argv, "--import", command)
    while module is not None:
        modules.append(module)
        module, rest = take_option(rest, "--import", command)
    if modules:
        from vla_rl.policies.checkpoints.outside import name_imports

        name_imports(modules)
    return rest


def take_option(argv: list[str], option: str, command: str = "eval") -> tuple[str | None, list[str]]:
    """The value after `option`, which is read before all others, and the rest. Raises UsageError without a value."""
    if option not in argv:
        return None, argv
    at = argv.index(option)
    if at + 1 == len(argv) or argv[at + 1].startswith("-"):
        raise UsageError(f"{command}: {option} needs a value")
    return argv[at + 1], argv[:at] + argv[at + 2 :]


def _report_error(error: Exception) -> int:
    """Errors speak for themselves; the traceback is for who asks for it."""
    if os.environ.get("VLA_RL_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"  {note}", file=sys.stderr)
    if isinstance(error, UsageError):
        print("\n" + USAGE, file=sys.stderr)
        return 2
    if type(error).__name__ == "Interrupted":
        return 130
    if not os.environ.get("VLA_RL_TRACEBACK"):
        print("  (VLA_RL_TRACEBACK=1 shows where it came from)", file=sys.stderr)
    return 1
