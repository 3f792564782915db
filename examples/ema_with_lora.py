"""Distil from a moving average of the student's LoRA adapter, with a worked solution in the teacher's prompt.

The teacher starts as the student and moves 5 % of the way towards it after every step. It costs one more adapter in
memory: student and teacher share the base model.

Run:    python examples/ema_with_lora.py
Needs:  the Hugging Face Hub once, for a model of 0.6B parameters; a GPU (it also runs on a CPU, slowly).
"""

import argparse

from datasets import Dataset
from peft import LoraConfig

from opsd import EMATeacher, OPSDConfig, OPSDTrainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="hub id or folder")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
parser.add_argument("--output", default="runs/ema", help="folder for checkpoints and the trained adapter")
options = parser.parse_args()

# question -> worked solution
solved = {
    "A baker makes 24 rolls and sells 17. How many are left?": "Sold rolls are gone: 24 - 17 = 7. 7 are left.",
    "Six boxes hold 8 eggs each. How many eggs is that?": "Each box holds 8, six times over: 6 * 8 = 48 eggs.",
    "Ann is 9. Ben is twice as old. How old are both together?": "Ben is 2 * 9 = 18. Together: 9 + 18 = 27 years.",
    "A film of 95 minutes starts at 18:30. When does it end?": "95 minutes are 1 h 35 min: 18:30 + 1:35 = 20:05.",
}
rows = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": question}], "solution": text} for question, text in solved.items()]
)

trainer = OPSDTrainer(
    model=options.model,
    teacher=EMATeacher(decay=0.95, context="worked_solution"),
    args=OPSDConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        max_completion_length=128,
        chat_template_kwargs={"enable_thinking": False},  # Qwen3 would spend all 128 tokens on thinking
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
