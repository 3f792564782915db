"""Writes the model card: README.md beside a trained model, with the metadata that a hub reads.

Made of the run card and the evaluation's summary, which lie in the run's folder. Asks no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from opsd.evaluation.run_folder import CARD, CARD_PAGE, read_card, write_whole
from opsd.evaluation.summary import AFTER, FOLDER, lines, read_summary
from opsd.sources import is_hub_id

FILE = "README.md"
TASK = "text-generation"
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_GITHUB = re.compile(r"(?<![\w/.])github\.com/[\w.-]+/[\w.-]+\w")

_QUICK_START = """\
```python
from transformers import pipeline

generate = pipeline("text-generation", model="{model}")
print(generate([{{"role": "user", "content": "…"}}], max_new_tokens=256, return_full_text=False)[0]["generated_text"])
```"""


def write_model_card(folder: Path, name: str, repository: str | None, is_adapter: bool) -> None:
    """Write the model card of a run over the one that TRL wrote, and keep that one's tags and links to logs.

    Args:
        folder: the run's output folder, with a run card, TRL's model card, and a summary if the run was evaluated.
        name: of the model.
        repository: hub id, if the model has one.
        is_adapter: whether the model is an adapter of its base model.
    """
    draft = ModelCard.load(folder / FILE)
    links = [line.strip() for line in draft.text.splitlines() if line.startswith("[<img ")]
    card = model_card(
        read_card(str(folder)),
        read_summary(folder / FOLDER),
        name,
        repository=repository,
        is_adapter=is_adapter,
        tags=draft.data.tags or [],
        datasets=draft.data.datasets,
        links=links,
    )
    write_whole(folder / FILE, str(card))


def copy_cards(source: Path, target: Path) -> None:
    """Copy the model card and the run card to a folder that the model was saved into."""
    if source.resolve() != target.resolve():
        for name in (FILE, CARD, CARD_PAGE):
            write_whole(target / name, (source / name).read_text("utf-8"))


def model_card(
    card: Mapping[str, Any],
    summary: Mapping[str, Any],
    name: str,
    *,
    repository: str | None = None,
    is_adapter: bool = False,
    tags: Iterable[str] = (),
    datasets: Any = None,
    links: Iterable[str] = (),
) -> ModelCard:
    """Return the card of a trained model.

    >>> print(model_card(read_card("runs/first"), read_summary(Path("runs/first/evaluation")), "first"))

    Args:
        card: the run card.
        summary: of the evaluation, {} where nothing was evaluated.
        name: of the model.
        repository: hub id, if the model has one.
        is_adapter: whether the model is an adapter of its base model.
        tags: of the model.
        datasets: hub id or ids of the training rows.
        links: lines with links to logs.
    """
    base = card["first_loaded_from"]
    results = list(eval_results(summary))
    data = ModelCardData(
        base_model=base if is_hub_id(base) and not Path(base).exists() else None,
        base_model_relation="adapter" if is_adapter else "finetune",
        datasets=datasets,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=sorted(tags),
        model_name=name,
        eval_results=results or None,
    )
    text = "\n\n".join(part for part in _parts(card, summary, name, repository or name, links) if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def eval_results(summary: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield the metrics of the final student: on the test split, and on what must not get worse."""
    after = summary.get("metrics", {}).get(AFTER)
    if after is not None:
        yield from _results_of("test", after)
    for name, kept in summary.get("retention", {}).items():
        yield from _results_of(f"retention {name}", kept[AFTER])


def _results_of(split: str, metrics: Mapping[str, Any]) -> Iterator[EvalResult]:
    for metric, estimate in metrics.items():
        if isinstance(estimate, Mapping):
            yield EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"\W+", "-", split),
                dataset_name=f"{split} ({metrics['n']} questions)",
                metric_type=metric,
                metric_name=f"{metric} (grader {metrics['grader']})",
                metric_value=estimate["value"],
                metric_args=None if estimate["low"] is None else {"interval_95": [estimate["low"], estimate["high"]]},
            )


def _parts(
    card: Mapping[str, Any], summary: Mapping[str, Any], name: str, model: str, links: Iterable[str]
) -> Iterator[str]:
    """Yield the paragraphs of the page."""
    yield f"# {name}"
    yield (
        f"{_student(card)}, trained by on-policy distillation with opsd {card['opsd']}: the model answers, and a "
        "teacher scores every token of the answer."
    )
    yield "\n".join(links)
    yield f"## Quick start\n\n{_QUICK_START.format(model=model)}"
    yield f"## Training\n\n{_training(card)}"
    yield f"```text\n{card['divergence']['formula']}\n```"
    yield f"All settings, prompts, hashes and versions: [{CARD_PAGE}]({CARD_PAGE}), [{CARD}]({CARD})."
    if summary.get("metrics"):
        yield "## Evaluation\n\nWith 95 % intervals over questions.\n\n```text\n" + "\n".join(lines(summary)) + "\n```"
    yield f"## Sources\n\n{_sources(card)}"


def _training(card: Mapping[str, Any]) -> str:
    settings = card["settings"]
    rows = {
        "base model": _student(card),
        "control": settings.get("control") and f"{settings['control']}: not the method, but what it is compared with",
        "teacher": card["teacher"]["description"],
        "context of the teacher": ", ".join(card["contexts"]) or "none: the student's own prompt",
        "rollouts": card["groups"],
        "loss": card["divergence"]["description"],
        "learning rate": f"{settings['learning_rate']:g}",
        "rows": card["rows"],
        "outcome": " ".join(" ".join(card.get("outcome", {}).get("lines", ())).split()),
    }
    cells = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *cells])


def _named(base: str) -> str:
    """Return a base model's name: a link where a hub may have it, else the last part of its path."""
    if Path(base).is_absolute() or Path(base).exists() or not is_hub_id(base):
        return f"`{Path(base).name}`"
    return f"[{base}](https://huggingface.co/{base})"


def _student(card: Mapping[str, Any]) -> str:
    """Return the model that training began with: its name, or of a loaded model its class and where it came from."""
    model, origin = card["model"], card["first_loaded_from"]
    return _named(model) if origin in ("", model) else f"{_named(model)}, first loaded from {_named(origin)}"


def _sources(card: Mapping[str, Any]) -> str:
    versions = card["versions"]
    method = card["method"]
    used = [f"- opsd {card['opsd']}"] + [f"- {name} {versions[name]}" for name in ("trl", "transformers", "torch")]
    if not method:
        return "\n".join(used)
    whose = "teacher and context" if method["recipe"] else "strategy of the teacher"
    text = [f"- {whose}: {_linked(method['source'])}"]
    if method["differences"]:
        text.append(f"  Differences from it: {method['differences'].strip()}")
    return "\n".join(text + used)


def _linked(source: str) -> str:
    """Return a recipe's source with its papers and repositories as links."""
    text = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return _GITHUB.sub(lambda match: f"[{match[0]}](https://{match[0]})", text)
