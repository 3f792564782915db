"""Evaluates a run as its plan declares: before step 1, during training, and after it.

A callback of the trainer. Every result is a file in `evaluation/` of the output folder, so that a resumed run goes on
from it and `opsd compare` pairs it with those of other runs; `evaluation.json` there has the summary. Knows the plan,
the student and the teacher; the trainer logs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.data.needs import check_rows
from opsd.data.prepare import prepare_rows
from opsd.data.values import is_empty
from opsd.errors import DataError, OPSDError, OPSDWarning
from opsd.evaluation.likelihood import drift, logprobs
from opsd.evaluation.plan import METRIC, RULES, TRACES, EvaluationPlan, Questions
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.run_folder import write_json
from opsd.evaluation.sampling import Generate, evaluate
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
    is_evaluated,
    lines,
    read_summary,
    summarise,
)
from opsd.models.forward import embedded_tokens
from opsd.models.generation import stop_ids_of
from opsd.rollouts import Ids
from opsd.teachers import LiveTeacher, Teacher, TeacherView
from opsd.training.baselines import Baselines
from opsd.training.callbacks import GracefulStop
from opsd.training.looks import Looks
from opsd.training.loss import Scorer
from opsd.training.off_policy import row_completion
from opsd.training.parts import RunParts
from opsd.training.together import failing_together

NEUTRAL, TRACE_LIKELIHOOD = "neutral.json", "traces.json"
CONSOLE = Console()  # one for all that changes on a terminal while a run trains: two would write over each other
UNCHECKED_STREAM = "whether test questions are trained on: the training rows are a stream"


def planned(evaluation: Any, args: Any, scorer: Scorer, questions: Sequence[str]) -> EvaluationPlan | None:
    """Return an evaluation plan with its rows loaded and checked, and set how often the run evaluates and saves.

    Args:
        evaluation: a plan, a mapping of its arguments, or None.
        args: training arguments; the intervals of evaluation and saving, and the final checkpoint, become the plan's.
        scorer: the loss, whose contexts read columns.
        questions: those of the training rows.

    Raises:
        OPSDError: the plan cannot work; training rows are among its questions.
    """
    plan = EvaluationPlan.parse(evaluation)
    if plan is None:
        return None
    # A control's teacher answers none of these rows, so they need no columns for its context.
    reads = () if args.control else scorer.columns
    plan = plan.loaded(questions, partial(prepare_rows, system_prompt=args.student_system_prompt, reads=reads))
    if plan.every:
        if args.eval_strategy != "no" and args.eval_steps not in (None, plan.every):
            warnings.warn(
                f"evaluation runs every {plan.every} steps, and eval_steps is {args.eval_steps:g}: every is in force.",
                OPSDWarning,
                stacklevel=3,
            )
        args.eval_strategy, args.eval_steps = "steps", plan.every
    if plan.rule == "best":
        args.save_strategy, args.save_steps = "steps", plan.every
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, METRIC, True
    return plan


class Evaluator(TrainerCallback):
    """Evaluates the student before, during and after training, and its teacher before.

    >>> trainer = OPSDTrainer(model, "ema", train_dataset=rows, evaluation={"test": "test.jsonl", "grader": "exact"})
    >>> trainer.train()  # trainer.evaluator is one; results are in output_dir/evaluation

    Args:
        parts: what the run is made of, with a plan.
        stop: tells whether a signal ended the run.
        log: logs the accuracy on the selection split before step 1.
    """

    def __init__(self, parts: RunParts, stop: GracefulStop, log: Callable[[Mapping[str, float]], None]):
        assert parts.plan is not None
        self.plan, self._args = parts.plan, parts.args
        self._student, self._teacher = parts.student, parts.scorer.teacher
        self._accelerator, self._stop, self._log = parts.accelerator, stop, log
        self._live = LiveTeacher()  # the student's likelihoods; prepared before mixed precision wraps the model
        self._live.prepare(parts.student)
        self._looks = Looks()
        self._baselines = Baselines(parts)
        self._skipped = [] if isinstance(parts.rows, Dataset) else [UNCHECKED_STREAM]

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self._args.output_dir) / FOLDER

    @property
    def is_done(self) -> bool:
        """Whether the run has its results after training."""
        return is_evaluated(self.folder)

    # ---- when --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the student and its teacher before step 1; a resumed run has done so."""
        self._check_processes()
        if state.global_step:
            summary = read_summary(self.folder)
            self._looks, self._skipped = Looks(summary.get("selection", [])), summary.get("skipped", [])
            self._baselines.taken = summary.get("taken", [])
            return
        self._accelerator.print(f"evaluation  {self.plan.describe()}")
        if args.should_save:  # results of an earlier run would be read as this one's
            for path in self.folder.glob("*.json"):
                path.unlink()
        for reason in self._skipped:
            self._accelerator.print(f"evaluation  not checked: {reason}")
        self._evaluate_splits(BEFORE)
        if self._args.control is None:  # the teacher of a control is no ceiling
            self._evaluate_teacher()
            rows = self.plan.test if self._trace_ids[1] else None
            self._write(TRACE_LIKELIHOOD, self._baselines.value("traces", rows, self._traces, teacher=True))
        if self.plan.neutral is not None:
            self._write(NEUTRAL, self._baselines.value("neutral", self.plan.neutral, self._neutral))
        self._log(self.evaluate_selection(0))
        if self._baselines.taken:
            taken = ", ".join(self._baselines.taken)
            self._accelerator.print(
                f"evaluation  measured by an earlier run, taken from {self.plan.baselines}: {taken}"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the last step's student, where the run will end with another checkpoint."""
        if self.plan.rule != "last" and state.global_step >= state.max_steps:
            self._save(
                file_of("test", LAST),
                self._evaluate_student(self.plan.splits["test"], "test: student at the last step"),
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate the checkpoint that the rule picked, and summarise the run.

        What fails in one process fails in all, so that all of them go on to save the model.
        """
        if self._stop.stopped_by is not None:
            return
        try:
            self._evaluate_splits(AFTER)
            with failing_together():
                summary = self._summary(state)
                if args.should_save:
                    summary |= summarise(self.folder, list(self.plan.retention))
            self._write(SUMMARY, summary)
            with failing_together():
                self._accelerator.print("\n".join(lines(read_summary(self.folder))))
        except Exception as error:
            warnings.warn(
                f"the student could not be evaluated after training: {type(error).__name__}: {error}\nIts weights are "
                "unharmed: save them, and evaluate them with `opsd eval`.",
                OPSDWarning,
                stacklevel=2,
            )

    def evaluate_selection(self, step: int) -> dict[str, float]:
        """Evaluate the selection split, add it to the summary, and return what is logged; {} without such a split."""
        if self.plan.selection is None:
            return {}
        questions = self.plan.splits["selection"]
        result = self._evaluate_student(questions, f"selection at step {step}", is_before=step == 0)
        logged = self._looks.add(step, result)
        summary = self._read(SUMMARY) or {}
        self._write(SUMMARY, {**summary, "selection": self._looks.entries, "skipped": self._skipped})
        return logged

    def _check_processes(self) -> None:
        processes = self._accelerator.num_processes
        fewest = min(len(split.rows) for split in self.plan.splits.values())
        if fewest < processes:
            raise DataError(
                f"an evaluation split has {fewest} question(s) for {processes} processes, each of which answers a "
                "share. Add questions, or use fewer processes."
            )

    # ---- who answers -------------------------------------------------------------------------------------------

    def _evaluate_splits(self, when: str) -> None:
        """Evaluate the student on every split but `selection`."""
        for name, questions in self.plan.splits.items():
            if name != "selection":
                label = f"{name}: student {when}"
                result = self._evaluate_student(questions, label, is_before=when == BEFORE)
                self._save(file_of(name, when), result)

    def _evaluate_student(self, questions: Questions, label: str, *, is_before: bool = False) -> EvaluationResult:
        measure = partial(self._evaluate, self._generate, questions, label, model="student")
        return self._baselines.result(label, questions, measure) if is_before else measure()

    @property
    def _generate(self) -> Generate:
        student = self._student

        def complete(rows: Sequence[Any], **sampling: Any) -> list[Ids]:
            return student.complete([student.renderer.ids(row["prompt"]) for row in rows], **sampling)

        return complete

    @cached_property
    def _missing(self) -> str | None:
        """Why the teacher cannot answer the test rows, or None."""
        try:
            check_rows(self.plan.test, self._teacher.prompts.needs(), "test")
        except OPSDError as error:
            return f"the test rows lack columns of the teacher's context: {error}"
        return None

    def _evaluate_teacher(self) -> None:
        """Measure the ceiling: the teacher as it grades, and without its context where that is another model."""
        teacher = self._teacher
        silent = None if teacher.can_sample else f"teacher {teacher.strategy!r} is no single model that could answer"
        if reason := silent or self._missing:
            what = "the ceiling" if silent else "the ceiling, and the likelihood of the test rows' traces"
            self._skipped.append(f"{what}: {reason}")
            self._accelerator.print(f"evaluation  not measured: {what}: {reason}")
            return
        self._evaluate_view(TEACHER, TeacherView(teacher), "with its context", teacher.prompts.describe())
        if teacher.prompts.contexts and not teacher.starts_as_student:
            plain = TeacherView(teacher, teacher.prompts.with_context(None))
            self._evaluate_view(PLAIN_TEACHER, plain, "without context", "none")
        teacher.prompts.forget_counts()

    def _evaluate_view(self, when: str, view: TeacherView, how: str, context: str) -> None:
        test, label, names = self.plan.splits["test"], f"test: teacher {how}", {"model": view.teacher.describe()}
        measure = partial(self._evaluate, view.sample, test, label, **names, context=context)
        self._save(file_of("test", when), self._baselines.result(label, test, measure, teacher=True))

    def _evaluate(self, generate: Generate, questions: Questions, label: str, **names: Any) -> EvaluationResult:
        """Let a model answer, each process a share of the questions."""
        plan, rows, accelerator = self.plan, list(questions.rows), self._accelerator
        share = rows[accelerator.process_index :: accelerator.num_processes]
        total = len(share) * (1 + plan.samples)
        console = CONSOLE if accelerator.is_main_process else Console(quiet=True)
        with failing_together(), console.status(label) as status, accelerator.autocast():
            result = evaluate(
                generate,
                share,
                self._student.tokenizer,
                grader=questions.grader,
                max_new_tokens=self._max_new_tokens,
                batch_size=plan.batch_size,
                stop_ids=stop_ids_of(self._student.model, self._student.tokenizer),
                samples=plan.samples,
                temperature=plan.temperature,
                seed=plan.seed,
                progress=lambda done: status.update(f"{label}: {done} of {total}"),
                **names,
            )
        return _merge_shares(gather_object([result]))

    # ---- likelihoods -------------------------------------------------------------------------------------------

    def _neutral(self) -> dict[str, Any]:
        """Sample the student's continuations of the neutral prompts, and return them with their log-probabilities."""
        rows = list(self.plan.neutral)
        sampling: dict[str, Any] = {"batch_size": self.plan.batch_size, "do_sample": True, "seed": self.plan.seed}
        with self._accelerator.autocast():
            ids = self._generate(rows, max_new_tokens=self._max_new_tokens, **sampling)
        return {"ids": ids, "logprobs": self._logprobs(self._live, rows, ids)}

    def _drift(self) -> dict[str, Any] | None:
        before = self._read(NEUTRAL)
        if self.plan.neutral is None or not before:
            return None
        now = self._logprobs(self._live, list(self.plan.neutral), before["ids"])
        return asdict(drift(before["logprobs"], now))

    def _traces(self) -> dict[str, Any] | None:
        """Return the NLL of the test rows' traces under student and teacher, in nats per token."""
        column, rows, traces = self._trace_ids
        if not traces or self._missing:
            return None
        ids = [trace[: self._max_new_tokens] for trace in traces]
        logprobs_of_both = [self._logprobs(model, rows, ids) for model in (self._live, self._teacher)]
        self._teacher.prompts.forget_counts()
        student, teacher = ([-sum(values) / len(values) for values in rows_of] for rows_of in logprobs_of_both)
        return {
            "column": column,
            "n": len(rows),
            "shortened": sum(len(trace) > self._max_new_tokens for trace in traces),
            "student": sum(student) / len(student),
            "teacher": sum(teacher) / len(teacher),
            "behind": asdict(paired_difference(teacher, student)),
        }

    @cached_property
    def _trace_ids(self) -> tuple[str, list[Any], list[Ids]]:
        """The column of the test rows' traces, the rows that have one, and the traces' ids; no rows where none fit."""
        test, student = self.plan.test, self._student
        column = next((name for name in TRACES if name in test.column_names and not is_empty(list(test[name]))), "")
        rows = [row for row in test if column and not is_empty(row[column])]
        completions = [{"prompt": row["prompt"], "completion": _as_completion(row[column])} for row in rows]
        embedded = embedded_tokens(student.model)
        try:
            return column, rows, [row_completion(row, student.renderer, embedded) for row in completions]
        except DataError as error:
            reason = f"the likelihood of the test rows' {column!r}: {error}"
            if reason not in self._skipped:
                self._skipped.append(reason)
                self._accelerator.print(f"evaluation  not measured: {reason}")
            return column, [], []

    def _logprobs(self, model: Teacher, rows: Sequence[Any], ids: Sequence[Ids]) -> list[list[float]]:
        with self._accelerator.autocast():
            return logprobs(model, rows, ids, self.plan.batch_size)

    @property
    def _max_new_tokens(self) -> int:
        return self.plan.max_new_tokens or self._args.max_completion_length

    # ---- the summary -------------------------------------------------------------------------------------------

    def _summary(self, state: TrainerState) -> dict[str, Any]:
        """Return what needs the models; `summarise` reads the rest from the results."""
        traces = None if self._args.control else self._traces()
        return {
            "plan": self.plan.describe(),
            "rule": self.plan.rule,
            "chosen": _chosen(state, self.plan.rule),
            "selection": self._looks.entries,
            "skipped": self._skipped,
            "taken": self._baselines.taken,
            "drift": self._drift(),
            "traces": traces and {**traces, "before": self._read(TRACE_LIKELIHOOD)},
        }

    def _save(self, name: str, result: EvaluationResult) -> None:
        with failing_together():
            if self._args.should_save:
                result.save(self.folder / name)

    def _write(self, name: str, values: Mapping[str, Any] | None) -> None:
        with failing_together():
            if values and self._args.should_save:
                write_json(self.folder / name, values)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _chosen(state: TrainerState, rule: str) -> str:
    step = state.global_step
    if rule == "best" and state.best_model_checkpoint is not None:
        step = int(state.best_model_checkpoint.rpartition("-")[2])
    return f"step {step}: {RULES[rule]}"


def _merge_shares(shares: Sequence[EvaluationResult]) -> EvaluationResult:
    """Return one result of the processes' shares, its questions in the order of the split."""
    if len(shares) == 1:
        return shares[0]
    order = [(place, share) for place in range(shares[0].n) for share in shares if place < share.n]
    return replace(
        shares[0],
        questions=[share.questions[place] for place, share in order],
        greedy=[share.greedy[place] for place, share in order],
        sampled=[share.sampled[place] for place, share in order] if shares[0].sampled else [],
    )


def _as_completion(value: Any) -> Any:
    return value if isinstance(value, str | list) else str(value)
