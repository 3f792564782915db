"""The smallest run: the teacher is the student at step 0, frozen, with the answer in its prompt.

Run:    python examples/quickstart.py
Needs:  the Hugging Face Hub once, for a model of 135M parameters; no GPU (a step is about 20 s of one slow core).
"""

import argparse

from datasets import Dataset

from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
parser.add_argument("--output", default="runs/quickstart", help="folder for checkpoints and the trained model")
options = parser.parse_args()

# The student's prompt is `prompt` alone; other columns reach the teacher only, through its context.
sums = [(12, 7), (25, 8), (31, 46), (9, 58), (64, 17), (5, 37), (73, 19), (28, 44)]
rows = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)} for a, b in sums]
)

settings = OPSDConfig(
    output_dir=options.output, max_steps=options.steps, max_completion_length=32, learning_rate=1e-5, report_to="none"
)
teacher = SameCheckpointTeacher(context="answer_only")
trainer = OPSDTrainer(options.model, teacher, args=settings, train_dataset=rows)
trainer.train()
trainer.save_model()
