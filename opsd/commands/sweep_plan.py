"""Plans a sweep: which runs the arms, settings and seeds of a run file and of a command line make.

Knows settings and names; starts no process and reads no results.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.commands.run_file import Run, RunParser, make_parser, resolve_run
from opsd.errors import ConfigError, OPSDWarning, did_you_mean, not_one_of
from opsd.evaluation.compare import METHOD
from opsd.evaluation.plan import EvaluationPlan
from opsd.evaluation.sweep_folder import SHORT, as_label
from opsd.settings import as_count, parse_yaml, read_yaml
from opsd.training.controls import control_of

SEED, RATE = "seed", "learning_rate"
KEEP = ("all", "none")  # weights and checkpoints of a run once its results are written
SEEDS_AT = ("all", "best")  # values that seeds after the first are trained at
OPTIONS = ("jobs", "keep", "seeds_at")  # of a sweep; `sweep:` may hold them beside lists and arms
FLAGS = ("dry_run", "skip_doctor")
PLACE = "{seed}"  # in any text of the settings: the seed of the run
# A sweep resumes its runs by itself; a setting that differs is refused there, run by run.
_NOT_SWEPT = ("resume_from_checkpoint", "allow_changes")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Args:
        arm: the name of its arm.
        values: what is swept beside the seed, and the learning rate.
        seed: of training.
        folder: its output folder.
        settings: its run file.

    Example:
        >>> SweepRun("sft", {"learning_rate": 1e-5}, 0, Path("runs/sweep/sft-lr1e-5-seed0"), {}).name
        'sft-lr1e-5-seed0'
    """

    arm: str
    values: Mapping[str, Any]
    seed: int
    folder: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.name

    @property
    def is_method(self) -> bool:
        """Whether it trains no control, so that the doctor can examine it."""
        return self.settings.get("control") is None


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep, in the order in which they are trained, and how they are.

    Args:
        folder: the sweep's folder; each run has one in it.
        runs: every arm at every value with every seed, the seeds outermost.
        jobs: runs at a time.
        keep: "all", or "none": weights are removed once a run's results are written.
        seeds_at: "all", or "best": seeds after the first only at each arm's best value on the selection split.
        skip_doctor: train without the doctor.
        dry_run: print the plan only.

    Example:
        >>> plan = read_sweep(["run.yaml", "--learning_rate", "1e-5", "3e-5", "--control", "method", "sft"])
        >>> len(plan.runs), plan.arms
        (4, ['method', 'sft'])
    """

    folder: Path
    runs: Sequence[SweepRun]
    jobs: int = 1
    keep: str = "all"
    seeds_at: str = "all"
    skip_doctor: bool = False
    dry_run: bool = False

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in order."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """All seeds, in order."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    @property
    def choice(self) -> list[str]:
        """How the best value of an arm will be chosen; empty where each arm has one value."""
        points = {(run.arm, str(run.values)) for run in self.runs}
        if len(points) == len(self.arms):
            return []
        if any(run.settings["evaluation"].get("selection") is None for run in self.runs):
            return ["none: without `selection:` in the evaluation no best value of an arm is chosen"]
        return ["each arm at its best accuracy on the selection split; the test split chooses nothing"]

    @property
    def first_runs(self) -> list[SweepRun]:
        """The runs that do not wait for others: all, or those of the first seed."""
        return [run for run in self.runs if self.seeds_at == "all" or run.seed == self.seeds[0]]

    @property
    def later_count(self) -> int:
        """Number of runs that wait for the best values: one for each other seed of each arm."""
        waiting = {(run.arm, run.seed) for run in self.runs} - {(run.arm, run.seed) for run in self.first_runs}
        return len(waiting)

    def later_runs(self, best: Mapping[str, Mapping[str, Any]]) -> list[SweepRun]:
        """Return the runs of the other seeds at the best values of their arms."""
        first = self.first_runs
        return [run for run in self.runs if run not in first and best.get(run.arm) == run.values]


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass
class _Request:
    """What a run file and a command line ask for, before it is multiplied out."""

    base: dict[str, Any]
    lists: dict[str, list[Any]] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def read_sweep(arguments: Sequence[str]) -> SweepPlan:
    """Return the plan of a sweep.

    Args:
        arguments: a run file, and `--key value …`; a setting with several values is swept.

    Raises:
        ConfigError: an unknown key or option, an arm that cannot be, no evaluation, two runs of one name.
    """
    parser = make_parser()
    has_file = bool(arguments) and not arguments[0].startswith("--")
    config = read_yaml(Path(arguments[0])) if has_file else {}
    request = _of_file(config, parser, arguments[0] if has_file else "the run file")
    _add_command_line(request, arguments[1 if has_file else 0 :], parser)
    options = _checked(request.options)
    folder = Path(str(request.base.pop("output_dir", None) or "runs/sweep"))
    only = options.pop("arms", None)
    arms = request.arms or {str(request.base.get("control") or METHOD): {}}
    for name in only or ():
        if name not in arms:
            raise ConfigError(not_one_of("arms", name, arms))
    arms = {name: settings for name, settings in arms.items() if only is None or name in only}
    runs = [run for name, settings in arms.items() for run in _runs_of(name, settings, request, folder, parser)]
    seeds = list(dict.fromkeys(run.seed for run in runs))
    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: a seed's arms and values keep their order
    _check_names(runs)
    plan = SweepPlan(folder, runs, **options)
    _check_evaluations(plan)
    return plan


def _of_file(config: Mapping[str, Any], parser: RunParser, where: str) -> _Request:
    base = {name: value for name, value in config.items() if name != "sweep"}
    sweep = config.get("sweep") or {}
    if not isinstance(sweep, Mapping):
        raise ConfigError(
            f"{where}: sweep must be a mapping such as {{learning_rate: [1.0e-5, 3.0e-5], seed: [0, 1]}}, and is "
            f"{sweep!r:.80}."
        )
    request = _Request(base)
    for name, value in sweep.items():
        if name == "arms":
            request.arms = _arms(value, where)
        elif name in OPTIONS:
            request.options[name] = value
        elif isinstance(value, list):
            request.lists[name] = list(map(as_typed, value))
        else:
            raise ConfigError(
                f"{where}: sweep.{name} must be a list of the values to train with, and is {value!r:.80}. A setting of "
                f"all runs stands beside `sweep:`.{did_you_mean(name, ['arms', *OPTIONS])}"
            )
    parser.check([*base, *request.lists, *itertools.chain(*request.arms.values())], where)
    return request


def _arms(value: Any, where: str) -> dict[str, dict[str, Any]]:
    is_good = isinstance(value, Mapping) and all(isinstance(each, Mapping | None) for each in value.values())
    if not is_good or not value:
        raise ConfigError(
            f"{where}: sweep.arms must be a mapping of names to settings, such as {{method: {{}}, sft: {{control: "
            f"sft}}}}, and is {value!r:.80}."
        )
    return {str(name): dict(settings or {}) for name, settings in value.items()}


def _add_command_line(request: _Request, tokens: Sequence[str], parser: RunParser) -> None:
    for name, values in _given(tokens):
        if name == "arms":
            request.options[name] = values
        elif name in (*OPTIONS, *FLAGS):
            request.options[name] = _only(name, values) if name in OPTIONS else True
        elif name == "control":
            _check_no_control(request)
            request.arms = {arm: {"control": None if arm == METHOD else arm} for arm in values} | request.arms
        else:
            _add_setting(request, name, values, parser)
    if request.arms:
        _check_no_control(request)


def _check_no_control(request: _Request) -> None:
    if request.base.get("control") is not None:
        raise ConfigError(
            f"the run file sets control: {request.base['control']}, and the sweep has arms. Each arm sets its own: "
            "take `control:` out of the run file."
        )


def _add_setting(request: _Request, name: str, values: list[Any], parser: RunParser) -> None:
    is_off = name.startswith("no_") and name not in parser.keys and not values
    key = name.removeprefix("no_") if is_off else name
    parser.check([key], "command line")
    if key in _NOT_SWEPT:
        raise ConfigError(f"--{key} is no setting of a sweep: it resumes its runs by itself. Leave it out.")
    request.lists.pop(key, None)
    if key in parser.lists:  # all values together are the one value of such a setting
        request.base[key] = values
    elif len(values) > 1:
        request.lists[key] = values
    else:
        request.base[key] = values[0] if values else not is_off


def _given(tokens: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the values of each `--name value …` or `--name=value`."""
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"{token!r} belongs to no setting. Write `opsd sweep RUN.yaml --key value value`.")
        name, is_one, value = token[2:].partition("=")
        values = [value] if is_one else []
        while rest and not rest[0].startswith("--") and not is_one:
            values.append(rest.pop(0))
        yield name.replace("-", "_"), [as_typed(each, from_shell=True) for each in values]


def as_typed(value: Any, *, from_shell: bool = False) -> Any:
    """Return a number for a text that is one, as YAML reads 3e-6 as text; from a shell also what YAML reads from it."""
    if not isinstance(value, str):
        return value
    if _NUMBER.fullmatch(value):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    is_yaml = value[:1] in ("{", "[") or value.lower() in ("true", "false", "null")
    return parse_yaml(value) if from_shell and is_yaml else value


def _only(name: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise ConfigError(f"--{name.replace('_', '-')} takes one value, and has {len(values)}.")
    return values[0]


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    for name, known in (("keep", KEEP), ("seeds_at", SEEDS_AT)):
        if name in options and options[name] not in known:
            raise ConfigError(not_one_of(name, str(options[name]), known))
    as_count("jobs", options.get("jobs", 1))
    return dict(options)


# ---- multiplying out ------------------------------------------------------------------------------------------------


def _runs_of(
    arm: str, settings: Mapping[str, Any], request: _Request, folder: Path, parser: RunParser
) -> Iterator[SweepRun]:
    """Yield the runs of one arm; what the arm sets itself replaces a list of the whole sweep."""
    fixed, lists = {}, dict(request.lists)
    for name, value in settings.items():
        if isinstance(value, list) and name not in parser.lists:
            lists[name] = list(map(as_typed, value))
        else:
            fixed[name] = as_typed(value)
            lists.pop(name, None)
    swept = [name for name in dict.fromkeys([RATE, *request.lists, *lists]) if name != SEED]
    for values in itertools.product(*lists.values()):
        merged = {**request.base, **fixed, **dict(zip(lists, values, strict=True))}
        if isinstance(merged.get("evaluation"), str):  # a file: its content is part of what the run is
            merged["evaluation"] = read_yaml(Path(merged["evaluation"]))
        run = _resolved(merged)
        seed = run.args.seed
        at = {name: run.args.learning_rate if name == RATE else merged.get(name) for name in swept}
        output = folder / _folder_name(arm, at, seed)
        whole = _with_seed({**merged, SEED: seed, "output_dir": str(output)}, seed)
        if whole.get("control") is None:
            whole.pop("control", None)
        yield SweepRun(arm, at, seed, output, whole)


def _resolved(settings: Mapping[str, Any]) -> Run:
    """Return a run's settings as `opsd train` will read them, so that a mistake is found before the first run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OPSDWarning)  # the run's own process gives them
        run = resolve_run(settings, "the sweep")
    control_of(run.args.control)
    if run.run.evaluation is None:
        raise ConfigError(
            "a sweep compares its runs on held-out questions, and the run file has no `evaluation:`. Add one: "
            "{test: test.jsonl, grader: last_number} (docs/evaluation.md)."
        )
    if run.args.push_to_hub:
        raise ConfigError(
            "push_to_hub is on, and the runs of a sweep would write over each other in one repository. Leave it out, "
            "and upload the run that you choose."
        )
    return run


def _with_seed(value: Any, seed: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_seed(each, seed) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_seed(each, seed) for each in value]
    return value.replace(PLACE, str(seed)) if isinstance(value, str) else value


def _folder_name(arm: str, values: Mapping[str, Any], seed: int) -> str:
    parts = [f"{SHORT.get(name, name)}{as_label(value)}" for name, value in values.items()]
    return "-".join(map(_plain, [arm, *parts, f"seed{seed}"]))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def _check_names(runs: Sequence[SweepRun]) -> None:
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(
            f"two runs of the sweep would share the folder {twice!r}: two arms or values differ in nothing that a name "
            "shows. Give the arms other names, and each value once."
        )


def _check_evaluations(plan: SweepPlan) -> None:
    for run in plan.runs:
        evaluation = EvaluationPlan.parse(run.settings["evaluation"])
        assert evaluation is not None
        if plan.seeds_at == "best" and evaluation.selection is None:
            raise ConfigError(
                "--seeds-at best picks each arm's best value on the split `selection`, and the evaluation has none. "
                "Picking on the test split would bias the result. Add selection: and every:, or leave --seeds-at out."
            )
