"""OPSDTrainer. One step: sample, score with the teacher, compute the divergence, update.

Takes sampling, tools, PEFT, distributed runs, logging and the hub from TRL's DistillationTrainer, and replaces the
teacher, the padding of rollouts and the loss. Knows no kind of teacher and no kind of divergence.

Seams of TRL 1.16 and transformers that this file relies on (tests/test_trl_seams.py guards each):
`_generate`, `_generate_single_turn`, `_generate_and_score_completions`, `_prepare_inputs`, `_forward_redirection`,
`_get_train_sampler`, `get_train_dataloader`, `_get_grad_norm`, `autocast_smart_context_manager`,
`_set_signature_columns_if_needed`, `_save_checkpoint`, `_load_from_checkpoint`, `create_model_card`, `log`,
`evaluation_loop`, `_send_telemetry`, `_metrics`, `_logs`, `_step`, `_last_loaded_step`, `_buffered_inputs`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from opsd.contexts.renderer import PromptRenderer
from opsd.evaluation.plan import EvaluationPlan
from opsd.health.bound import ROLLOUTS, TEACHER
from opsd.losses import LossOutput
from opsd.models.forward import check_lengths, context_length, evaluating
from opsd.models.generation import forked_generators
from opsd.models.loading import ready_model, student_of
from opsd.rollouts import Ids, Rollouts
from opsd.teachers import StudentHandle, Teacher, load_teacher, recipe_of
from opsd.teachers.base import Row
from opsd.training import checkpoints, checks, metrics, precision
from opsd.training.averages import Averages, Tally, over_processes
from opsd.training.callbacks import GracefulStop, TeacherCallback
from opsd.training.config import OPSDConfig
from opsd.training.controls import control_of
from opsd.training.cost import summary
from opsd.training.dataset import check_trained, epoch_sampler, fitting_rows, prepare_datasets
from opsd.training.display import watched
from opsd.training.engine_samples import EngineSamples
from opsd.training.evaluator import Evaluator, planned
from opsd.training.finished import take_finished
from opsd.training.fsdp import keep_float32_sums
from opsd.training.groups import Groups
from opsd.training.half_step import HalfStep
from opsd.training.learning import Learning
from opsd.training.loss import Scorer
from opsd.training.off_policy import answers_of_teacher, off_policy_completions
from opsd.training.parts import Rows, RunParts
from opsd.training.rewards import RewardFunc
from opsd.training.run_files import RunFiles
from opsd.training.run_lock import only_run_in
from opsd.training.samples_ahead import SamplesAhead
from opsd.training.sampling import prepare_sampling, sampled
from opsd.training.sampling_check import SamplingCheck, why_unchecked
from opsd.training.saving import SavingTrainer
from opsd.training.schedules import own_rows, scheduled, set_longest
from opsd.training.step_clock import StepClock
from opsd.training.student import ready_student
from opsd.training.vllm_sync import prepare_engine


class OPSDTrainer(SavingTrainer):
    """Trains a model on its own rollouts, graded token by token by a teacher that knows more.

    >>> trainer = OPSDTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", "sdft", train_dataset=rows)
    >>> trainer.train()
    >>> trainer.save_model()

    Args:
        model: the student: a model id, a folder, a trainer (`sft`, whose model and tokenizer go on), or a loaded
            model, also a PeftModel with a trainable adapter, with its `processing_class`.
        teacher: a Teacher; a recipe's name (`"ema"`) or path; a model id or folder (= sibling); a mapping; or None
            for the same checkpoint, frozen.
        args: an OPSDConfig.
        train_dataset: rows with `prompt` (text or messages) or chat `messages`; other columns reach the teacher only.
        eval_dataset: like `train_dataset`, or a dict of such.
        processing_class: the tokenizer, with its chat template; None takes the trainer's, or that of the model's place.
        callbacks, optimizers: as in transformers' Trainer.
        quantization_config, peft_config: as in TRL's trainers; the latter wraps the model in an adapter.
        tools: functions the student may call while it samples, as in TRL.
        reward_funcs: grade rollouts: functions with TRL's signature, or names of graders ("last_number").
        evaluation: what is evaluated before, during and after training: an EvaluationPlan or a mapping of its fields.

    Raises:
        OPSDError: a wrong setting, dataset or template, before a model loads; see `opsd.errors`.
    """

    _tag_names = ("opsd", "trl", "on-policy-distillation")
    _name = "OPSD"
    args: OPSDConfig
    control: TrainerControl
    train_dataset: Any
    _signature_columns: list[str] | None
    _buffered_inputs: list[Rollouts] | None
    _record: LossOutput | None = None
    evaluator: Evaluator | None = None

    def __init__(
        self,
        model: str | nn.Module | Trainer,
        teacher: Teacher | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        args: OPSDConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable[..., Any]] | None = None,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] | None = None,
        evaluation: EvaluationPlan | Mapping[str, Any] | None = None,
    ):
        model, processing_class = student_of(model, processing_class)
        args = (
            copy(args)
            if args
            else OPSDConfig(f"{Path(model).name if isinstance(model, str) else type(model).__name__}-OPSD")
        )
        control = control_of(args.control)
        self.teacher = control.teacher(load_teacher(teacher)) if control else load_teacher(teacher)
        checkpoints.ready_folder(args)
        self.groups = Groups.from_config(args, reward_funcs)
        checks.check_settings(args, self.teacher, self.groups, eval_dataset, evaluation, peft_config, bool(tools))
        precision.choose_dtype(model, args, peft_config)
        self.scorer = Scorer(args, self.teacher)
        train_dataset, eval_dataset, questions = prepare_datasets(
            train_dataset, eval_dataset, args, self.scorer, self.groups, has_plan=evaluation is not None
        )
        plan = planned(evaluation, args, self.scorer, questions)
        if plan is not None and eval_dataset is None:
            eval_dataset = plan.selection  # without a dataset transformers never calls `evaluate`
        given = model if isinstance(model, str) else ""
        model, processing_class = ready_model(model, processing_class, args, quantization_config)
        checks.check_adapters(model)
        with SamplesAhead.sizing(args) if args.use_vllm else nullcontext():  # TRL's engine takes whole batches
            super().__init__(
                model=model,
                teacher_model=None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config if isinstance(model, str) else None,
                peft_config=peft_config,
                tools=tools,
            )
        keep_float32_sums(self.accelerator)
        self._engine = prepare_engine(self.vllm_generation, bool(args.importance_clip)) if args.use_vllm else None
        self._say = partial(self.accelerator.print, flush=True)
        self._averages = {mode: Averages() for mode in ("train", "eval")}
        self._records = {mode: metrics.LossRecords() for mode in ("train", "eval")}
        self._clock = StepClock()
        with self.accelerator.autocast():  # what probes the model computes as the run does
            self._prepare_teacher()
        rows = (self.train_dataset, self.eval_dataset, plan, recipe_of(teacher), optimizers, given, train_dataset)
        self.files = RunFiles(RunParts(args, self.accelerator, self.student, self.scorer, self.groups, *rows))
        self._stop, self._half_step = GracefulStop(self.accelerator), HalfStep(self)
        self.scorer.is_stopped = self._stop.is_asked
        self.learning = Learning(self.files.parts, self._averages["train"])
        # First in line: a callback that saves at the end of a step must find the teacher that belongs to it.
        hooks = TeacherCallback(self.teacher, self.scorer.contexts, self._metrics["train"], self._say)
        self.callback_handler.callbacks[:0] = [hooks, self._stop, self.files.resumed, self.learning, self._half_step]
        if plan is not None:
            self.add_callback(evaluator := Evaluator(self.files.parts, self._stop, self._log_selection))
            self.evaluator = evaluator
        self.tracer, self.health, self.display = watched(self)

    # ---- before the first step --------------------------------------------------------------------------------

    def _prepare_teacher(self) -> None:
        checks.check_reads_text(self._is_vlm, self._tokenizer)
        student = ready_student(self.accelerator, self.model, len(self._tokenizer), self.args, self._say)
        trainable = checks.check_student(student)
        renderer = PromptRenderer(self._tokenizer, self.chat_template, self.chat_template_kwargs, self.tools or None)
        engine, samples = (self.vllm_generation, EngineSamples(self)) if self.use_vllm else (None, None)
        self.student = StudentHandle(student, renderer, self.args.trust_remote_code, samples)
        self.eos_token_ids, self.generation_config = prepare_sampling(self.args, student, self._tokenizer, engine)
        self.scorer.prepare(self.student, self.eos_token_ids)
        shows_rollouts = bool(self.scorer.columns & set(self.groups.rollout_fields))
        self._sampling_check = SamplingCheck(self.args, why_unchecked(self.args, shows_rollouts), self._say)
        self.ahead = SamplesAhead(self)
        assert trainable == checks.check_student(student), "the teacher changed what trains"
        sides = (self.student, self.teacher, self.args, self.groups.rollout_fields, self._say)
        self.train_dataset = fitting_rows(self.train_dataset, *sides)
        self._say(summary(self.scorer, self.groups, self.train_dataset, self.student, self.args))

    def _send_telemetry(self) -> None:
        """Send nothing: TRL reports the model's kind and the machine's at construction; opsd makes no call unasked."""

    def _set_signature_columns_if_needed(self) -> None:
        """Name the columns that `remove_unused_columns=True` keeps."""
        if self._signature_columns is None:
            # All of them: reward functions and routes read columns whose names only they know.
            columns = getattr(self.train_dataset, "column_names", None) or []
            self._signature_columns = ["prompt", "completion", "completion_ids", *self.scorer.columns, *columns]

    # ---- sample ------------------------------------------------------------------------------------------------

    @property
    def _rows_per_step(self) -> int:
        """Rollouts of one optimizer step over all processes; of a generation batch, within `SamplesAhead.sizing`."""
        per_device = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return self.accelerator.num_processes * per_device

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        """Order rows by seed and epoch; TRL's sampler would replay epoch 0 after a resume in epoch 1."""
        dataset = self.train_dataset if dataset is None else dataset
        return epoch_sampler(dataset, self.args, self._rows_per_step, epoch=lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self) -> Any:
        """Return generation batches; TRL takes the accumulation steps of one optimizer step for their size."""
        with self.ahead.sizing(self.args):
            return super().get_train_dataloader()

    def _generate_single_turn(self, prompt_ids: Sequence[Ids], *args: Any, **kwargs: Any) -> list[Ids]:
        return sampled(self, prompt_ids, partial(super()._generate_single_turn, prompt_ids, *args, **kwargs))

    def _generate_and_score_completions(self, inputs: Sequence[Row]) -> Rollouts:
        """Return rollouts for a generation batch, graded and with prompts for the teacher; the first rows on-policy."""
        with self._clock.part(ROLLOUTS):
            rollouts = self._sample(inputs, own_rows(self, len(inputs)))
        decode = partial(self._tokenizer.batch_decode, skip_special_tokens=True)
        if self.log_completions:
            for name, ids in (("prompt", rollouts.prompt_ids), ("completion", rollouts.completion_ids)):
                self._logs[name].extend(gather_object(decode(ids)))
        has_fields = self.teacher.prompts.has_fields
        graded, values = self.groups.grade(rollouts, decode, has_fields, self.state, answers_of_teacher(self))
        is_repeated = metrics.repeated_rows(self.accelerator, len(inputs), trains=self.model.training)
        graded = graded.mask_rows(is_repeated)
        prepared = self.scorer.prepare_rollouts(graded)
        tallies = metrics.rollout_metrics(rollouts, values, is_repeated, self.eos_token_ids)
        tallies |= {**self.scorer.context_metrics(), **self.scorer.selection.metrics(graded, prepared)}
        tallies |= scheduled(self) | self.ahead.tallies()
        self._averages[self._mode].add(over_processes(tallies))
        return prepared

    def _sample(self, rows: Sequence[Row], count: int) -> Rollouts:
        """Sample completions from the student for the first `count` rows, and take off-policy ones for the rest."""
        prompt_ids = [self.student.renderer.ids(row["prompt"]) for row in rows]
        longest = set_longest(self)
        check_lengths(context_length(self.student.model), prompt_ids, [longest] * len(prompt_ids), "student")
        samples, others = self.ahead.take(rows[:count], prompt_ids[:count]), list[Ids]()
        if count < len(rows):
            with self.accelerator.autocast():
                rest = (rows[count:], self.args, longest)
                others, cut = off_policy_completions(*rest, self.teacher, self.student, self.eos_token_ids)
            self._averages["train"].add(over_processes({"off_policy/shortened": Tally(cut, len(others))}))
        return samples.rollouts(rows, prompt_ids, others)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    # ---- score, and the loss -----------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Sequence[Row]) -> dict[str, Any]:
        """Return one micro-batch and the teacher's signal for it; rollouts are made once per optimizer step."""
        if not self.model.training:
            return self._scored(self._generate_and_score_completions(generation_batch))
        steps = self.args.gradient_accumulation_steps
        if self._step % steps == 0 or self._buffered_inputs is None:
            rollouts = self._generate_and_score_completions(self.ahead.begin(generation_batch))
            rollouts = self.scorer.in_order(rollouts, steps)
            rollouts = self.tracer.mark(rollouts, self.state.global_step + 1)
            count = torch.tensor(rollouts.num_scorable, device=self.accelerator.device)
            total = int(self.accelerator.gather(count).sum())
            self._averages["train"].add({"scored_tokens": Tally(total, 1)})
            self._buffered_inputs = list(rollouts.with_num_loss_tokens(max(total, 1)).split(steps))
        return self._scored(self._buffered_inputs[self._step % steps])

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Compute the loss under autocast: it goes around the wrapper that accelerate puts around `forward`."""
        return self.accelerator.autocast()

    def _scored(self, rollouts: Rollouts) -> dict[str, Any]:
        # Entered and left around the teacher's own weights: autocast caches what it casts.
        with self._clock.part(TEACHER), self.accelerator.autocast():
            return {"scored": self.scorer.score(rollouts)}

    def _compute_loss(self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Return the loss; runs inside the wrapped forward pass."""
        device = self.accelerator.device
        record = self.scorer(unwrapped_student, inputs["scored"], device, self.accelerator.num_processes)
        self._record = record  # leaves by attribute: a wrapper may cast or copy what is returned
        return record.loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss; at a step's last micro-batch, once every process has seen that it is finite."""
        student = self.accelerator.unwrap_model(model)
        loss: Tensor = self._forward_redirection(model, student, self._compute_loss, student, inputs, None)
        record, self._record = self._record, None
        assert record is not None
        rollouts, mode = inputs.pop("scored").rollouts, self._mode  # popped: the teacher's states are not needed again
        records = self._records[mode]
        if mode == "eval" or not self.ahead.age:  # samples of older weights are another distribution's
            record = self._sampling_check(record, rollouts)
        records.add(record, rollouts)
        if mode == "eval" or (self._step + 1) % self.args.gradient_accumulation_steps == 0:
            if mode == "train":
                self.tracer.take(records.kept, self.state.global_step + 1)
            tallies = records.tallies(self.accelerator, self.state.global_step + 1, with_loss=mode == "eval")
            if mode == "train":
                tallies |= self._clock.tallies(self.accelerator.device)
            self._averages[mode].add(self._sampling_check.compare(tallies))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # there the loss scaler expects overflows, and skips those steps
            metrics.check_gradient(norm, self.state.global_step + 1)
        self.learning.see_gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the console and to whatever `report_to` names."""
        self._averages[self._mode].write_into(self._metrics[self._mode])
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Return transformers' output, with the loss averaged over tokens; training's random state stays as it was."""
        self._averages["eval"], self._records["eval"] = Averages(), metrics.LossRecords()
        with forked_generators(self.accelerator.device):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._clock.forget()
        output.metrics[f"{metric_key_prefix}_loss"] = self._averages["eval"].tallies.pop("loss").result
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the divergence on `eval_dataset`, and the metrics of the evaluation plan's selection split."""
        if self.evaluator is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, *args, **kwargs)
        is_plans = self.eval_dataset is self.evaluator.plan.selection
        divergence = {} if is_plans else super().evaluate(None, *args, **kwargs)
        selection = self.evaluator.evaluate_selection(self.state.global_step)
        if selection:
            self._log_selection(selection)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, selection)
        return divergence | selection

    def _log_selection(self, selection: Mapping[str, float]) -> None:
        if selection:
            with evaluating(self.model):  # TRL logs by the model's mode, and would empty the training's metrics
                self.log(dict(selection))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train. Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint at the end of the step, and prints how to resume.

        Args:
            resume_from_checkpoint: True for the newest usable checkpoint in `output_dir`, or a checkpoint's path.
            kwargs: as in transformers' Trainer.

        Raises:
            CheckpointError: the output folder holds another run, or one is running in it; there is nothing to resume
                from; the checkpoint is of another run, apart from what `allow_changes` names.
            NonFiniteLossError: NaN or infinity in the loss.
            ServerError: a served teacher does not answer; a checkpoint is saved.
        """
        # An earlier `train` that was interrupted may have left half a step.
        self._step, self._buffered_inputs, self._record = 0, None, None
        self.ahead.reset()
        self._records["train"] = metrics.LossRecords()
        self._clock.forget()
        with only_run_in(self.args.output_dir):
            checkpoint = self.files.begin(resume_from_checkpoint)
            if checkpoint and self.files.is_finished(Path(checkpoint)):
                return take_finished(self, checkpoint)
            with self._stop.listening(), closing(self.display), closing(self.tracer), self._half_step.saving():
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            check_trained(self.state.global_step, self._rows_per_step * self.args.steps_per_rollouts)
            if self.stopped_by is None:
                self.save_state()  # with the log, which `opsd health` reads
                self.files.end(self.outcome)
        return output

    @property
    def outcome(self) -> dict[str, Any]:
        """What the run did and what its monitors said, in plain values."""
        return {**self.learning.description, "health": self.health.plain}

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the last `train` before its last step, or None."""
        return self._stop.stopped_by
