"""EleutherAI's lm-evaluation-harness on a checkpoint: `opsd eval runs/first --harness gsm8k,ifeval`.

The model is loaded as every command loads it, and the harness does the rest: tasks, prompts, metrics and standard
errors are its own, and so are its seeds, so that a figure means what it means elsewhere. Knows neither opsd's graders
nor training. `lm_eval` is an extra, and is imported when a run starts.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from opsd.errors import ConfigError, as_count, did_you_mean
from opsd.models.loading import load_model

FEWSHOT_SEED = 1234  # the harness's default for numpy, torch and the drawing of few-shot examples; `random` has 0


@dataclass(frozen=True)
class HarnessRow:
    """One figure: a metric of a task, or of a group of tasks, after one filter."""

    task: str
    metric: str
    filter: str
    """How the harness took the answer out of the text; "none" where it did not have to."""
    value: float
    """A share between 0 and 1 for accuracies, and in the metric's own unit otherwise."""
    stderr: float | None
    """The harness's standard error; None where it gives none."""
    n: int
    """Questions asked."""
    shots: int | None
    """Solved examples in the prompt; None for a group whose tasks differ."""
    higher_is_better: bool | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Value ± 1.96 standard errors, about 95 %: the spread over questions, not over training seeds.

        None without a standard error, and with one of 0: if all answers got the same mark, the normal interval is a
        point, however few they were.
        """
        return (self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr) if self.stderr else None


@dataclass(frozen=True)
class HarnessResult:
    """What a run of the harness found, and under which conditions."""

    rows: tuple[HarnessRow, ...]
    versions: Mapping[str, Any]
    """Task to the version of its definition; figures of different versions do not compare."""
    harness_version: str
    chat_template: bool
    """Whether questions were put through the tokenizer's chat template."""
    limit: int | None
    """Questions per task, None for all."""
    notes: tuple[str, ...]
    """What the harness warned of, such as prompts cut off: the first of each kind, and how many more."""


class _Notes(logging.Handler):
    """Keeps the first warning from each line of code, and counts the others."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: dict[tuple[str, int], tuple[str, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep or count one record."""
        place = (record.pathname, record.lineno)
        first, count = self._seen.get(place, (" ".join(record.getMessage().split()), 0))
        self._seen[place] = (first, count + 1)

    def texts(self) -> tuple[str, ...]:
        """Return one line per kind of warning."""
        return tuple(f"{text} (and {n - 1} more like it)" if n > 1 else text for text, n in self._seen.values())


def run_harness(
    model: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | str = 8,
    include_path: str | None = None,
    apply_chat_template: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> HarnessResult:
    """Run tasks of the lm-evaluation-harness on a model.

    Args:
        model: a folder, a folder with an adapter, or a hub id.
        tasks: names of tasks, groups or tags.
        limit: only the first so many questions of each task; for a try, not for a figure to report.
        batch_size: sequences per forward pass, or "auto": the harness looks for the largest that fits, on the longest
            input the model takes. That suits a GPU and a short context, and is far too slow on a CPU.
        include_path: a folder with task definitions (YAML) of your own; read once per process.
        apply_chat_template: whether to use the tokenizer's chat template, if it has one.
        chat_template_kwargs: for the template, such as {"enable_thinking": False}.
        dtype: of the weights; without it float32 on a CPU, and what the checkpoint says on a GPU.
        trust_remote_code: whether code that came with the weights may run.
        seed: added to the harness's own seeds, so that 0 draws the few-shot examples everyone's runs draw.

    Raises:
        ConfigError: the harness is not installed, a setting is wrong, or a task is unknown or cannot be loaded.
    """
    _check(tasks, limit, batch_size, include_path)
    with _listening(_Notes()) as notes:
        loaded = _load_tasks(_task_manager(include_path), tasks)
    lm = _wrap(model, batch_size, chat_template_kwargs, dtype, trust_remote_code)
    chat = apply_chat_template and lm.tokenizer.chat_template is not None
    with _listening(notes):
        output = _evaluate(lm, loaded, limit, chat, seed)
    return HarnessResult(
        rows=tuple(_rows(output)),
        versions=output["versions"],
        harness_version=version("lm_eval"),
        chat_template=chat,
        limit=limit,
        notes=notes.texts(),
    )


def as_table(result: HarnessResult) -> Table:
    """Return a result as a table, with the conditions it holds under as the caption."""
    table = Table("task", "metric", "filter", "shots", "n", "value", "95 % interval", "", box=None, header_style="bold")
    table.caption, table.caption_justify = Text("\n".join(_caption(result))), "left"  # no markup: "[gsm8k]" is a name
    for row in result.rows:
        low_high = "—" if row.interval is None else f"{row.interval[0]:.4f} to {row.interval[1]:.4f}"
        better = {True: "higher is better", False: "lower is better", None: ""}[row.higher_is_better]
        shots = "—" if row.shots is None else str(row.shots)
        table.add_row(row.task, row.metric, row.filter, shots, str(row.n), f"{row.value:.4f}", low_high, better)
    return table


def _caption(result: HarnessResult) -> Iterator[str]:
    chat = "chat template" if result.chat_template else "no chat template"
    yield f"lm-evaluation-harness {result.harness_version}; {chat}; interval: value ± 1.96 · its standard error"
    if result.limit is not None:
        yield f"only the first {result.limit} questions of each task: no figure to compare with others'"
    yield from (f"the harness warns: {note}" for note in result.notes)


def _check(tasks: Sequence[str], limit: int | None, batch_size: int | str, include_path: str | None) -> None:
    """Refuse, before anything loads, what cannot work."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "the lm-evaluation-harness is not installed. It is an extra, for it brings thirty packages with it. "
            "Install it: pip install 'opsd[harness]'."
        )
    if isinstance(tasks, str) or not tasks:
        raise ConfigError(f"the harness needs a list of task names, such as ['gsm8k', 'ifeval'], and got {tasks!r}.")
    if limit is not None:
        as_count("limit", limit)
    if not str(batch_size).startswith("auto"):
        as_count("batch_size", batch_size)
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(
            f"include_path {include_path!r} is not a folder, so no task is defined there. Give the folder with your "
            "YAML files."
        )


@contextmanager
def _listening(notes: _Notes) -> Iterator[_Notes]:
    """Take the harness's log for ourselves: it would print a line for every setting it was given."""
    logger = logging.getLogger("lm_eval")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(notes)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield notes
    finally:
        logger.removeHandler(notes)
        logger.propagate = propagate
        logger.setLevel(level)


@cache
def _task_manager(include_path: str | None) -> Any:
    """Return the harness's index of tasks, ten thousand YAML files that take some 10 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _load_tasks(manager: Any, names: Sequence[str]) -> Any:
    """Return the harness's dictionary of the tasks and groups behind names; their datasets are loaded with them.

    Raises:
        ConfigError: a task is unknown, cannot be loaded, comes twice, or would run what the model wrote.
    """
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"the harness has no task {name!r}, so there is nothing to ask.{did_you_mean(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists them all; tasks of your own are found in include_path."
            )
    named: list[Any] = []
    for name in names:
        found = _load(manager, name)
        named += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    try:
        loaded = manager.load(named)
    except ValueError as error:
        raise ConfigError(f"a task would be run twice: {error}. Name the group or the task, not both.") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"the task {name!r} runs the programs that the model writes, which opsd does for no one. In a sandbox, "
                "use the harness itself: lm-eval run --confirm_run_unsafe_code."
            )
    return loaded


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        raise ConfigError(
            f"the task {name!r} needs a package that is not installed: {_first_line(error)}. Some tasks mark answers "
            "with packages of their own. Install it, or the extra the harness has for the task, such as "
            "pip install 'lm-eval[ifeval]' or 'lm-eval[math]'."
        ) from error
    except Exception as error:  # a task may run any code to get its data, and fail in any way
        raise ConfigError(
            f"the task {name!r} could not be loaded: {type(error).__name__}: {_first_line(error)}. The harness fetches "
            "a task's questions, and sometimes its metric, from the hub. Run it once where the hub can be reached "
            "(without HF_HUB_OFFLINE=1), after which the cache serves offline; or define a task on a local file in "
            "include_path."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")


def _wrap(
    model: str,
    batch_size: int | str,
    chat_template_kwargs: Mapping[str, Any] | None,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
) -> Any:
    """Return the harness's view of a model, which opsd loads: adapters, safetensors and refusals are as elsewhere."""
    from lm_eval.models.huggingface import HFLM

    dtype = dtype or ("auto" if torch.cuda.is_available() else torch.float32)
    loaded, tokenizer = load_model(model, trust_remote_code=trust_remote_code, dtype=dtype)
    with _listening(_Notes()):  # it warns that it was given a model and not a name
        return HFLM(
            pretrained=loaded,
            tokenizer=tokenizer,
            batch_size=batch_size,
            chat_template_args=dict(chat_template_kwargs or {}),
        )


def _evaluate(lm: Any, tasks: Any, limit: int | None, chat: bool, seed: int) -> Any:
    """Do what `lm_eval.simple_evaluate` does, without its survey of the machine (git, pip, the hub)."""
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(FEWSHOT_SEED + seed)
    torch.manual_seed(FEWSHOT_SEED + seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED + seed)
    return evaluate(lm, tasks, limit=limit, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=True)


def _rows(output: Any) -> Iterator[HarnessRow]:
    """Read the harness's figures, which it keeps under keys such as "acc,none" and "acc_stderr,none"."""
    for task, figures in output["results"].items():
        for key, value in figures.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = figures.get(f"{metric}_stderr,{name}")
            yield HarnessRow(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,  # "N/A" where it has none
                n=figures["sample_len"],
                shots=output["n-shot"].get(task),
                higher_is_better=output["higher_is_better"].get(task, {}).get(metric),
            )
