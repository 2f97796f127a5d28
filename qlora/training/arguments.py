"""The recipe's section `training` as arguments of transformers' TrainingArguments."""

from __future__ import annotations

import math


def arguments_of(training, output_dir, device, evaluates):
    """Return {name: value} for the TrainingArguments of any objective. evaluates: there are held-out rows."""
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": training.num_train_epochs,
        "max_steps": -1 if training.max_steps is None else training.max_steps,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "optim": training.optim,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_ratio,  # a float below 1 is a share of the steps
        "weight_decay": training.weight_decay,
        # the norm is computed in any case: it tells whether a step is finite
        "max_grad_norm": training.max_grad_norm or math.inf,  # 0 is no clipping too, as in transformers
        "logging_steps": training.logging_steps,
        "logging_nan_inf_filter": False,  # the default logs 0.0 for a loss that is not finite
        "eval_strategy": "steps" if evaluates and training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "no",
        "seed": training.seed,
        "prediction_loss_only": True,  # an evaluation that kept logits would hold vocabulary * tokens of them
        "bf16": False,  # autocast off: the model is bf16 throughout, and autocast would only add copies
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {
            "non_blocking": device.type == "cuda"
        },  # the host need not wait for copies of pinned memory
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }
