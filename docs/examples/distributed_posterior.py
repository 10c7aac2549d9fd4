"""Posterior samples from several processes: chains split over ranks, one report, every rank predicts its rows.

    torchrun --nproc-per-node 4 docs/examples/distributed_posterior.py      # gloo on CPUs, NCCL on GPUs
    python docs/examples/distributed_posterior.py                           # the same samples, in one process

scikit-learn's breast cancer data: 569 tumours, 30 measurements each, benign or malignant. A logistic regression, whose
posterior is wide: what it does not know shows as mutual information on the tumours that the chains disagree about.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fekernels as fe

Batch = tuple[Tensor, Tensor]


def tumours(device: torch.device) -> tuple[Batch, Batch]:
    """Standardised measurements with classes, to learn from and to predict; the same split on every rank."""
    from sklearn.datasets import load_breast_cancer

    data, target = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32), torch.tensor(target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].to(device), y[order].to(device)
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    return (x[:400], y[:400]), (x[400:], y[400:])


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(data: Batch) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(30, 2).to(data[0].device)
    optimizer = fe.LangevinAdam(model.parameters(), lr=0.05, prior_precision=1 / len(data[0]))
    for _ in range(300):
        optimizer.zero_grad()
        loss_fn(model, data).backward()
        optimizer.step()
    return model


def all_rows(mine: Tensor, sizes: list[int]) -> Tensor:
    """[rows of all ranks, ...] from each rank's."""
    if len(sizes) == 1:
        return mine
    most = max(sizes)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100, help="of each chain")
    parser.add_argument("--directory", help="keep the samples there, each rank those of its chains")
    parser.add_argument("--quick", action="store_true", help="few steps, not to be believed")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if gpu else "cpu")
    alone = not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    if rank or options.quick:
        warnings.simplefilter("ignore")  # what rank 0 says is said once

    data, (x, y) = tumours(device)
    loader = list(zip(data[0].split(50), data[1].split(50), strict=True))  # all the data, on every rank
    begun = time.perf_counter()
    run = fe.sample_posterior(
        trained(data), loss_fn, loader, data_size=len(data[0]), prior_precision=1.0, chains=options.chains, seed=0,
        samples=4 if options.quick else options.samples, burn_in=20 if options.quick else None,
        thinning=1 if options.quick else None, directory=options.directory, progress=not options.quick,
    )  # fmt: skip
    seconds = time.perf_counter() - begun

    # Prediction sends nothing: each rank has all samples and takes its rows.
    shares = [range(k * len(x) // ranks, (k + 1) * len(x) // ranks) for k in range(ranks)]
    mine = shares[rank]
    prediction = run.samples.predict(x[mine.start : mine.stop])
    information = prediction.mutual_information
    assert information is not None
    sizes = [len(share) for share in shares]
    mean, unknown = all_rows(prediction.mean, sizes), all_rows(information, sizes)

    if rank == 0:
        print(run.report)
        right = mean.argmax(1) == y
        print(
            f"\n{len(run.samples)} samples by {ranks} processes in {seconds:.1f} s; {len(y)} tumours, held out:"
        )
        print(f"{'mutual information':>20} {'tumours':>8} {'right':>7} {'log loss':>9}")
        order = unknown.argsort()
        for name, part in zip(("lowest half", "next quarter", "highest quarter"), order.tensor_split(
            [len(y) // 2, 3 * len(y) // 4]
        ), strict=True):  # fmt: skip
            log_loss = F.nll_loss(mean[part].log(), y[part])
            print(f"{name:>20} {len(part):>8} {right[part].double().mean():>7.1%} {log_loss:>9.3f}")
    if not alone:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
