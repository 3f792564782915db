"""What runs measure before training, kept in a folder that they share, by everything that it depends on.

The student before training and the teacher's ceiling are the same in every run with the same weights, questions,
precision and settings of evaluation: a sweep measures them once. A value is taken only if all it depends on is equal;
what cannot be compared (your own teacher class, a sharded model) is measured anew. Knows files and the parts of a run;
measures nothing itself.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from opsd.evaluation.graders import is_function_name
from opsd.evaluation.plan import Questions
from opsd.evaluation.result import EvaluationResult
from opsd.evaluation.run_folder import write_json
from opsd.models.digests import digest_of, tokenizer_digest
from opsd.models.generation import stop_ids_of
from opsd.training.facts import model_facts
from opsd.training.machine import hardware
from opsd.training.parts import RunParts
from opsd.training.run_card import chat_template_digest, data_digests, versions
from opsd.training.together import failing_together

DEPENDS_ON, VALUE = "depends_on", "value"
# Packages whose classes a version describes; a class from elsewhere may hold what no fingerprint shows.
KNOWN = ("opsd", "transformers", "peft")


class Baselines:
    """Takes values from a shared folder, or measures them and puts them there.

    >>> baselines = Baselines(parts)  # before anything shards or trains the student
    >>> before = baselines.result("test, student", questions, lambda: evaluate_student(questions))
    >>> baselines.taken
    ['test, student']

    Args:
        parts: what the run is made of; its plan's `baselines` names the folder, None shares nothing.
    """

    def __init__(self, parts: RunParts):
        assert parts.plan is not None
        self._parts, self._plan = parts, parts.plan
        self._folder = Path(parts.plan.baselines) if parts.plan.baselines and not _why_not(parts) else None
        self._run = _of_run(parts) if self._folder else {}
        self._teacher = _of_teacher(parts) if self._folder else {}
        self.taken: list[str] = []  # names of what was not measured in this run

    def result(
        self, name: str, questions: Questions, measure: Callable[[], EvaluationResult], *, teacher: bool = False
    ) -> EvaluationResult:
        """Return the answers to a split, taken or measured.

        Args:
            name: of what is measured.
            questions: the split.
            measure: asks the model.
            teacher: whether the teacher answers.
        """
        on = {"grader": _of_grader(questions.grader.name), "answer_column": self._plan.answer_column}
        value = self.value(name, questions.rows, lambda: asdict(measure()), teacher=teacher, **on)
        assert value is not None
        return EvaluationResult.from_plain(value)

    def value(
        self,
        name: str,
        rows: Dataset | None,
        measure: Callable[[], Mapping[str, Any] | None],
        *,
        teacher: bool = False,
        **others: Any,
    ) -> dict[str, Any] | None:
        """Return plain values that were measured on rows, taken or measured; None where there is nothing to measure.

        Args:
            name: of what is measured.
            rows: what it is measured on.
            measure: measures it.
            teacher: whether it depends on the teacher.
            others: what it depends on beside rows, model and settings.
        """
        if self._folder is None or rows is None:
            return _plain(measure())
        depends_on = _plain({
            "what": name, "rows": data_digests(rows)[0], **self._run, **others,
            **({"teacher": self._teacher} if teacher else {}),
        })  # fmt: skip
        path = self._folder / f"{digest_of([json.dumps(depends_on, sort_keys=True)])}.json"
        with failing_together():
            stored = _read(path, depends_on) if self._parts.accelerator.is_main_process else None
        stored = gather_object([stored])[0]
        if stored is not None:
            self.taken.append(name)
            return stored
        value = _plain(measure())
        with failing_together():
            if value is not None and self._parts.args.should_save:
                write_json(path, {DEPENDS_ON: depends_on, VALUE: value})
        return value


def _read(path: Path, depends_on: Mapping[str, Any]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    stored = json.loads(path.read_text("utf-8"))
    return stored[VALUE] if stored[DEPENDS_ON] == depends_on else None


# ---- what a value depends on ----------------------------------------------------------------------------------------


def _of_run(parts: RunParts) -> dict[str, Any]:
    """Return what every value depends on: weights, prompts, sampling, precision, machine."""
    args, student, plan = parts.args, parts.student, parts.plan
    assert plan is not None
    settings = ("batch_size", "samples", "temperature", "seed")
    precision = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval")
    return {
        **model_facts(student.model, len(student.tokenizer)),
        "engine": "vllm" if args.use_vllm else "transformers",
        "attention": str(getattr(student.model.config, "_attn_implementation", "")),
        "tokenizer": tokenizer_digest(student.tokenizer),
        "chat_template": chat_template_digest(student),
        "chat_template_kwargs": student.renderer.chat_template_kwargs,
        "stop_ids": sorted(stop_ids_of(student.model, student.tokenizer)),
        "max_new_tokens": plan.max_new_tokens or args.max_completion_length,
        "settings": {name: getattr(plan, name) for name in settings},
        "precision": {name: getattr(args, name, None) for name in precision},
        "processes": parts.accelerator.num_processes,
        "versions": versions(),
        "hardware": hardware(),
    }


def _of_teacher(parts: RunParts) -> dict[str, Any]:
    # The description has a hash of weights that come from elsewhere; the longest completion leaves a context its room.
    return {"description": parts.scorer.teacher.description, "max_completion_length": parts.args.max_completion_length}


def _of_grader(name: str) -> str:
    """Return a grader's name, and for a function of the user's a hash of its file."""
    if not is_function_name(name):
        return name
    module = sys.modules.get(name.partition(":")[0])
    file = inspect.getsourcefile(module) if module else None
    return f"{name} {digest_of([Path(file).read_text('utf-8')])}" if file else f"{name} without source"


def _why_not(parts: RunParts) -> str | None:
    """Return what of a run no fingerprint describes, so that nothing is shared; None where all is described."""
    teacher = parts.scorer.teacher
    whose = [parts.student.model, *teacher.members, *teacher.prompts.contexts]
    unknown = [type(each).__name__ for each in whose if type(each).__module__.split(".")[0] not in KNOWN]
    if unknown:
        return f"the code of {', '.join(unknown)}"
    if parts.accelerator.distributed_type.value == "FSDP":
        return "sharded weights"
    return "tools" if parts.student.renderer.tools else None


def _plain(values: Any) -> Any:
    """Return values as a JSON file gives them back, so that taken and measured ones are alike."""
    return json.loads(json.dumps(values, default=str))
