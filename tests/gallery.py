"""Set-ups that are broken as users broke them, each with its healthy twin; `test_gallery.py` shows them to the doctor.

The source of each is an entry of the field's bug trackers or papers. `gallery_parts.py` has what they are made of.
"""

from __future__ import annotations

from conftest import CHATML, make_llama, make_rows, make_tokenizer
from gallery_parts import (
    DEFAULT,
    DROPPING,
    HEADLESS,
    LONG,
    MERGING,
    OTHER_END,
    ROWS,
    RULE,
    RULED,
    SHORTENING,
    USUAL,
    VERL,
    Case,
    Setup,
    asked,
    colder,
    context,
    cutting,
    long_word,
    nested,
    picky,
    question,
    resized,
    restless,
    rows,
    shifted,
    sibling,
    taught,
    with_begin,
    with_template,
)

from opsd import EMATeacher, LiveTeacher, SameCheckpointTeacher

GALLERY: dict[str, Case] = {
    "thinking on one side only": Case(
        "siyan-zhao/OPSD #3, #10; tinker-cookbook #796",
        Setup(context(chat_template_kwargs={"enable_thinking": True})),
        Setup(
            context(chat_template_kwargs={"enable_thinking": True}),
            settings={"chat_template_kwargs": {"enable_thinking": True}},
        ),
        "tokenizers",
        "one answers at once|one thinks and the other does not|thinks and the other",
    ),
    "a thinking teacher grades plain answers": Case(
        "tinker-cookbook #796: teacher bias at the first tokens; siyan-zhao/OPSD #10, #16, #18",
        Setup(
            context(chat_template_kwargs={"enable_thinking": True}),
            model=taught,
            settings={"max_completion_length": 9},
        ),
        Setup(context(), model=taught, settings={"max_completion_length": 9}),
        "divergence",
        "open answers differently",
    ),
    "teacher prompt cut from the left": Case(
        "TRL PR 5862, 5883: the SDFT teacher's prompt cut to the student's limit",
        Setup(tokenizer=cutting(40, "left")),
        Setup(tokenizer=cutting(400, "left")),
        "prompts",
        "user turn was cut from the left",
        "fail",
    ),
    "assistant's header cut from the right": Case(
        "siyan-zhao/OPSD: right truncation at max_length; lasgroup/SDPO: max_reprompt_len",
        Setup(tokenizer=cutting(40, "right")),
        Setup(tokenizer=cutting(400, "right")),
        "prompts",
        "the assistant's header was cut",
        "fail",
    ),
    "a chat template that shortens turns": Case(
        "TRL SDFT: the question or the head of the template vanishes silently",
        Setup(tokenizer=with_template(SHORTENING)),
        USUAL,
        "prompts",
        "was cut from the left",
        "fail",
    ),
    "a chat template without a generation prompt": Case(
        "verl #6833: the solution lands inside the assistant's turn",
        Setup(tokenizer=with_template(HEADLESS)),
        USUAL,
        "tokenizers",
        "writes no generation prompt",
        "fail",
    ),
    "two first tokens": Case(
        "prime-rl's opsd: a second BOS for tokenizers that add one",
        Setup(context(), with_begin(True), rows=rows(prompt=lambda row: "<|im_start|>" + question(row))),
        Setup(context(), with_begin(True), rows=rows(prompt=question)),
        "tokenizers",
        "begin with '<|im_start|>' twice",
        "fail",
    ),
    "system turn merged into the user's": Case(
        "prime-rl's opsd: templates that allow only one system message; Gemma has none",
        Setup(RULED.teacher, with_template(MERGING), rows=RULE),
        RULED,
        "prompts",
        "merges the system turn into the user's",
    ),
    "system turn dropped": Case(
        "the same, where the template ignores the role",
        Setup(RULED.teacher, with_template(DROPPING), rows=RULE),
        RULED,
        "prompts",
        "system turn is missing",
        "fail",
    ),
    "a system turn that only the student has": Case(
        "Qwen2.5 and SmolLM2: a default system turn, which a rule for the teacher takes the place of",
        Setup(RULED.teacher, with_template(DEFAULT), rows=RULE),
        Setup(RULED.teacher, with_template(DEFAULT), rows=RULE, settings={"student_system_prompt": "You help."}),
        "prompts",
        "has a default system turn.*You help",
    ),
    "turns end where sampling does not stop": Case(
        "modelscope/ms-swift #9526; a base model with a chat template of its own",
        Setup(tokenizer=with_template(OTHER_END)),
        USUAL,
        "tokenizers",
        "ends an assistant's turn with '<|pad|>', and sampling stops at <|im_end|> only",
    ),
    "the two models end their answers differently": Case(
        "modelscope/ms-swift #9526; arXiv 2609.20511: EOS disagreement",
        Setup(sibling(eos=0)),
        Setup(sibling()),
        "tokenizers",
        "the teacher ends its answers with <|pad|>",
    ),
    "a padded head that samples its padding": Case(
        "huggingface/trl #2215, #3028: 151,936 and 152,064",
        Setup(model=resized(448, lively=1.0)),
        Setup(model=make_llama),
        "tokenizers",
        "padded by 48 rows.*ids without a token will be sampled",
    ),
    "a head smaller than the vocabulary": Case(
        "huggingface/trl PR 6252: verify ids, not just sizes; tokens added after training",
        Setup(model=resized(380), rows=make_rows(ROWS)),
        USUAL,
        "settings",
        "the model embeds 380",
        "fail",
    ),
    "another vocabulary of the same size": Case(
        "huggingface/trl #2215, #3028; LMOps PR 331; torchtune #2119",
        Setup(sibling(tokenizer=lambda: shifted(make_tokenizer()))),
        Setup(sibling()),
        "settings",
        "TokenizerMismatchError.*must share a tokenizer",
        "fail",
    ),
    "another chat template": Case(
        "Thinking-Space/Rethinking-OPD #23: format errors rise after distillation with another template",
        Setup(sibling(tokenizer=with_template(CHATML.replace("'\n' + message", "': ' + message")))),
        Setup(sibling()),
        "settings|tokenizers",
        "differ(ent)? in their chat templates|different chat templates",
    ),
    "rollouts from another distribution": Case(
        "huggingface/transformers #42762: a checkpoint's min_p reached rollouts; here the user's own",
        Setup(settings={"min_p": 0.3, "max_completion_length": 16}),
        Setup(model=picky, settings={"max_completion_length": 16}),
        "sampling",
        "not samples of the student's own distribution.*min_p 0.3 reshape",
    ),
    "a cache that changes what is sampled": Case(
        "models whose cache or custom generate disagrees with their forward pass",
        Setup(model=colder, settings={"max_completion_length": 16}),
        Setup(settings={"max_completion_length": 16}),
        "sampling",
        "`generate` and its forward pass give different probabilities",
        "fail",
    ),
    "a teacher out of its depth": Case(
        "arXiv 2604.13016: needs compatible thinking patterns; a broken alignment looks the same",
        Setup(sibling(near=False)),
        Setup(sibling()),
        "divergence",
        "disagree about ordinary tokens",
    ),
    "the solution in the student's prompt": Case(
        "the small-scale repository study of answer leaks; RLSD, arXiv 2604.03128",
        Setup(
            context("{{ prompt }} {{ solution }}"), rows=rows(prompt=lambda r: asked(f"{question(r)} {r['solution']}"))
        ),
        Setup(context("{{ prompt }} {{ solution }}")),
        "leaks",
        "contains all of 'solution' in 16 of 16 rows",
        "fail",
    ),
    "the answer in the question": Case(
        "the same, with an answer too short to look for as text",
        Setup(
            rows=rows(prompt=lambda r: asked(f"{question(r)} (reference {r['answer']})"), answer=lambda r: r["answer"])
        ),
        USUAL,
        "leaks",
        "gives its answer away",
    ),
    "the solution in other words' spacing": Case(
        "the same, where a prompt was wrapped or put in capitals",
        Setup(
            context("{{ prompt }} {{ solution }}"),
            rows=rows(prompt=lambda r: asked(f"{question(r)}\n{r['solution'].upper().replace(' ', '  ')}")),
        ),
        Setup(context("{{ prompt }} {{ solution }}")),
        "leaks",
        "contains all of 'solution' in 16 of 16 rows",
        "fail",
    ),
    "a word of an answer in the question": Case(
        "the same, where an answer is one long word: it may be a choice to pick from",
        Setup(rows=rows(answer=long_word, prompt=lambda r: asked(f"{question(r)} {long_word(r)}"))),
        Setup(rows=rows(answer=long_word)),
        "leaks",
        "gives its answer away",
    ),
    "a nested answer in the question": Case(
        "verl's rows: the answer stands in reward_model.ground_truth",
        Setup(
            lambda: SameCheckpointTeacher(context=VERL),
            rows=rows(reward_model=nested, prompt=lambda r: asked(f"{r['answer']}?")),
        ),
        Setup(lambda: SameCheckpointTeacher(context=VERL), rows=rows(reward_model=nested)),
        "leaks",
        "the prompt contains its own 'reward_model.ground_truth' in",
    ),
    "the answer in the system turn": Case(
        "a system turn per row, made from the row's own columns",
        Setup(rows=rows(prompt=lambda r: asked(question(r), system=f"The reference answer is {r['answer']}."))),
        Setup(rows=rows(prompt=lambda r: asked(question(r), system="Be kind."))),
        "leaks",
        "gives its answer away",
    ),
    "the answer in the assistant's mouth": Case(
        "verl #6833: the solution lands inside the assistant turn by default",
        Setup(context(more="{% block assistant %}The answer is {{ answer }}. {% endblock %}")),
        Setup(context(more="{% block system %}The answer is {{ answer }}.{% endblock %}")),
        "leaks",
        "puts answer into the assistant's prefill",
    ),
    "a context that is always empty": Case(
        "NousResearch/atropos #456: teacher data dropped is a no-op; TRL PR 5573",
        Setup(context("{{ prompt }}{% if answer | length > 99 %} It is {{ answer }}.{% endif %}")),
        Setup(context("{{ prompt }}{% if answer | length < 99 %} It is {{ answer }}.{% endif %}")),
        "prompts",
        "the context is always empty",
        "fail",
    ),
    "a context that is empty in some rows": Case(
        "TRL SDFT: rows without context; ms-swift: batches where some rows have a teacher_prompt",
        Setup(context("{{ prompt }}{% if domain == 'odd' %} It is {{ answer }}.{% endif %}")),
        Setup(context("{{ prompt }}{% if domain != 'x' %} It is {{ answer }}.{% endif %}")),
        "prompts",
        "equals the student's in 8 of 16 prompts",
    ),
    "an average the wrong way round": Case(
        "TRL PR 4935: the EMA's rate inverted; PR 5862: an update rate of 0.6 by default",
        Setup(lambda: EMATeacher(0.01, context="answer_only")),
        Setup(lambda: EMATeacher(0.99, context="answer_only")),
        "environment",
        "what SDPO and TRL call an update rate|What SDPO and TRL call an update rate",
    ),
    "a live teacher": Case(
        "siyan-zhao/OPSD #21: very unstable",
        Setup(lambda: LiveTeacher(context="answer_only")),
        USUAL,
        "environment",
        "drifts with its student",
    ),
    "messages printed as Python prints them": Case(
        "TRL PR 5990: conversational contexts stringified",
        Setup(context("{{ prompt }} {{ talk }}"), rows=rows(talk=lambda r: str(asked(r["solution"])))),
        Setup(context("{{ prompt }} {{ talk }}"), rows=rows(talk=lambda r: asked(r["solution"]))),
        "prompts",
        "as Python prints them",
        "fail",
    ),
    "a template without the question": Case(
        "TRL SDFT: the question cut away; a template written from memory",
        Setup(context("The answer is {{ answer }}. Say it.")),
        Setup(context("{{ prompt }} The answer is {{ answer }}. Say it.")),
        "prompts",
        "leaves out the question in 16 rows",
    ),
    "a placeholder that nobody filled": Case(
        "str.format templates of TRL, SDPO and prime-rl: a field that is no field",
        Setup(rows=rows(prompt=lambda r: asked(question(r) + " Use {{ hint }}."))),
        USUAL,
        "prompts",
        "contain the literal text",
    ),
    "most contexts shortened": Case(
        "modelscope/ms-swift #6956; SDPO's reprompts at max_reprompt_len",
        Setup(context("{{ prompt }} {{ solution }}", truncate="solution", max_prompt_tokens=70), rows=LONG),
        Setup(context("{{ prompt }} {{ solution }}", truncate="solution", max_prompt_tokens=400), rows=LONG),
        "prompts",
        "shortened in",
    ),
    "a prompt longer than the model": Case(
        "siyan-zhao/OPSD #22, #30; a completion behind a prompt that fills the context",
        Setup(rows=rows(solution=lambda r: "word " * 600), teacher=context("{{ prompt }} {{ solution }}")),
        Setup(rows=rows(solution=lambda r: "word " * 60), teacher=context("{{ prompt }} {{ solution }}")),
        "settings",
        "together more than the 512 tokens",
        "fail",
    ),
    "a keyword that no template reads": Case(
        "QwenLM's enable_thinking on a model that has none; a misspelt keyword",
        Setup(settings={"chat_template_kwargs": {"enable_thinkng": True}}),
        Setup(settings={"chat_template_kwargs": {"enable_thinking": True}}),
        "tokenizers",
        "does not read enable_thinkng",
    ),
    "a column that the template needs and nobody has": Case(
        "huggingface/trl #5741: a privileged column under another name",
        Setup(lambda: SameCheckpointTeacher(context="hint")),
        Setup(lambda: SameCheckpointTeacher(context="hint"), rows=rows(hint=lambda r: "Count on.")),
        "settings",
        "needs the column 'hint'",
        "fail",
    ),
    "dropout in training": Case(
        "TRL leaves dropout on; two passes of one LoRA model moved by half a nat",
        Setup(model=lambda: make_llama(attention_dropout=0.3).eval(), settings={"disable_dropout": False}),
        Setup(model=lambda: make_llama(attention_dropout=0.3)),
        "alignment",
        "without a context the teacher is the student, and KL is",
    ),
    "a forward pass that is never the same twice": Case(
        "noise in a layer of one's own that eval mode does not switch off",
        Setup(model=lambda: restless(make_llama(0))),
        USUAL,
        "settings",
        "UnsupportedModelError",
        "fail",
    ),
}


# Chat templates and rows as they are in the wild, which the doctor must not complain of.
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
}
