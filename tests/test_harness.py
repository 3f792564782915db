"""lm-evaluation-harness: real runs on a tiny model and local tasks, beside figures worked out without the harness."""

from __future__ import annotations

import io
import json
import logging
import math
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from opsd.errors import ConfigError
from opsd.evaluation import harness
from opsd.evaluation.harness import HarnessResult, HarnessRow, as_table, run_harness

lm_eval = pytest.importorskip("lm_eval")

# Choices of one length, or a random model would always take the shortest.
QUESTIONS = [
    {
        "question": f"What is {i} + {i * 7 % 5}?" + " Say it." * (i % 3),
        "choices": [f"{i * 3 % 7} rule", f"{i * 5 % 7} hint", f"({i % 9}) 7", f"{i % 8} = {i % 5}"],
        "right": i % 4,
    }
    for i in range(35)
]
MAX_NEW_TOKENS = 5


@pytest.fixture(scope="module")
def model(llama_folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder).eval()


def greedy_text(model: LlamaForCausalLM, folder: str, question: str) -> str:
    """The model's greedy answer to a question in the chat template, token by token and without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + MAX_NEW_TOKENS and tokenizer.eos_token_id not in ids[start:]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM, llama_folder: str) -> str:
    """Task definitions of our own, each with its data in a local file."""
    root = tmp_path_factory.mktemp("tasks")

    def task(name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"data_files": {"test": str(root / f"{name}.jsonl")}, "cache_dir": str(root / "cache")}
        definition = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"metadata": {"version": 3}, **definition}))

    def metric(name: str, better: bool = True, aggregation: str = "mean") -> dict[str, Any]:
        return {"metric_list": [{"metric": name, "aggregation": aggregation, "higher_is_better": better}]}

    choice = {"output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "right"}
    choice |= {"doc_to_choice": "choices", **metric("acc")}
    task("opsd_choice", QUESTIONS, **choice)
    task("opsd_choice_shots", QUESTIONS, num_fewshot=2, fewshot_split="test", **choice)
    task("opsd_long", [{**QUESTIONS[0], "question": "1 + 2 " * 400}] * 2, **choice)
    task("opsd_unsafe", QUESTIONS, unsafe_code=True, **choice)
    group = {"group": "opsd_group", "task": ["opsd_choice", "opsd_choice_shots"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (root / "opsd_group.yaml").write_text(yaml.safe_dump(group))

    said = [greedy_text(model, llama_folder, row["question"]) for row in QUESTIONS[:8]]
    rows = [{**row, "answer": said[i] if i < 3 else "no"} for i, row in enumerate(QUESTIONS[:8])]
    write = {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer"}
    write["generation_kwargs"] = {"until": ["no such text"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False}
    task("opsd_write", rows, **write, **metric("exact_match"))

    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "question"}
    task("opsd_text", QUESTIONS, **text, **metric("bits_per_byte", False, "bits_per_byte"))

    task("opsd_absent", QUESTIONS, **choice)
    absent = yaml.safe_load((root / "opsd_absent.yaml").read_text()) | {"dataset_path": "opsd-tests/no-such-dataset"}
    (root / "opsd_absent.yaml").write_text(yaml.safe_dump(absent | {"dataset_kwargs": {}}))
    (root / "needs.py").write_text("import a_package_that_nobody_has\n\ndef process(rows):\n    return rows\n")
    task("opsd_needs", QUESTIONS, **choice)
    with (root / "opsd_needs.yaml").open("a") as file:
        file.write("process_docs: !function needs.process\n")
    return str(root)


def one(result: HarnessResult) -> HarnessRow:
    (row,) = result.rows
    return row


def accuracy_by_hand(model: LlamaForCausalLM, folder: str, start: str, end: str) -> float:
    """The share of questions whose right choice makes the most probable whole text, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    double = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    correct = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(start + row["question"] + end + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = double(torch.tensor([ids])).logits[0]
            scores.append(sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(1, len(ids))))
        correct += scores.index(max(scores)) == row["right"]
    return correct / len(QUESTIONS)


USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {  # settings, and the text before and after the question that they must give
    "chat": ({}, USER, ASSISTANT),
    "thinking": ({"chat_template_kwargs": {"enable_thinking": True}}, USER, ASSISTANT + "<think>\n"),
    "plain": ({"apply_chat_template": False}, "", " "),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_multiple_choice_accuracy_is_the_one_worked_out_from_the_logits(
    kind: str, model: LlamaForCausalLM, llama_folder: str, folder: str
) -> None:
    settings, start, end = PROMPTS[kind]
    result = run_harness(llama_folder, ["opsd_choice"], include_path=folder, **settings)
    row = one(result)
    expected = accuracy_by_hand(model, llama_folder, start, end)
    assert 0 < expected < 1 and row.value == pytest.approx(expected, abs=1e-9)
    error = math.sqrt(expected * (1 - expected) / (len(QUESTIONS) - 1))
    assert row.stderr == pytest.approx(error)
    assert row.interval == pytest.approx((expected - 1.96 * error, expected + 1.96 * error))
    assert (row.task, row.metric, row.filter, row.n, row.shots) == ("opsd_choice", "acc", "none", 35, 0)
    assert row.higher_is_better is True and result.versions == {"opsd_choice": 3}
    assert result.chat_template == (kind != "plain") and result.harness_version == lm_eval.__version__


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generated_answers_are_the_models_greedy_ones(
    batch_size: int, llama_folder: str, folder: str, monkeypatch
) -> None:
    """Three of eight targets are what the model says; padding on the wrong side would change that."""
    batches = []
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda *a, **k: batches.append(len(k["input_ids"])) or generate(*a, **k)
    )
    row = one(run_harness(llama_folder, ["opsd_write"], include_path=folder, batch_size=batch_size))
    assert (row.metric, row.n, row.value) == ("exact_match", 8, 3 / 8)
    assert max(batches) == batch_size and sum(batches) == 8


def test_figures_are_those_of_the_harness_itself_with_its_own_seeds(llama_folder: str, folder: str) -> None:
    """Few-shot examples are drawn at random: with other seeds no figure would compare with another's."""
    tasks = ["opsd_choice_shots", "opsd_text"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": llama_folder, "dtype": "float32", "device": "cpu"},
        tasks=tasks,
        task_manager=harness._task_manager(folder),
        apply_chat_template=True,
        log_samples=True,
    )
    shots, text = run_harness(llama_folder, tasks, include_path=folder).rows
    assert shots.shots == 2 and shots.value == theirs["results"]["opsd_choice_shots"]["acc,none"]
    assert text.value == pytest.approx(theirs["results"]["opsd_text"]["bits_per_byte,none"], rel=1e-6)
    assert text.higher_is_better is False and text.stderr is None and text.interval is None


def test_another_seed_draws_other_examples(llama_folder: str, folder: str) -> None:
    prompts = []
    for seed in (0, 0, 1):
        tasks = harness._load_tasks(harness._task_manager(folder), ["opsd_choice_shots"])
        lm = harness._wrap(llama_folder, 8, None, None, False)
        harness._evaluate(lm, tasks, None, True, seed)
        prompts.append([instance.args[0] for instance in tasks["tasks"]["opsd_choice_shots"].instances])
    assert prompts[0] == prompts[1] != prompts[2]


def test_an_adapter_is_measured_on_its_base(tmp_path: Path, llama_folder: str, folder: str) -> None:
    """The adapter's figure is the merged model's and not the base's; a base loaded alone would look untrained."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(llama_folder), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
    base, adapter, merged = (
        one(run_harness(name, ["opsd_text"], include_path=folder)).value
        for name in (llama_folder, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    )
    assert adapter == pytest.approx(merged, rel=1e-5) and abs(adapter - base) > 0.01 * base


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the checkpoint says")
def test_weights_are_float32_on_a_cpu_unless_told(tmp_path: Path, llama_folder: str) -> None:
    """A checkpoint saved in bfloat16 would run in it, slower on most CPUs and with other figures."""
    LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    for asked, got in ((None, torch.float32), ("auto", torch.bfloat16), ("float16", torch.float16)):
        assert harness._wrap(str(tmp_path), 1, None, asked, False).model.dtype == got


def test_without_a_chat_template_there_is_none(tmp_path: Path, llama_folder: str, folder: str) -> None:
    LlamaForCausalLM.from_pretrained(llama_folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    result = run_harness(str(tmp_path), ["opsd_choice"], include_path=folder)
    plain = run_harness(llama_folder, ["opsd_choice"], include_path=folder, apply_chat_template=False)
    assert not result.chat_template and result.rows == plain.rows


def test_a_group_has_its_tasks_rows_and_its_own(llama_folder: str, folder: str) -> None:
    rows = {row.task: row for row in run_harness(llama_folder, ["opsd_group"], include_path=folder).rows}
    assert list(rows) == ["opsd_choice", "opsd_choice_shots", "opsd_group"]
    group = rows.pop("opsd_group")
    assert group.value == pytest.approx(sum(row.value for row in rows.values()) / 2)
    assert (group.n, group.shots, group.higher_is_better) == (70, None, True) and group.stderr is not None


def test_the_table_says_under_which_conditions(llama_folder: str, folder: str) -> None:
    result = run_harness(llama_folder, ["opsd_choice", "opsd_text"], include_path=folder, limit=4)
    console = Console(width=160, file=io.StringIO())
    console.print(as_table(replace(result, notes=("[opsd_choice] some questions have no mark",))))
    table = console.file.getvalue()
    choice, text = result.rows
    assert choice.n == text.n == 4 and f"{text.value:.4f}" in table and "lower is better" in table
    for words in (
        "opsd_choice",
        "acc",
        "bits_per_byte",
        "value ± 1.96",
        "chat template",
        "first 4 questions",
        "[opsd_choice] some",
    ):
        assert words in table


def test_equal_marks_give_no_interval() -> None:
    """Five right of five would read 100 % ± 0."""
    facts = {"task": "t", "metric": "acc", "filter": "none", "n": 5, "shots": 0, "higher_is_better": True}
    assert HarnessRow(value=1.0, stderr=0.0, **facts).interval is None


def test_the_log_is_quiet_but_a_prompt_cut_off_is_told(llama_folder: str, folder: str, capfd, caplog) -> None:
    before = list(logging.getLogger("lm_eval").handlers), logging.getLogger("lm_eval").level
    result = run_harness(llama_folder, ["opsd_long", "opsd_choice"], include_path=folder)
    out, err = capfd.readouterr()
    assert out == "" and "Truncating" not in err
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert before == (list(logging.getLogger("lm_eval").handlers), logging.getLogger("lm_eval").level)
    (note,) = [note for note in result.notes if "Truncating" in note]
    assert note.endswith("more like it)") and not any("already-initialized" in note for note in result.notes)


def test_errors_name_the_rule_the_reason_and_the_way_out(llama_folder: str, folder: str, tmp_path: Path) -> None:
    cases = {
        "did you mean 'gsm8k'.*lm-eval ls tasks": ["gsm8"],
        "could not be loaded.*no-such-dataset.*HF_HUB_OFFLINE": ["opsd_absent"],
        r"a_package_that_nobody_has.*pip install 'lm-eval\[ifeval\]'": ["opsd_needs"],
        "runs the programs that the model writes.*sandbox": ["opsd_unsafe"],
        "run twice.*opsd_choice.*not both": ["opsd_group", "opsd_choice"],
        "list of task names": [],
    }
    for pattern, tasks in cases.items():
        with pytest.raises(ConfigError, match=f"(?i){pattern}") as caught:
            run_harness("no/such-model", tasks, include_path=folder)  # refused before the model is looked for
        assert (caught.value.__cause__ is not None) == (tasks[:1] in (["opsd_absent"], ["opsd_needs"], ["opsd_group"]))
    for settings in ({"limit": 0}, {"batch_size": 0}, {"include_path": str(tmp_path / "none")}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            run_harness(llama_folder, ["opsd_choice"], **{"include_path": folder, **settings})
    with pytest.raises(ConfigError, match="neither a folder"):
        run_harness("no-such-model", ["opsd_choice"], include_path=folder)


def test_without_the_harness_the_extra_is_named(monkeypatch, llama_folder: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'opsd\[harness\]'"):
        run_harness(llama_folder, ["gsm8k"])


def test_the_harness_is_imported_when_it_runs(monkeypatch) -> None:
    """Without the extra, `import opsd` and every other command must work."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(str(harness.__file__), run_name=harness.__name__)
