"""Set-ups that are as they should be, of odd kinds, which the doctor must not complain of."""

from __future__ import annotations

import json
from typing import Any

from conftest import CHATML, make_gpt2
from gallery_parts import RULE, RULED, Setup, asked, context, question, rows, sibling, with_template

from opsd import EMATeacher, SameCheckpointTeacher, TopKSignal

# Chat templates and rows as they are in the wild.
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
PHI = CHATML.replace("{% endif %}{% endif %}", "{% endif %}{% else %}{{ eos_token }}{% endif %}")
JSON_TOOLS = CHATML.replace(
    "message['content'] +", "(message['content'] | tojson if message['role'] == 'tool' else message['content']) +"
)
FORGETTING = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
TEXT_TURNS = (
    "{% for message in messages %}{{ message['role'].title() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PLAIN = rows(prompt=question)
TOOLS = rows(
    prompt=lambda r: [
        *asked("Use the clock."),
        {"role": "assistant", "content": "<think>Which?</think>I ask it."},
        {"role": "tool", "content": '{"time": "noon"}\nend'},
        *r["prompt"],
    ]
)
PROCESSES = ("photosynthesis", "thermodynamics", "crystallisation", "electromagnetism")
CHOICES = rows(
    prompt=lambda r: asked(f"{question(r)} Choose: {', '.join(PROCESSES)}."),
    answer=lambda r: PROCESSES[int(r["answer"]) % 4],
)
LATEX = r" Write \frac{{x}}{2} and \text{{abc}}."
PLACES = ("Westphalia in Osnabrueck", "Vienna on the Danube", "Utrecht at the Rhine")
EXTRACT = rows(answer=lambda r: PLACES[int(r["answer"]) % 3])


class ListingTeacher(SameCheckpointTeacher):
    """Lists its five likeliest tokens, as a served teacher does."""

    def score(self, rollouts: Any) -> TopKSignal:
        signal = super().score(rollouts)
        log_p_NV = signal.head.logits(signal.hidden_ND).log_softmax(-1)
        top = log_p_NV.topk(5)
        ids_N = rollouts.scored_ids
        sampled_N = log_p_NV[range(len(ids_N)), ids_N]
        return TopKSignal(top.indices, top.values, sampled_N)


def by_turns(row: dict[str, Any], values: list[str]) -> str:
    return values[len(question(row)) % len(values)]


HEALTHY: dict[str, Setup] = {
    "turns between [INST] marks": Setup(tokenizer=with_template(MISTRAL)),
    "an end of text where nothing is generated": Setup(tokenizer=with_template(PHI)),
    "tools as JSON": Setup(tokenizer=with_template(JSON_TOOLS), rows=TOOLS),
    "history without thoughts": Setup(tokenizer=with_template(FORGETTING), rows=TOOLS),
    "turns in plain words": Setup(RULED.teacher, with_template(TEXT_TURNS), rows=RULE),
    "plain text": Setup(context(), rows=PLAIN),
    "plain text, no chat template": Setup(context(), with_template(None), rows=PLAIN),  # type: ignore[arg-type]
    "choices to pick from": Setup(rows=CHOICES),
    "an answer to be found in one question": Setup(
        rows=[{**r, "prompt": asked(f"{question(r)} {r['answer']}")} if i == 3 else r for i, r in enumerate(EXTRACT)]
    ),
    "fractions in LaTeX": Setup(rows=rows(prompt=lambda r: asked(question(r) + LATEX))),
    "thinking bridged on request": Setup(context(bridge_thinking=True)),
    "checkpointed gradients": Setup(settings={"gradient_checkpointing": True}),
    "a teacher that lists its likeliest tokens": Setup(
        lambda: ListingTeacher(context="answer_only"), settings={"support": "teacher_top_k", "support_k": 5}
    ),
    "a rule in every row": Setup(
        lambda: SameCheckpointTeacher(context="system_rule"), rows=rows(rule=lambda row: "Answer in one word.")
    ),
    "right to left": Setup(rows=rows(prompt=lambda row: asked(f"مرحبا {question(row)}"))),
    "yes and no": Setup(rows=rows(answer=lambda row: by_turns(row, ["yes", "no"]))),
    "labels": Setup(rows=rows(answer=lambda row: by_turns(row, ["positive", "negative", "neutral"]))),
    "a long system turn": Setup(rows=rows(prompt=lambda row: asked(question(row), system="Be kind and brief. " * 9))),
    "a colon inside a text prompt": Setup(context(), rows=rows(prompt=lambda row: f"Note: {question(row)} Say it.")),
    "code as answer": Setup(rows=rows(answer=lambda row: f"def f(x):\n    return x + {row['answer']}")),
    "emoji": Setup(rows=rows(prompt=lambda row: asked(f"{question(row)} 🙂"))),
    "JSON as answer": Setup(rows=rows(answer=lambda row: json.dumps({"answer": row["answer"]}))),
    "one turn of several": Setup(
        rows=rows(prompt=lambda row: [*asked("Hello."), {"role": "assistant", "content": "Hi."}, *row["prompt"]])
    ),
    "GPT-2 and plain text": Setup(context(), with_template(None), make_gpt2, PLAIN),  # type: ignore[arg-type]
    "thinking on both sides": Setup(
        context(chat_template_kwargs={"enable_thinking": True}),
        settings={"chat_template_kwargs": {"enable_thinking": True}},
    ),
    "a wrong hint to contrast with": Setup(
        rows=rows(hint=lambda row: f"Not {row['answer']}."), settings={"contrast_context": "hint"}
    ),
    "a moving average": Setup(lambda: EMATeacher(0.99, context="answer_only")),
    "a sibling": Setup(sibling()),
    "half of the rows off-policy": Setup(
        rows=rows(completion=lambda row: f"It is {row['answer']}."),
        settings={"lmbda": 0.5, "max_completion_length": 24},
    ),
    "groups of two": Setup(settings={"num_generations": 2}),
    "a question asked twice": Setup(rows=[*rows()[:-1], rows()[0]]),
}
