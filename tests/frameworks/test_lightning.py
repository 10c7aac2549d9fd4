"""Inside Lightning: every precision with clipping and accumulation, checkpoints, both kinds of schedules."""

import functools
import importlib.util
import logging
import warnings

import pytest
import torch

import fekernels as fe
from tests.support.tensors import UNIT, bits_equal

# Imported by the first test that runs, because every process of `pytest -n` collects all tests and this takes seconds.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None,
    reason="needs the package lightning, which is not installed",
)
BATCHES, EPOCHS = 8, 2


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * 4, 6, generator=generator)
    y = x[:, :2] - 0.5 * x[:, 2:4]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)


@functools.cache
def module_class():
    import lightning.pytorch

    class Module(lightning.pytorch.LightningModule):
        def __init__(self, make, scheduled=False):
            super().__init__()
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
            self.make, self.scheduled, self.seen = make, scheduled, []

        def training_step(self, batch, index):
            x, y = batch
            group = self.optimizers().param_groups[0]
            self.seen.append((group["lr"], group.get("temperature")))
            return torch.nn.functional.mse_loss(self.net(x.to(self.dtype)).float(), y.float())

        def configure_optimizers(self):
            optimizer = self.make(self.parameters())
            if not self.scheduled:
                return optimizer
            lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20, cycle_momentum=False)
            temperature = fe.optim.CosineTemperature(optimizer, 20)
            return [optimizer], [{"scheduler": s, "interval": "step"} for s in (lr, temperature)]

    return Module


def trainer(folder, precision, epochs=EPOCHS, **options):
    import lightning.pytorch as pl

    how = {"precision": precision}
    if (
        precision == "16-mixed"
    ):  # which Trainer replaces by bf16-mixed on a CPU, unless it is given the plugin
        plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        how = {"plugins": [plugin]}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        gradient_clip_val=0.5, accumulate_grad_batches=2, **how, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*num_workers.*|.*log_every_n_steps.*|.*isinstance.treespec.*"
        )
        yield
    logging.getLogger("lightning.pytorch").setLevel(level)


def weights(module):
    return [p.detach() for p in module.parameters()]


PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_trains_as_adam_does(precision, tmp_path):
    ends = []
    for make in (torch.optim.Adam, fe.LangevinAdam):
        module = module_class()(lambda p, make=make: make(p, lr=0.02))
        run = trainer(tmp_path, precision)
        run.fit(module, data())
        assert run.global_step == EPOCHS * BATCHES // 2
        ends.append(weights(module))
    # Each of the steps differs in rounding, of numbers below 1, and the gradients after it with it.
    unit = torch.finfo(torch.bfloat16).eps / 2 if "bf16" in precision else UNIT
    unit = torch.finfo(torch.float16).eps / 2 if precision == "16-mixed" else unit
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=4 * run.global_step * unit)


MAKERS = {
    "LangevinAdam": lambda p: fe.LangevinAdam(p, lr=0.02, temperature=1e-4, prior_precision=0.1, anchor="init", seed=3),
    "SGLD": lambda p: fe.SGLD(p, lr=0.02, temperature=1e-4, seed=3),
}  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_the_whole_run(name, precision, tmp_path):
    whole, half, resumed = (module_class()(MAKERS[name], scheduled=True) for _ in range(3))
    trainer(tmp_path, precision).fit(whole, data())
    first = trainer(tmp_path, precision, epochs=1)
    first.fit(half, data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, precision).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    assert whole.seen == half.seen + resumed.seen
    lr, temperature = zip(*whole.seen, strict=True)
    assert len(set(lr)) == len(set(temperature)) == EPOCHS * BATCHES // 2
    assert all(bits_equal(p, q) for p, q in zip(weights(whole), weights(resumed), strict=True))
    assert not any(bits_equal(p, q) for p, q in zip(weights(whole), weights(half), strict=True))


def test_in_kernel_unscaling_cannot_be_clipped_as_with_torchs_fused_adam(tmp_path):
    for make in (torch.optim.Adam, fe.LangevinAdam):
        module = module_class()(lambda p, make=make: make(p, lr=0.02, fused=True))
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            trainer(tmp_path, "16-mixed").fit(module, data())


def test_variational_adam_by_the_optimizer_that_lightning_hands_out(tmp_path):
    """``self.optimizers()`` is a wrapper of the optimizer's class, by whose step Lightning counts."""
    import lightning.pytorch as pl

    def optimizer_of(params):
        return fe.VariationalAdam(params, lr=0.05, ess=BATCHES * 4, betas=(0.9, 0.99), seed=3)

    class Module(module_class()):
        automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            with optimizer.sampled_params(train=True):
                self.manual_backward(super().training_step(batch, index))
                if index == 1:
                    with pytest.raises(RuntimeError, match="step must be called outside of sampled_params"):
                        optimizer.step()
            optimizer.step()
            optimizer.zero_grad()

    module = Module(optimizer_of)
    run = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(module, data())
    plain = module_class()(optimizer_of)
    optimizer = optimizer_of(plain.parameters())
    for x, y in data():
        with optimizer.sampled_params(train=True):
            torch.nn.functional.mse_loss(plain.net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.global_step == BATCHES
    assert all(bits_equal(p, q) for p, q in zip(weights(module), weights(plain), strict=True))
