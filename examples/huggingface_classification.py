"""Hugging Face: fine-tunes a MobileNet in Trainer, two images at a time; the one line is the callback.

python examples/huggingface_classification.py              # --norm bn or frozen to compare

The callback converts at the end of Trainer.__init__, behind from_pretrained and before optimizer, accelerator and
torch.compile. Checkpoints hold the windows beside the plain weights, so resume_from_checkpoint resumes to the bit.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from common import arguments, network, photos, say
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

import cbn_convert as cbn
from cbn_convert.integrations.huggingface import CbnCallback


def pretrained(args: Any) -> Any:
    """Stands for TimmWrapperForImageClassification.from_pretrained(..), or any other model of transformers."""
    config = TimmWrapperConfig(architecture="mobilenetv2_035", num_labels=10, model_args={"pad_type": "same"})
    model = TimmWrapperForImageClassification(config)
    model.timm_model = network(args)
    return model


def collate(pairs: Any) -> dict[str, Any]:
    """What the model's forward method takes."""
    return {"pixel_values": torch.stack([x for x, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])}


def top1(prediction: Any) -> dict[str, float]:
    """In percent."""
    return {"top1": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    """Trains, evaluates, folds."""
    args = arguments(__doc__, steps=600, lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=2, per_device_eval_batch_size=32,
            learning_rate=args.lr, lr_scheduler_type="cosine", optim="sgd", optim_args="momentum=0.9",
            max_grad_norm=5.0, save_strategy="no", logging_strategy="no", use_cpu=True, report_to=[],
            disable_tqdm=True, seed=args.seed,
        )  # fmt: skip
        trainer = Trainer(
            pretrained(args), settings, train_dataset=photos(args, "train"), eval_dataset=photos(args, "val"),
            data_collator=collate, compute_metrics=top1,
            callbacks=[CbnCallback()] if args.norm == "cbn" else [],  # the one line
        )  # fmt: skip
        trainer.train()
        value = trainer.evaluate()["eval_top1"]
    if args.norm == "cbn":
        cbn.fold(trainer.model)  # a copy without norm layers, for deployment
    say(args, "top-1 [%]", value, "308 photos of hands")


if __name__ == "__main__":
    main()
