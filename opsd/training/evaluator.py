"""Measures a run as its plan declares: before step 1, while it goes on, and after.

A callback of the trainer's. Every result is a file in `evaluation/` of the output folder, so that a resumed run goes
on from them and `opsd compare` pairs them with those of other runs; `evaluation.json` there is what they come to.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.data.prepare import ready_rows
from opsd.errors import DataError, OPSDError, OPSDWarning
from opsd.evaluation.likelihood import drift, logprobs
from opsd.evaluation.plan import METRIC, RULES, TRACES, EvaluationPlan, Questions
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.sampling import Generate, evaluate, generate_with
from opsd.evaluation.statistics import paired_difference
from opsd.evaluation.summary import (
    AFTER,
    BEFORE,
    FOLDER,
    LAST,
    PLAIN_TEACHER,
    SUMMARY,
    TEACHER,
    file_of,
    lines,
    metrics_with_intervals,
    read_summary,
    summarise,
)
from opsd.models.forward import evaluating
from opsd.models.generation import stop_ids_of
from opsd.rollouts import Ids
from opsd.teachers import LiveTeacher, Teacher, TeacherView
from opsd.training.off_policy import completion_ids
from opsd.training.run_card import data_digest

if TYPE_CHECKING:
    from opsd.training.loss import Scorer
    from opsd.training.trainer import OPSDTrainer

NEUTRAL, TRACE_LIKELIHOOD = "neutral.json", "traces.json"


def planned(evaluation: Any, args: Any, scorer: Scorer, train: Any) -> EvaluationPlan | None:
    """Return an evaluation plan with its rows loaded and checked, and let the run follow it.

    Args:
        evaluation: a plan, a mapping of its arguments, or None.
        args: training arguments; how often the run looks, saves, and what it ends with become the plan's.
        scorer: the loss, whose contexts read columns.
        train: prepared training rows.

    Raises:
        OPSDError: the plan cannot work; training rows are among its questions.
    """
    plan = EvaluationPlan.parse(evaluation)
    if plan is None:
        return None
    # A control's teacher is not asked about these rows, so what only it is shown need not be made for them.
    system, needed = args.student_system_prompt, () if args.control else scorer.columns
    plan = plan.loaded(train, lambda rows, name: ready_rows(rows, name=name, system_prompt=system, needed=needed))
    if plan.every:
        if args.eval_strategy != "no" and args.eval_steps not in (None, plan.every):
            warnings.warn(
                f"evaluation looks every {plan.every} steps, and eval_steps is {args.eval_steps:g}: every is in force.",
                OPSDWarning,
                stacklevel=3,
            )
        args.eval_strategy, args.eval_steps = "steps", plan.every
    if plan.rule == "best":
        args.save_strategy, args.save_steps = "steps", plan.every
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, METRIC, True
    return plan


class Evaluator(TrainerCallback):
    """Asks a run what its plan declares.

    Args:
        trainer: the trainer, its student and teacher prepared.
        plan: loaded.
    """

    def __init__(self, trainer: OPSDTrainer, plan: EvaluationPlan):
        self._trainer, self.plan = trainer, plan
        self._now = LiveTeacher()  # the student's likelihoods; prepared before mixed precision wraps the model
        self._now.prepare(trainer.student)
        self._looks: list[dict[str, Any]] = []
        streams = not isinstance(trainer.train_dataset, Dataset)
        self._skipped = ["whether test questions are trained on: the training rows are a stream"] if streams else []

    @property
    def folder(self) -> Path:
        """Where results lie."""
        return Path(self._trainer.args.output_dir) / FOLDER

    @property
    def facts(self) -> dict[str, str]:
        """What was declared, which a resumed run must not change."""
        return {"plan": self.plan.describe(), "test": data_digest(self.plan.test, "prompt")}

    # ---- when --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the student before step 1, and its teacher; a resumed run has done so."""
        self._check_processes()
        if state.global_step:
            stored = read_summary(self.folder)
            self._looks, self._skipped = stored.get("selection", []), stored.get("skipped", [])
            return
        self._say(f"evaluation  {self.plan.describe()}")
        if args.should_save:  # what an earlier run left here would be read as this one's
            for path in self.folder.glob("*.json"):
                path.unlink()
        for what in self._skipped:
            self._say(f"evaluation  not checked: {what}")
        self._measure(BEFORE)
        if self._trainer.args.control is None:  # a control's own teacher is nobody's ceiling
            self._ask_teacher()
            self._store(TRACE_LIKELIHOOD, self._traces())
        if self.plan.neutral is not None:
            self._store(NEUTRAL, self._neutral())
        if self.plan.selection is not None:
            self._look(0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the last step's student, where the run will end with another."""
        if self.plan.rule != "last" and state.global_step >= state.max_steps:
            self._keep(file_of("test", LAST), self._student(self.plan.splits["test"], "test: student at the last step"))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the checkpoint that the rule picked, and say what all of it comes to."""
        if self._trainer.stopped_by is not None:
            return
        try:
            self._measure_after(args, state)
        except Exception as error:
            warnings.warn(
                f"the student could not be measured after training: {type(error).__name__}: {error}\nIts weights are "
                "not lost for that. Save them, and measure them with `opsd eval`.",
                OPSDWarning,
                stacklevel=2,
            )

    def _measure_after(self, args: Any, state: TrainerState) -> None:
        self._measure(AFTER)
        found = self._summary(state)
        if args.should_save:
            self._store(SUMMARY, found | summarise(self.folder, list(self.plan.retention)))
        self._trainer.accelerator.wait_for_everyone()
        self._say("\n".join(lines(read_summary(self.folder))))

    def during(self) -> dict[str, float]:
        """Look at the selection split, log how it is answered now, and return that; called every `every` steps."""
        trainer = self._trainer
        if self.plan.selection is None:
            return {}
        found = self._look(trainer.state.global_step)
        graded = {METRIC: found.accuracy, "eval_length": found.estimate("length").value}
        with evaluating(trainer.model):  # TRL logs by the model's mode, and would empty the training's metrics
            trainer.log(dict(graded))
        callbacks = trainer.callback_handler
        trainer.control = callbacks.on_evaluate(trainer.args, trainer.state, trainer.control, graded)
        return graded

    def _check_processes(self) -> None:
        processes = self._trainer.accelerator.num_processes
        fewest = min(len(each.rows) for each in self.plan.splits.values())
        if fewest < processes:
            raise DataError(
                f"an evaluation split has {fewest} question(s) for {processes} processes, each of which answers a "
                "share. Ask more questions, or use fewer processes."
            )

    # ---- who is asked ------------------------------------------------------------------------------------------

    def _measure(self, when: str) -> None:
        """Ask the student every split but the one that is looked at on the way."""
        for name, questions in self.plan.splits.items():
            if name != "selection":
                self._keep(file_of(name, when), self._student(questions, f"{name}: student {when}"))

    def _look(self, step: int) -> EvaluationResult:
        found = self._student(self.plan.splits["selection"], f"selection at step {step}")
        self._looks = [look for look in self._looks if look["step"] < step]
        self._looks.append({"step": step, **metrics_with_intervals(found)})
        known = self._stored(SUMMARY) or {}
        self._store(SUMMARY, {**known, "selection": self._looks, "skipped": self._skipped})
        return found

    def _student(self, questions: Questions, what: str) -> EvaluationResult:
        return self._ask(self._sampler, questions, what, model="student")

    @property
    def _sampler(self) -> Generate:
        student = self._trainer.student
        return generate_with(student.model, student.tokenizer, lambda row: student.renderer.ids(row["prompt"]))

    @cached_property
    def _blind(self) -> str | None:
        """Why the teacher cannot be asked about the test rows, or None."""
        rows = self.plan.test
        try:
            self._trainer.teacher.prompts.check_rows(rows, rows.column_names)
        except OPSDError as error:
            return f"the test rows lack what the teacher is shown: {error}"
        return None

    def _ask_teacher(self) -> None:
        """Measure the ceiling: the teacher with its context, and without it where that is not the student."""
        teacher, test = self._trainer.teacher, self.plan.splits["test"]
        none = None if teacher.can_sample else f"teacher {teacher.strategy!r} is no single model that could answer"
        if why := none or self._blind:
            what = "the ceiling" if none else "the ceiling, and how likely the test rows' traces are"
            self._skipped.append(f"{what}: {why}")
            self._say(f"evaluation  not measured: {what}: {why}")
            return
        told = {"model": teacher.describe(), "shown": teacher.prompts.describe()}
        result = self._ask(TeacherView(teacher).sample, test, "test: teacher with its context", **told)
        self._keep(file_of("test", TEACHER), result)
        if not teacher.starts_as_student:
            plain = TeacherView(teacher, teacher.prompts.with_context(None))
            result = self._ask(plain.sample, test, "test: teacher without context", model=teacher.describe())
            self._keep(file_of("test", PLAIN_TEACHER), result)
        teacher.prompts.forget_counts()

    def _ask(self, sample: Generate, questions: Questions, what: str, **told: Any) -> EvaluationResult:
        """Let somebody answer, each process a share of the questions."""
        trainer, plan, rows = self._trainer, self.plan, list(questions.rows)
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        mine = rows[rank::processes]
        total = len(mine) * (1 + plan.samples)
        with (
            Console(stderr=True, quiet=not trainer.accelerator.is_main_process).status(what) as status,
            trainer.accelerator.autocast(),
        ):
            answered = evaluate(
                sample,
                mine,
                trainer.student.tokenizer,
                grader=questions.grader,
                max_new_tokens=self._longest,
                batch_size=plan.batch_size,
                stop_ids=stop_ids_of(trainer.student.model, trainer.student.tokenizer),
                samples=plan.samples,
                temperature=plan.temperature,
                seed=plan.seed,
                progress=lambda done: status.update(f"{what}: {done} of {total}"),
                **told,
            )
        return _interleaved(gather_object([answered]))

    # ---- likelihoods -------------------------------------------------------------------------------------------

    def _neutral(self) -> dict[str, Any]:
        """Let the student continue the neutral prompts, and return how likely it finds what it says."""
        rows = list(self.plan.neutral)
        sampling: dict[str, Any] = {"batch_size": self.plan.batch_size, "do_sample": True, "seed": self.plan.seed}
        with self._trainer.accelerator.autocast():
            ids = self._sampler(rows, max_new_tokens=self._longest, **sampling)
        return {"ids": ids, "logprobs": self._logprobs(self._now, rows, ids)}

    def _drift(self) -> dict[str, Any] | None:
        stored = self._stored(NEUTRAL)
        if self.plan.neutral is None or not stored:
            return None
        now = self._logprobs(self._now, list(self.plan.neutral), stored["ids"])
        return asdict(drift(stored["logprobs"], now))

    def _traces(self) -> dict[str, Any] | None:
        """Return how likely student and teacher find the test rows' traces, in nats per token."""
        test = self.plan.test
        column = next((name for name in TRACES if name in test.column_names and any(test[name])), None)
        if column is None or self._blind:
            return None
        rows = [row for row in test if row[column]]
        tokenizer = self._trainer.student.tokenizer
        whole: list[Ids] = [completion_ids({"completion": _as_completion(row[column])}, tokenizer) for row in rows]
        ids = [each[: self._longest] for each in whole]
        sides = [self._logprobs(who, rows, ids) for who in (self._now, self._trainer.teacher)]
        self._trainer.teacher.prompts.forget_counts()
        own, its = ([-sum(values) / len(values) for values in side] for side in sides)
        return {
            "column": column,
            "n": len(rows),
            "shortened": sum(len(each) > self._longest for each in whole),
            "student": sum(own) / len(own),
            "teacher": sum(its) / len(its),
            "behind": asdict(paired_difference(its, own)),
        }

    def _logprobs(self, who: Teacher, rows: Sequence[Any], ids: Sequence[Ids]) -> list[list[float]]:
        with self._trainer.accelerator.autocast():
            return logprobs(who, rows, ids, self.plan.batch_size)

    @property
    def _longest(self) -> int:
        return self.plan.max_new_tokens or self._trainer.args.max_completion_length

    # ---- what it comes to --------------------------------------------------------------------------------------

    def _summary(self, state: TrainerState) -> dict[str, Any]:
        """Return what models have to be asked for; the rest is read from the results."""
        traces = None if self._trainer.args.control else self._traces()
        return {
            "plan": self.plan.describe(),
            "rule": self.plan.rule,
            "chosen": _chosen(state, self.plan.rule),
            "selection": self._looks,
            "skipped": self._skipped,
            "drift": self._drift(),
            "traces": traces and {**traces, "before": self._stored(TRACE_LIKELIHOOD)},
        }

    def _keep(self, name: str, result: EvaluationResult) -> None:
        if self._trainer.args.should_save:
            result.save(self.folder / name)

    def _store(self, name: str, values: Mapping[str, Any] | None) -> None:
        if values and self._trainer.args.should_save:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def _stored(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def _say(self, text: str) -> None:
        self._trainer.accelerator.print(text)


def _chosen(state: TrainerState, rule: str) -> str:
    step = state.global_step
    if rule == "best" and state.best_model_checkpoint is not None:
        step = int(state.best_model_checkpoint.rpartition("-")[2])
    return f"step {step}: {RULES[rule]}"


def _interleaved(parts: Sequence[EvaluationResult]) -> EvaluationResult:
    """Return one result of the shares that processes answered, its questions in their old order."""
    if len(parts) == 1:
        return parts[0]
    order = [(place, part) for place in range(parts[0].n) for part in parts if place < part.n]
    return replace(
        parts[0],
        questions=[part.questions[place] for place, part in order],
        greedy=[part.greedy[place] for place, part in order],
        sampled=[part.sampled[place] for place, part in order] if parts[0].sampled else [],
    )


def _as_completion(value: Any) -> Any:
    return value if isinstance(value, str | list) else str(value)
