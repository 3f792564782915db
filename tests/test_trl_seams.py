"""The seams of TRL and transformers that the trainer relies on: one clear line when a release moves one."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
import transformers
import trl
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from trl import DistillationConfig, DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import _ForwardRedirection

# method -> the parameters that opsd passes or receives
SEAMS = {
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "_get_train_sampler": ["self", "dataset"],
    "get_train_dataloader": ["self"],
    "_set_signature_columns_if_needed": ["self"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_send_telemetry": ["self"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "autocast_smart_context_manager": ["self", "cache_enabled"],
    "log": ["self", "logs", "start_time"],
    "compute_loss_context_manager": ["self"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "save_model": ["self", "output_dir", "_internal_call"],
}


@pytest.mark.parametrize("name", SEAMS)
def test_a_method_has_the_parameters_the_trainer_relies_on(name: str) -> None:
    where = f"trl {version('trl')} / transformers {version('transformers')} moved the seam {name}"
    assert hasattr(DistillationTrainer, name), where
    method = inspect.unwrap(getattr(DistillationTrainer, name))
    assert list(inspect.signature(method).parameters) == SEAMS[name], where


def test_generate_returns_prompt_ids_completion_ids_and_tool_mask_first() -> None:
    source = inspect.getsource(DistillationTrainer._generate)
    assert "return prompt_ids, completion_ids, tool_mask, images, tool_images" in source


def test_the_base_trainer_may_be_built_without_a_teacher_model() -> None:
    assert inspect.signature(DistillationTrainer.__init__).parameters["teacher_model"].default is None


@pytest.mark.parametrize(
    "attribute",
    ["_step", "_buffered_inputs", "_metrics", "_logs", "_tokenizer", "chat_template", "chat_template_kwargs", "tools",
     "_is_vlm", "shuffle_dataset", "temperature", "log_completions", "eos_token_ids", "generation_config"],
)  # fmt: skip
def test_the_base_trainer_sets_the_attributes_that_are_read(attribute: str) -> None:
    assert f"self.{attribute} = " in inspect.getsource(DistillationTrainer.__init__)


def test_the_loss_is_computed_inside_the_wrapper_as_trl_computes_it() -> None:
    source = inspect.getsource(inspect.unwrap(DistillationTrainer.compute_loss))
    assert (
        "self._forward_redirection(\n            model, unwrapped_student, self._compute_loss, unwrapped_student"
        in source
    )


def test_the_engine_answers_with_logprobs_where_they_are_expected() -> None:
    """Importance correction sets `logprobs`, and reads the third of four answers of `generate`."""
    assert "self.logprobs = logprobs" in inspect.getsource(VLLMGeneration.__init__)
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in inspect.getsource(
        VLLMGeneration.generate
    )
    assert "self.vllm_generation.generate(" in inspect.getsource(DistillationTrainer._generate_single_turn)


def test_an_engine_sends_what_it_iterates_over() -> None:
    """Merged copies reach vLLM in place of `_iter_named_params`; a server's mode is read as TRL reads it."""
    assert list(inspect.signature(VLLMGeneration._iter_named_params).parameters) == ["self"]
    source = inspect.getsource(VLLMGeneration.sync_weights)
    assert source.count("self._iter_named_params()") == source.count("_iter_named_params") == 4
    assert "self.vllm_client = " in inspect.getsource(VLLMGeneration._init_vllm)
    assert 'logprobs_mode="processed_logprobs"' in inspect.getsource(VLLMGeneration._init_vllm)
    assert 'vllm_client.get_server_info()["model_config"]["logprobs_mode"]' in inspect.getsource(trl.GRPOTrainer)


def test_rollouts_are_sampled_with_the_settings_that_are_set_on_the_trainer() -> None:
    """The trainer replaces these after TRL has made its own."""
    source = inspect.getsource(DistillationTrainer._generate_single_turn)
    assert "generation_config=self.generation_config" in source and "torch.tensor(self.eos_token_ids" in source
    assert "generation_kwargs.update(self.generation_kwargs)" in inspect.getsource(VLLMGeneration.generate)


def test_a_call_can_be_sent_through_a_models_forward() -> None:
    """Teachers that FSDP2 shards score inside their model's forward pass (`opsd.models.sharding.run_in_forward`)."""
    parameters = inspect.signature(_ForwardRedirection.__call__).parameters
    assert list(parameters) == ["self", "wrapper_module", "original_module", "method", "args", "kwargs"]


def test_an_evaluation_reports_the_metrics_that_its_loop_returns() -> None:
    """`evaluation_loop` puts the loss per token in place of the mean over batches."""
    source = inspect.getsource(transformers.Trainer.evaluate)
    assert source.index("output = self.evaluation_loop(") < source.index("self.log(output.metrics)")
    assert "return output.metrics" in source


def test_what_teachers_are_told_of_a_step_was_logged_before_it() -> None:
    """Gates read `state.log_history` in on_step_end, which must not hold the step's own entry yet, and always later."""
    source = inspect.getsource(transformers.Trainer._maybe_log_save_evaluate)
    assert source.index("self.log(logs") < source.index("self._evaluate(") < source.index("self._save_checkpoint(")


def test_callbacks_at_the_end_of_a_step_run_before_the_save() -> None:
    """The teacher moves in on_step_end; a checkpoint of that step must hold the moved teacher."""
    source = inspect.getsource(transformers.Trainer._run_epoch)
    assert source.index("on_step_end") < source.index("_maybe_log_save_evaluate")


def test_fsdp_is_set_up_by_a_plugin_that_is_read_when_the_model_is_prepared() -> None:
    """`opsd.training.fsdp` changes the plugin's policy, the accumulation's and the kind of state dict."""
    assert "fsdp2_plugin.mixed_precision_policy or" in inspect.getsource(fsdp2_prepare_model)
    epoch = inspect.getsource(transformers.Trainer._run_epoch)
    assert 'self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)' in epoch
    save = inspect.getsource(transformers.Trainer.save_model)
    assert '"FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)' in save
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(
        transformers.Trainer._save_checkpoint
    )


def test_a_model_card_is_written_into_the_output_folder_and_then_read_there() -> None:
    assert 'os.path.join(self.args.output_dir, "README.md")' in inspect.getsource(DistillationTrainer.create_model_card)


def test_the_configuration_still_means_what_gkd_means() -> None:
    fields = DistillationConfig.__dataclass_fields__
    assert fields["beta"].default == 1.0 and "reverse" in fields["beta"].metadata["help"].lower()
    assert trl.__version__.startswith("1.16.")
