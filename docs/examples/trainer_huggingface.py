"""Sampling inside Hugging Face's Trainer: ``python docs/examples/trainer_huggingface.py [--quick]``.

A small BERT that reads scikit-learn's digits as 64 grey levels, made from its configuration (nothing is downloaded), is
trained by Adam, then sampled at T = 1/N, its samples collected by a callback. The run is done twice: as a whole, and
stopped within an epoch and resumed by a new Trainer with a new model and a new optimizer, which ends at the same bits.
Three places differ from a script for Adam; they are marked. It runs on several processes too, where all need to know
one folder:

    torchrun --nproc-per-node 2 docs/examples/trainer_huggingface.py --folder runs

Needs the packages transformers, accelerate and scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import fekernels as fe

N, BATCH, LR = 1400, 100, 3e-3


class Digits(Dataset):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x[i], "labels": self.y[i]}


class Collect(TrainerCallback):
    """3. The samples. global_step counts steps of the optimizer, whatever is accumulated, also of a resumed run."""

    def __init__(self, samples: fe.PosteriorSamples) -> None:
        self.samples = samples

    def on_step_end(self, args: TrainingArguments, state: object, control: object, **_: object) -> None:
        if state.is_world_process_zero:  # replicas are equal to the bit: one of them collects
            self.samples.update(step=state.global_step)


def run(
    rows: Digits, steps: int, folder: Path, stop: int | None = None, resume: bool = False
) -> tuple[Trainer, fe.PosteriorSamples]:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=17, max_position_embeddings=64, num_labels=10, hidden_size=32, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )  # fmt: skip
    # The Trainer takes a model with keyword arguments for one whose loss is a sum over all that a step sees, divided by
    # their number. A classifier's is a mean: with this its gradients are not too large by the number of processes and
    # of accumulated batches, which Adam would not mind and a sampler takes for so many times the data.
    model.accepts_loss_kwargs = False
    # 1. The optimizer: of a mean loss over N rows, T = 1/N is the posterior. The prior is N(first weight, 1/25),
    # as one about pretrained weights would be.
    optimizer = fe.LangevinAdam(
        model.parameters(), lr=LR, temperature=1 / N, prior_precision=25 / N, anchor="init", seed=0
    )
    # 2. Its temperature: Adam first. The Trainer takes one schedule, and steps it with the optimizer.
    temperature = fe.optim.ConstantTemperature(optimizer, burn_in=steps // 4)
    samples = fe.PosteriorSamples(model, burn_in=steps // 3, thinning=7, directory=folder / "samples")
    arguments = TrainingArguments(
        str(folder), max_steps=stop or steps, per_device_train_batch_size=BATCH // WORLD, seed=0, use_cpu=True,
        max_grad_norm=0.0,  # clipped gradients, the default, are those of another posterior
        logging_strategy="no", save_strategy="steps", save_steps=stop or steps, report_to=[],
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(optimizer, temperature),
        callbacks=[Collect(samples)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, samples


WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 steps instead of 600")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)  # layers this small lose time to a second thread
    warnings.filterwarnings("ignore", message=".*samples are worth about.*|.*pin_memory.*")

    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.long), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:N], order[N:]
    steps = 20 if options.quick else 600
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = options.folder or Path(temporary), Digits(x[train], y[train])
        trainer, samples = run(rows, steps, folder / "whole")
        run(rows, steps, folder / "resumed", stop=steps // 2)
        again, others = run(rows, steps, folder / "resumed", resume=True)

        rank, model = trainer.args.process_index, trainer.model
        same = all(
            torch.equal(p, q) for p, q in zip(model.parameters(), again.model.parameters(), strict=True)
        )
        print(f"rank {rank} of {WORLD}: the resumed run's weights are equal to the bit: {same}")
        if rank == 0:
            with torch.no_grad():
                last = F.cross_entropy(model.eval()(x[test]).logits, y[test])
            average = F.nll_loss(samples.predict(x[test], output="logits").log_mean, y[test])
            print(f"test NLL: last weights {last:.4f}, average of {len(samples)} samples {average:.4f}")
            same &= all(torch.equal(a[k], b[k]) for a, b in zip(samples, others, strict=True) for k in a)
            print(f"the resumed run's {len(others)} samples are equal to the bit: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
