"""Words of all lengths in one batch: ``python docs/examples/sequence_vae.py [--quick] [--out PATH]``.

Words of the standard library's docstrings, a latent vector for each letter, recurrent networks both ways.
``ignore_index`` leaves padding out of the energy, ``latent_mask`` out of the KL, ``batch_dims=2`` gives nats for every
place of every word; the script fails where ten more columns of padding change the free energy or a gradient: by 0.
Held-out words of Python 3.11: 2.49 nats a letter (2.53 by counting which letter follows which), 3.2 where a word has
three letters, 2.1 where it has eleven; 90% of the letters come back right. 80 s on one of two cores. Extra "plots".
"""

import argparse
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from tqdm import tqdm

import fekernels as fe
from fekernels.plots import GREY, panels

LETTERS, PADDING, LATENTS = 26, -100, 8
TRAIN, TEST, PRIOR = 0, 1, 2  # streams of the noise


def words() -> list[Tensor]:
    """Of three to twelve letters, twice or more in docstrings; shuffled."""
    found: Counter[str] = Counter()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for told in re.findall(r'"""(.*?)"""', path.read_text("utf-8", "replace"), re.DOTALL):
            found.update(re.findall(r"\b[a-z]{3,12}\b", told))
    kept = sorted(word for word, count in found.items() if count > 1)
    codes = [torch.tensor(list(word.encode())) - ord("a") for word in kept]
    return [codes[i] for i in torch.randperm(len(codes))]


def padded(batch: list[Tensor], more: int = 0) -> tuple[Tensor, Tensor]:
    """Letters [T, B] and lengths [B], with ``more`` columns of padding than needed."""
    x = pad_sequence(batch, padding_value=PADDING)
    return F.pad(x, (0, 0, 0, more), value=PADDING), torch.tensor([len(word) for word in batch])


class BothWays(nn.Module):  # a recurrent network that ends where each sequence of [T, B, inputs] does
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.recurrent = nn.GRU(inputs, width, bidirectional=True)
        self.linear = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed, _ = self.recurrent(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return self.linear(pad_packed_sequence(packed, total_length=len(x))[0])


class SequenceVAE(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS, 16)
        self.encoder, self.decoder = BothWays(16, width, 2 * LATENTS), BothWays(LATENTS, width, LETTERS)

    def posterior(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(self.letters(x.clamp_min(0)), lengths).chunk(2, 2)

    def free_energy(self, x: Tensor, lengths: Tensor, stream: int, step: int = 0, **options):
        mean, logvar = self.posterior(x, lengths)
        # Time comes first, so that the noise of padding lies behind that of all letters.
        z = fe.reparameterize(mean, logvar, seed=0, stream=stream, step=step)
        return fe.free_energy(
            self.decoder(z, lengths), x, mean, logvar, likelihood="categorical", ignore_index=PADDING,
            latent_mask=(x != PADDING)[..., None], batch_dims=2, **options,
        )  # fmt: skip


def train(model: SequenceVAE, data: list[Tensor], steps: int, size: int = 128) -> None:
    optimizer = fe.LangevinAdam(model.parameters(), lr=3e-3)  # at temperature 0, which is Adam
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), desc="train"):
        x, lengths = padded([data[i] for i in torch.randint(len(data), (size,))])
        beta = min(1.0, 3 * (step + 1) / steps)  # rises, or the decoder would learn to do without z
        terms = model.free_energy(x, lengths, TRAIN, step, beta=beta, reduction="sum")
        optimizer.zero_grad()
        (terms.free_energy / lengths.sum()).backward()  # nats a letter, whatever the padding
        optimizer.step()
        schedule.step()


def check_padding(model: SequenceVAE, batch: list[Tensor]) -> float:
    """The largest difference that ten more columns of padding make to the free energy or a gradient, relatively."""
    found = []
    for more in (0, 10):
        loss = model.free_energy(*padded(batch, more), TEST, reduction="sum").free_energy
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*found, strict=True))


def by_pairs(data: list[Tensor], test: list[Tensor]) -> float:
    """Nats a letter of test words by how often a letter, or the beginning, came before it in data."""
    pairs = torch.ones(LETTERS + 1, LETTERS)
    for word in data:
        pairs.index_put_((F.pad(word, (1, -1), value=LETTERS), word), torch.ones(()), accumulate=True)
    nats = (pairs.sum(1, keepdim=True) / pairs).log()
    return float(torch.cat([nats[F.pad(word, (1, -1), value=LETTERS), word] for word in test]).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps: shows that everything runs")
    parser.add_argument("--out", type=Path, default=Path("sequence_vae.png"), help="where the picture goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # layers this small lose time to a second thread
    torch.manual_seed(0)
    data = words()
    training, test = data[500:], data[:500]
    model = SequenceVAE(32 if arguments.quick else 128)
    train(model, training, 60 if arguments.quick else 1500)
    assert (moved := check_padding(model, test)) < 1e-5
    print(f"ten more columns of padding change free energy and gradients by {moved:.0e}")
    x, lengths = padded(test)
    with torch.no_grad():
        terms = model.free_energy(x, lengths, TEST, reduction="none")  # [T, B]
        again = model.decoder(model.posterior(x, lengths)[0], lengths).argmax(2)
        z = fe.random.normal((12, 10, LATENTS), seed=0, stream=PRIOR)
        made_up = fe.likelihoods.sample("categorical", model.decoder(z, torch.arange(3, 13)), seed=0)
    nats, kl = (float(term.sum() / lengths.sum()) for term in (terms.free_energy, terms.kl))
    print(f"{len(test)} held-out words of {len(data)}: {nats:.3f} nats a letter, KL {kl:.3f}")
    print(f"by counting which letter follows which: {(pairs := by_pairs(training, test)):.3f}")
    figure, (axes,) = panels(1, 3, (12, 3.2))
    for n in range(3, 13):
        of = (lengths == n).nonzero()[:, 0]
        means = [float(each[:n, of].mean()) for each in (terms.free_energy, (again != x).float())]
        three = [bytes(97 + word[:n]).decode() for word in (x[:, of[0]], again[:, of[0]], made_up[:, n - 3])]
        print("{:2d} letters: {:.2f} nats each, {:.3f} wrong; {}, {}, {}".format(n, *means, *three))
        for ax, mean in zip(axes, means, strict=False):
            ax.bar(n, mean, color="#1f5a93")
        axes[2].text(0, 1.16 - n / 11, "{:13} {:13} {}".format(*three), family="monospace", fontsize=9)
    axes[0].axhline(pairs, color=GREY, ls=":")
    axes[2].set_axis_off()
    titles = "nats a letter, by length of a word", "letters that come back wrong", "held-out, again, made up"
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
    figure.savefig(arguments.out, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
