"""Distil a larger model of the same family: it scores every token that the small model samples.

The teacher has the student's own prompt, so rows need no answers. Both models must have the same tokenizer; this is
checked before the first step.

Run:    python examples/sibling.py
Needs:  the Hugging Face Hub once, for models of 0.6B and 1.7B parameters; a GPU (weights and optimizer: 13 GB).
"""

import argparse

from datasets import Dataset

from opsd import OPSDConfig, OPSDTrainer, SiblingTeacher

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="the student: hub id or folder")
parser.add_argument("--teacher", default="Qwen/Qwen3-1.7B", help="its larger sibling: hub id or folder")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
parser.add_argument("--output", default="runs/sibling", help="folder for checkpoints and the trained model")
options = parser.parse_args()

questions = [
    "What is 17 * 6? Show your steps.",
    "A train covers 90 km in 45 minutes. How fast is it in km/h?",
    "Share 84 apples among 7 children. How many does each get?",
    "What is a third of 126, plus 8?",
]
rows = Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions])

trainer = OPSDTrainer(
    model=options.model,
    # A sibling takes a context as well, for example with a column `hint` in the rows:
    # teacher=SiblingTeacher(options.teacher, context="hint"),
    teacher=SiblingTeacher(options.teacher),
    args=OPSDConfig(
        output_dir=options.output,
        beta=1.0,  # reverse KL(student ‖ teacher); 0 is the forward KL, between them the generalised JSD
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_completion_length=128,
        chat_template_kwargs={"enable_thinking": False},  # Qwen3 would spend all 128 tokens on thinking
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
)
trainer.train()
trainer.save_model()
