"""Train an adapter by SFT, then the same adapter by on-policy self-distillation.

The teacher of the second stage is the SFT checkpoint, frozen, with the answer in its prompt. It has the style that SFT
trained, so the second stage changes the tokens that the answer makes more or less likely.

Run:    python examples/sharpen_after_sft.py
Needs:  the Hugging Face Hub once, for a model of 135M parameters; no GPU.
"""

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from opsd import OPSDConfig, OPSDTrainer, SameCheckpointTeacher

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each stage")
parser.add_argument("--output", default="runs/sharpened", help="folder for both stages: sft/ and opsd/")
options = parser.parse_args()

# SFT trains on `completion`. opsd samples completions from the student; the teacher's prompt contains `answer`.
sums = [(12, 7), (25, 8), (31, 46), (9, 58), (64, 17), (5, 37), (73, 19), (28, 44)]
rows = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}?"}],
            "completion": [{"role": "assistant", "content": f"The sum is {a + b}."}],
            "answer": str(a + b),
        }
        for a, b in sums
    ]
)
shared = {"max_steps": options.steps, "logging_steps": 1, "report_to": "none"}

sft = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        output_dir=f"{options.output}/sft",
        learning_rate=2e-4,
        bf16=is_torch_bf16_gpu_available(),  # TRL's default, True, is refused without a GPU; OPSDConfig chooses itself
        **shared,
    ),
    train_dataset=rows,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
sft.train()
sft.save_model()

trainer = OPSDTrainer(
    sft,  # its PeftModel with the trained adapter (no new one is made, none is merged), its tokenizer and chat template
    teacher=SameCheckpointTeacher(context="answer_only"),
    args=OPSDConfig(output_dir=f"{options.output}/opsd", max_completion_length=32, learning_rate=1e-4, **shared),
    train_dataset=rows,
)
trainer.train()
trainer.save_model()
