"""OPSDTrainer. One step: sample, score with the teacher, compute the divergence, update.

Takes sampling, tools, PEFT, distributed runs, logging and the hub from TRL's DistillationTrainer, and replaces the
teacher, the padding of rollouts and the loss. Knows no kind of teacher and no kind of divergence.

Seams of TRL 1.16 and transformers that this file relies on (tests/test_trl_seams.py guards each):
`_generate`, `_generate_single_turn`, `_generate_and_score_completions`, `_prepare_inputs`, `_compute_loss`,
`_get_train_sampler`, `_get_grad_norm`, `autocast_smart_context_manager`, `_set_signature_columns_if_needed`,
`_save_checkpoint`, `_load_from_checkpoint`, `create_model_card`, `log`, `_send_telemetry`, `_metrics`, `_logs`,
`_step`, `_buffered_inputs`, `teacher_model=None`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput
from trl import DistillationTrainer

from opsd.contexts.renderer import PromptRenderer
from opsd.data.order import EpochSampler
from opsd.evaluation.plan import EvaluationPlan
from opsd.evaluation.run_folder import CARD
from opsd.findings import Examination
from opsd.losses import LossOutput
from opsd.models.forward import check_lengths, check_model, context_length, evaluating
from opsd.models.loading import broadcast_parameters, ready_model, without_dropout
from opsd.rollouts import Ids, Rollouts
from opsd.teachers import StudentHandle, Teacher, load_teacher, recipe_of
from opsd.teachers.base import Row
from opsd.teachers.checks import load_state, saved_state
from opsd.training import checkpoints, checks
from opsd.training.callbacks import GracefulStop, TeacherCallback
from opsd.training.config import OPSDConfig
from opsd.training.controls import control_of
from opsd.training.cost import summary
from opsd.training.dataset import check_rows_fit, check_trained, prepare_datasets
from opsd.training.evaluator import UNCHECKED_STREAM, Evaluator, planned
from opsd.training.groups import Groups
from opsd.training.learning import Learning
from opsd.training.loss import Scorer
from opsd.training.metrics import check_gradient, divergence_metrics, keep_maxima, mean_over_processes
from opsd.training.model_card import copy_cards, write_model_card
from opsd.training.off_policy import off_policy_completions, on_policy_rows
from opsd.training.rewards import RewardFunc
from opsd.training.run_card import run_card, write_run_card
from opsd.training.vllm_logprobs import UNKNOWN, EngineLogprobs

Rows: TypeAlias = Dataset | IterableDataset


class OPSDTrainer(DistillationTrainer):
    """Trains a model on its own rollouts, graded token by token by a teacher that knows more.

    >>> trainer = OPSDTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", "sdft", train_dataset=rows)
    >>> trainer.train()
    >>> trainer.save_model()

    Args:
        model: the student: a model id, a folder, a loaded model, or a PeftModel with a trainable adapter.
        teacher: a Teacher; a recipe's name (`"ema"`) or path; a model id or folder (= sibling); a mapping; or None
            for the same checkpoint, frozen.
        args: an OPSDConfig.
        train_dataset: rows with `prompt` (text or messages) or chat `messages`; other columns reach the teacher only.
        eval_dataset: like `train_dataset`, or a dict of such.
        processing_class: the tokenizer; None loads the model's.
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
    _signature_columns: list[str] | None
    _buffered_inputs: list[Rollouts] | None
    _record: LossOutput | None = None
    evaluator: Evaluator | None = None
    examination: Examination | None = None  # what the doctor found, if it was asked; goes into the run card

    def __init__(
        self,
        model: str | nn.Module,
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
        args = args or OPSDConfig(f"{Path(model).name if isinstance(model, str) else type(model).__name__}-OPSD")
        checkpoints.restore_number_format(args)
        self.recipe = recipe_of(teacher)
        control = control_of(args.control)
        self.teacher = control.teacher(load_teacher(teacher)) if control else load_teacher(teacher)
        checkpoints.check_writable(args.output_dir)
        self.groups = Groups.from_config(args, reward_funcs)
        checks.check_settings(args, self.teacher, self.groups, eval_dataset, evaluation, peft_config, bool(tools))
        self.scorer = Scorer(args, self.teacher)
        train_dataset, eval_dataset, questions = prepare_datasets(
            train_dataset, eval_dataset, args, self.scorer, self.groups, has_plan=evaluation is not None
        )
        plan = planned(evaluation, args, self.scorer, questions)
        if plan is not None and eval_dataset is None:
            eval_dataset = plan.selection  # without a dataset transformers never calls `evaluate`
        model, processing_class = ready_model(model, processing_class, args)
        checks.check_adapters(model)
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        self._engine = EngineLogprobs(self.vllm_generation) if args.use_vllm and args.importance_clip else None
        self._say = partial(self.accelerator.print, flush=True)
        self._prepare_teacher()
        self._stop = GracefulStop(self.accelerator)
        # First in line: a callback that saves at the end of a step must find the teacher that belongs to it.
        update_teacher = TeacherCallback(self.teacher, self.scorer.contexts, self._metrics["train"], self._say)
        known = {"rows": self.train_dataset, "recipe": self.recipe, "brings_optimizer": any(optimizers)}
        self.learning = Learning(args, self.scorer, self.groups, self._metrics["train"], self.accelerator, **known)
        self.callback_handler.callbacks[:0] = [update_teacher, self._stop, self.learning]
        if plan is not None:
            unchecked = [] if isinstance(self.train_dataset, Dataset) else [UNCHECKED_STREAM]
            self.evaluator = Evaluator(plan, self.student, self.teacher, args, self.accelerator, self._stop, unchecked)
            self.add_callback(self.evaluator)
            self._facts["evaluation"] = self.evaluator.facts

    # ---- before the first step --------------------------------------------------------------------------------

    def _prepare_teacher(self) -> None:
        checks.check_text_only(self._is_vlm)
        student = self.accelerator.unwrap_model(self.model)
        trainable = checks.check_student(student)
        broadcast_parameters(student)  # DDP would do so only after teachers have copied
        if self.args.disable_dropout:
            without_dropout(student)
        check_model(student, len(self._tokenizer))
        renderer = PromptRenderer(self._tokenizer, self.chat_template, self.chat_template_kwargs, self.tools or None)
        self.student = StudentHandle(student, renderer, self.args.trust_remote_code)
        self.scorer.prepare(self.student, self.eos_token_ids)
        assert trainable == checks.check_student(student), "the teacher changed what trains"
        fields, longest = self.groups.rollout_fields, self.args.max_completion_length or 0
        check_rows_fit(self.train_dataset, self.student, self.teacher, longest, fields)
        self._facts = checks.facts(student, len(self._tokenizer), self.scorer, self.groups, self.args)
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
        """Rollouts of one generation batch over all processes: one optimizer step."""
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[int]:
        """Order rows by seed and epoch; TRL's sampler would replay epoch 0 after a resume in epoch 1."""
        dataset = self.train_dataset if dataset is None else dataset
        return EpochSampler(
            len(dataset),
            batch_size=self._rows_per_step,
            group=self.args.num_generations,
            repeats=self.args.gradient_accumulation_steps,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[Ids]:
        """Sample in the precision that trains; autocast also caches the cast weights for the whole rollout."""
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Sequence[Row]) -> Rollouts:
        """Return rollouts for a generation batch, graded and with prompts for the teacher; the first rows on-policy."""
        count = len(inputs)
        if self.model.training:
            count = on_policy_rows(len(inputs), self.args.lmbda, self.state.global_step)
        rollouts = self._sample(inputs, count)
        decode = partial(self._tokenizer.batch_decode, skip_special_tokens=True)
        if self.log_completions:
            self._logs["prompt"].extend(gather_object(decode(rollouts.prompt_ids)))
            self._logs["completion"].extend(gather_object(decode(rollouts.completion_ids)))
        rollouts, rewards = self.groups.grade(rollouts, decode, self.teacher.prompts.has_fields, self.state)
        prepared = self.scorer.prepare_rollouts(rollouts)
        self._add_metrics(mean_over_processes(rewards) if rewards else {})
        self._add_metrics(self.scorer.metrics(rollouts, prepared))
        return prepared

    def _sample(self, rows: Sequence[Row], count: int) -> Rollouts:
        """Sample completions from the student for the first `count` rows, and take off-policy ones for the rest."""
        prompt_ids = [self.student.renderer.ids(row["prompt"]) for row in rows]
        limit, longest = context_length(self.student.model), self.args.max_completion_length
        check_lengths(limit, prompt_ids, [longest or 0] * len(prompt_ids), "student")
        sampled, others, loss_mask = list[Ids](), list[Ids](), None
        if count:
            prompts = [row["prompt"] for row in rows[:count]]
            prompt_ids[:count], sampled, loss_mask, *_ = self._generate(prompts)
        if count < len(rows):
            with self.accelerator.autocast():
                others, cut = off_policy_completions(rows[count:], self.args, self.teacher, self._tokenizer)
            self._add_metrics({"off_policy/shortened": cut})
        loss_mask = (loss_mask or [[1] * len(ids) for ids in sampled]) + [[1] * len(ids) for ids in others]
        logprobs = None
        if self._engine is not None:
            logprobs = self._engine.take(sampled) + [[UNKNOWN] * len(ids) for ids in others]
        return Rollouts(rows, prompt_ids, sampled + others, loss_mask, rollout_logprobs=logprobs)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add values to the next log entry, of training or of evaluation."""
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    # ---- score -------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Sequence[Row]) -> dict[str, Any]:
        """Return one micro-batch and the teacher's signal for it; rollouts are made once per optimizer step."""
        if not self.model.training:
            return self._scored(self._generate_and_score_completions(generation_batch))
        steps = self.args.gradient_accumulation_steps
        if self._step % steps == 0 or self._buffered_inputs is None:
            rollouts = self._generate_and_score_completions(generation_batch).sorted_by_length()
            count = torch.tensor(rollouts.num_scorable, device=self.accelerator.device)
            total = int(self.accelerator.gather(count).sum())
            self._metrics["train"]["scored_tokens"].append(total)
            self._buffered_inputs = list(rollouts.with_num_loss_tokens(max(total, 1)).split(steps))
        return self._scored(self._buffered_inputs[self._step % steps])

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Compute the loss under autocast: it goes around the wrapper that accelerate puts around `forward`."""
        return self.accelerator.autocast()

    def _scored(self, rollouts: Rollouts) -> dict[str, Any]:
        # Entered and left around the teacher's own weights: autocast caches what it casts.
        with self.accelerator.autocast():
            return {"scored": self.scorer.score(rollouts)}

    # ---- the loss ----------------------------------------------------------------------------------------------

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, summed student entropy and number of scored tokens; runs inside the wrapped forward pass."""
        device = self.accelerator.device
        record = self.scorer(unwrapped_student, inputs["scored"], device, self.accelerator.num_processes)
        self._record = record  # leaves by attribute: a wrapper may cast or copy what is returned
        return record.loss, record.entropy_N.sum(), torch.tensor(len(record.entropy_N), device=device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, once every process has seen that it is finite."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        record, self._record = self._record, None
        assert record is not None
        step, steps = self.state.global_step + 1, self.args.gradient_accumulation_steps
        # TRL's, whose mean over micro-batches counts one without tokens as 0 nats.
        self._metrics[self._mode]["entropy"].pop()
        self._add_metrics(divergence_metrics(record, inputs["scored"].rollouts, self.accelerator, steps, step))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # there the loss scaler expects overflows, and skips those steps
            check_gradient(norm, self.state.global_step + 1)
        self.learning.see_gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log to the console and to whatever `report_to` names."""
        for metrics in self._metrics.values():
            keep_maxima(metrics)
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the divergence on `eval_dataset`, and the metrics of the evaluation plan's selection split."""
        if self.evaluator is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, *args, **kwargs)
        only_selection = self.eval_dataset is self.evaluator.plan.selection
        metrics = {} if only_selection else super().evaluate(None, *args, **kwargs)
        selection = self.evaluator.evaluate_selection(self.state.global_step)
        if selection:
            with evaluating(self.model):  # TRL logs by the model's mode, and would empty the training's metrics
                self.log(dict(selection))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, selection)
        return metrics | selection

    # ---- files -------------------------------------------------------------------------------------------------

    @property
    def run_card(self) -> dict[str, Any]:
        """What this run is, in plain values."""
        plan = self.evaluator.plan if self.evaluator else None
        rows, recipe = self.train_dataset, self.recipe
        return run_card(self.args, self.student, self.scorer, self.groups, rows, plan, self.examination, recipe)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, with its model card (README.md) and its run card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            self.create_model_card()
            copy_cards(Path(self.args.output_dir), Path(output_dir or self.args.output_dir))

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the model card into the output folder; TRL's card, whose tags ours takes, is written first."""
        super().create_model_card(model_name, *args, **kwargs)
        if self.is_world_process_zero():
            folder, is_adapter = Path(self.args.output_dir), hasattr(self.student.model, "peft_config")
            if not (folder / CARD).is_file():
                write_run_card(folder, self.run_card)
            write_model_card(folder, model_name or folder.absolute().name, self.hub_model_id, is_adapter)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the teacher first: a checkpoint with a trainer state is a whole one."""
        state = saved_state(self.teacher)  # in every process: a collective where values are sharded
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            step, processes, pending = self.state.global_step, self.accelerator.num_processes, self._metrics["train"]
            checkpoints.write(folder, state, self._facts, step=step, processes=processes, pending=pending)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state, pending = checkpoints.read(Path(resume_from_checkpoint), self._facts)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_state(self.teacher, state)
        self._metrics["train"].clear()
        self._metrics["train"].update(pending)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train. Ctrl-C or SIGTERM saves a checkpoint at the end of the step, and prints how to resume.

        Args:
            resume_from_checkpoint: True for the newest usable checkpoint in `output_dir`, or a checkpoint's path.
            kwargs: as in transformers' Trainer.

        Raises:
            CheckpointError: the output folder holds another run, or there is nothing to resume from.
            NonFiniteLossError: NaN or infinity in the loss.
        """
        # An earlier `train` that was interrupted may have left half a step.
        self._step, self._buffered_inputs, self._record = 0, None, None
        folder, passed_over = checkpoints.resolve(self.args.output_dir, resume_from_checkpoint)
        self.accelerator.wait_for_everyone()
        for line in passed_over:
            self._say(line)
        if self.args.should_save:
            checkpoints.store_number_format(self.args.output_dir, bool(self.args.bf16))
            if folder is None:  # a resumed run is the one its card describes
                write_run_card(Path(self.args.output_dir), self.run_card)
        with self._stop.listening():
            output = super().train(resume_from_checkpoint=None if folder is None else str(folder), **kwargs)
        check_trained(self.state.global_step, self._rows_per_step)
        if self.stopped_by is None:
            self.learning.report()
        return output

    @property
    def stopped_by(self) -> int | None:
        """The signal that ended the last `train` before its last step, or None."""
        return self._stop.stopped_by
