"""Measures a run as its plan declares: before step 1, while it goes on, and after.

A callback of the trainer's. Every result is a file in `evaluation/` of the output folder, so that a resumed run goes
on from them and `opsd compare` pairs them with those of other runs; `evaluation.json` there is what they come to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from opsd.derived import ready_rows
from opsd.errors import DataError, OPSDError
from opsd.evaluation.plan import METRIC, RULES, TRACES, EvaluationPlan, Questions
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.sampling import Sampler, evaluate, sampler_of, stop_ids_of
from opsd.evaluation.statistics import paired_difference
from opsd.evaluation.summary import (
    AFTER,
    BEFORE,
    FOLDER,
    LAST,
    PLAIN_TEACHER,
    SUMMARY,
    TEACHER,
    come_to,
    figures,
    file_of,
    lines,
    read_summary,
)
from opsd.forward import evaluating
from opsd.likelihood import drift, logprobs
from opsd.off_policy import completion_ids
from opsd.rollouts import Ids
from opsd.teachers import LiveTeacher

if TYPE_CHECKING:
    from opsd.trainer import OPSDTrainer
    from opsd.training_loss import TrainingLoss

NEUTRAL = "neutral.json"


def planned(evaluation: Any, args: Any, scorer: TrainingLoss, train: Any) -> EvaluationPlan | None:
    """Return an evaluation plan with its rows loaded and checked, and let the run follow it.

    Args:
        evaluation: a plan, a mapping of its arguments, or None.
        args: training arguments; how often the run looks, saves, and what it ends with become the plan's.
        scorer: the loss, whose contexts read columns.
        train: prepared training rows.

    Raises:
        OPSDError: the plan cannot work; training rows are among its questions.
    """
    plan = EvaluationPlan.of(evaluation)
    if plan is None:
        return None
    system, needed = args.student_system_prompt, scorer.columns
    plan = plan.loaded(train, lambda rows, name: ready_rows(rows, name=name, system_prompt=system, needed=needed))
    if plan.every:
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
        self._skipped: list[str] = []

    @property
    def folder(self) -> Path:
        """Where results lie."""
        return Path(self._trainer.args.output_dir) / FOLDER

    # ---- when --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the student before step 1, and its teacher; a resumed run has done so."""
        self._check_processes()
        if state.global_step:
            stored = read_summary(self.folder)
            self._looks, self._skipped = stored.get("selection", []), stored.get("skipped", [])
            return
        self._say(f"evaluation  {self.plan.words}")
        for name, questions in self.plan.splits.items():
            if name != "selection":
                self._keep(file_of(name, BEFORE), self._student(questions, f"{name}: student before"))
        if self._trainer.args.control is None:  # a control's own teacher is nobody's ceiling
            self._ask_teacher()
        if self.plan.neutral is not None:
            self._sample_neutral()
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
        for name, questions in self.plan.splits.items():
            if name != "selection":
                self._keep(file_of(name, AFTER), self._student(questions, f"{name}: student after"))
        if args.should_save:
            self._write(self._summary(state))
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
        fewest, processes = (
            min(len(each.rows) for each in self.plan.splits.values()),
            self._trainer.accelerator.num_processes,
        )
        if fewest < processes:
            raise DataError(
                f"an evaluation split has {fewest} question(s) for {processes} processes, each of which answers a "
                "share. Ask more questions, or use fewer processes."
            )

    # ---- who is asked ------------------------------------------------------------------------------------------

    def _look(self, step: int) -> EvaluationResult:
        found = self._student(self.plan.splits["selection"], f"selection at step {step}")
        self._looks = [look for look in self._looks if look["step"] < step]
        self._looks.append({"step": step, **figures(found)})
        self._write({"selection": self._looks, "skipped": self._skipped})
        return found

    def _student(self, questions: Questions, what: str) -> EvaluationResult:
        student = self._trainer.student
        sampler = sampler_of(student.model, student.tokenizer, lambda row: student.renderer.ids(row["prompt"]))
        return self._ask(sampler, questions, what, model="student")

    def _ask_teacher(self) -> None:
        """Measure the ceiling: the teacher with its context, and without it where that is not the student."""
        teacher, test = self._trainer.teacher, self.plan.splits["test"]
        if not teacher.can_sample:
            self._skip(f"the ceiling: teacher {teacher.strategy!r} is no single model that could answer")
            return
        try:
            teacher.check_rows(test.rows, test.rows.column_names)
        except OPSDError as error:
            self._skip(f"the ceiling, for the test rows lack what the teacher is shown: {error}")
            return
        told = {"model": teacher.words, "shown": teacher.shown}
        self._keep(file_of("test", TEACHER), self._ask(teacher.sample, test, "test: teacher with its context", **told))
        if not teacher.starts_as_student:
            plain = teacher.showing(None)
            result = self._ask(plain.sample, test, "test: teacher without context", model=teacher.words)
            self._keep(file_of("test", PLAIN_TEACHER), result)
        teacher.forget_counts()

    def _ask(self, sample: Sampler, questions: Questions, what: str, **told: Any) -> EvaluationResult:
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
                max_new_tokens=plan.max_new_tokens or trainer.args.max_completion_length,
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

    def _sample_neutral(self) -> None:
        """Let the student continue the neutral prompts, and keep how likely it found what it said."""
        student, rows = self._trainer.student, list(self.plan.neutral)
        sampler = sampler_of(student.model, student.tokenizer, lambda row: student.renderer.ids(row["prompt"]))
        with self._trainer.accelerator.autocast():
            limit = self.plan.max_new_tokens or self._trainer.args.max_completion_length
            ids = sampler(
                rows, max_new_tokens=limit, batch_size=self.plan.batch_size, do_sample=True, seed=self.plan.seed
            )
            found = logprobs(self._now, rows, ids, self.plan.batch_size)
        if self._trainer.args.should_save:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / NEUTRAL).write_text(json.dumps({"ids": ids, "logprobs": found}) + "\n")

    def _drift(self) -> dict[str, Any] | None:
        path = self.folder / NEUTRAL
        if self.plan.neutral is None or not path.is_file():
            return None
        stored = json.loads(path.read_text())
        with self._trainer.accelerator.autocast():
            now = logprobs(self._now, list(self.plan.neutral), stored["ids"], self.plan.batch_size)
        return asdict(drift(stored["logprobs"], now))

    def _traces(self) -> dict[str, Any] | None:
        """Return how much likelier the teacher finds held-out traces than the student, in nats per token."""
        rows, teacher = self.plan.test, self._trainer.teacher
        column = next((name for name in TRACES if name in rows.column_names), None)
        if column is None or self._trainer.args.control is not None:
            return None
        limit, student = self._trainer.args.max_completion_length, self._trainer.student
        rows = [{**row, "completion": str(row[column])} for row in rows if row[column]]
        ids: list[Ids] = [completion_ids(row, student.tokenizer)[:limit] for row in rows]
        with self._trainer.accelerator.autocast():
            sides = [
                logprobs(self._now, rows, ids, self.plan.batch_size),
                logprobs(teacher, rows, ids, self.plan.batch_size),
            ]
        teacher.forget_counts()
        own, its = ([-sum(values) / len(values) for values in side] for side in sides)
        found = paired_difference(its, own)
        return {"column": column, "n": len(rows), "student": _mean(own), "teacher": _mean(its), "behind": asdict(found)}

    # ---- what it comes to --------------------------------------------------------------------------------------

    def _summary(self, state: TrainerState) -> dict[str, Any]:
        summary = {
            "plan": self.plan.words,
            "rule": self.plan.rule,
            "chosen": _chosen(state, self.plan.rule),
            "selection": self._looks,
            "skipped": self._skipped,
            "drift": self._drift(),
            "traces": self._traces(),
        }
        return summary | come_to(self.folder, list(self.plan.retention))

    def _keep(self, name: str, result: EvaluationResult) -> None:
        if self._trainer.args.should_save:
            result.save(self.folder / name)

    def _write(self, summary: Mapping[str, Any]) -> None:
        if self._trainer.args.should_save:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def _skip(self, why: str) -> None:
        self._skipped.append(why)
        self._say(f"evaluation  not measured: {why}")

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
