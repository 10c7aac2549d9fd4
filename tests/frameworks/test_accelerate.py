"""Inside Accelerate and Hugging Face's Trainer: accumulation, schedules, and runs that are stopped and resumed."""

import runpy

import pytest
import torch

import fekernels as fe
from tests.support import ROOT
from tests.support.tensors import bits_equal

MAKERS = {
    "LangevinAdam": lambda p: fe.LangevinAdam(p, lr=0.02, temperature=1e-4, prior_precision=0.1, anchor="init", seed=3),
    "SGLD": lambda p: fe.SGLD(p, lr=0.02, temperature=1e-4, seed=3),
}  # fmt: skip
ROWS, EPOCHS = 32, 2


class Data(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 6, generator=generator)
        self.y = self.x[:, :2] - 0.5 * self.x[:, 2:4]

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.net(x), labels)}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(bits_equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip(
        "accelerate", reason="needs the package accelerate, which is not installed"
    )

    def make(precision="no"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(make, accelerator, scheduled=True):
    model = Model()
    optimizer = make(model.parameters())
    schedules = []
    if scheduled:
        schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40),
            fe.optim.CosineTemperature(optimizer, 40),
        ]
    loader = torch.utils.data.DataLoader(Data(), batch_size=4)
    return accelerator.prepare(model, optimizer, loader, *schedules)


def train(accelerator, model, optimizer, loader, *schedules, epochs):
    seen = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                group = optimizer.param_groups[0]
                seen.append((group["lr"], group.get("temperature")))
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                for schedule in schedules:
                    schedule.step()
                optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_state_that_accelerate_saved_goes_on_bit_for_bit(name, precision, accelerator, tmp_path):
    whole = accelerator(precision)
    run = prepared(MAKERS[name], whole)
    seen = train(whole, *run, epochs=EPOCHS)
    steps = ROWS // 4 // 2 * EPOCHS
    assert all(int(state["step"]) == steps for state in run[1].optimizer.state.values())
    assert all(len(set(values)) == steps for values in zip(*seen, strict=True))

    half = accelerator(precision)
    first = prepared(MAKERS[name], half)
    seen_first = train(half, *first, epochs=1)
    half.save_state(str(tmp_path))
    stopped = weights(first[0])

    resumed = accelerator(precision)
    second = prepared(MAKERS[name], resumed)
    resumed.load_state(str(tmp_path))
    assert seen == seen_first + train(resumed, *second, epochs=1)
    assert same(weights(run[0]), weights(second[0])) and not same(weights(run[0]), stopped)


def test_accelerate_trains_as_with_adam(accelerator):
    ends = []
    for make in (torch.optim.Adam, fe.LangevinAdam):
        here = accelerator()
        run = prepared(lambda p, make=make: make(p, lr=0.02), here, scheduled=False)
        train(here, *run, epochs=1)
        ends.append(weights(run[0]))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_example_counts_steps_and_not_accumulated_batches(accelerator, tmp_path):
    """Lightning and Trainer count by themselves. Of batches, a sample would be kept several times."""
    pytest.importorskip("sklearn", reason="needs the package scikit-learn, which is not installed")
    accelerator()
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "trainer_accelerate.py"))
    generator, steps = torch.Generator().manual_seed(0), 12
    rows = torch.utils.data.TensorDataset(
        torch.randn(400, 64, generator=generator), torch.randint(10, (400,), generator=generator)
    )
    # Stopped in the second of three epochs, each of four steps of two batches.
    whole, stopped, resumed = (
        example["run"](rows, steps, tmp_path / folder, **given)
        for folder, given in (("whole", {}), ("halves", {"stop": 6}), ("halves", {"resume": True}))
    )
    for (here, _, samples), last in ((whole, steps), (stopped, steps // 2), (resumed, steps)):
        assert here.gradient_accumulation_steps == example["PARTS"] == 2
        states = here._optimizers[0].optimizer.state.values()
        assert {int(state["step"]) for state in states} == {samples.calls} == {last}
    assert same(whole[1].parameters(), resumed[1].parameters())
    assert len(whole[2]) == len(resumed[2]) == (steps - steps // 3) // 7
    assert all(same(a.values(), b.values()) for a, b in zip(whole[2], resumed[2], strict=True))


def variational(params):
    return fe.VariationalAdam(params, lr=0.05, ess=ROWS, betas=(0.9, 0.99), seed=3)


def two_schedules(optimizer):
    """A Trainer takes one."""
    lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return torch.optim.lr_scheduler.ChainedScheduler([lr, fe.optim.ConstantTemperature(optimizer, burn_in=3)])


def trainer(kind, folder, **options):
    transformers = pytest.importorskip(
        "transformers", reason="needs the package transformers, which is not installed"
    )

    class Sampled(transformers.Trainer):
        def training_step(self, *arguments):
            with self.optimizer.optimizer.sampled_params(train=True):
                return super().training_step(*arguments)

    class Scheduled(transformers.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = fe.optim.ConstantTemperature(optimizer or self.optimizer, burn_in=3)
            return self.lr_scheduler

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", seed=0, weight_decay=0.1,
        max_grad_norm=0.0 if kind == "VariationalAdam" else 1.0, **options,
    )  # fmt: skip
    model = Model()
    given = {"model": model, "args": arguments, "train_dataset": Data()}
    if kind == "by its class":  # weights decay, biases do not
        return Scheduled(
            **given, optimizer_cls_and_kwargs=(fe.LangevinAdam, dict(lr=0.02, temperature=1e-4, seed=3))
        )
    if kind == "VariationalAdam":
        optimizer = variational(model.parameters())
        made = Sampled(**given, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)))
        made.loss_is_scaled_for_ga = True  # a step is the mean over its draws
        return made
    optimizer = MAKERS[kind](model.parameters())
    return transformers.Trainer(**given, optimizers=(optimizer, two_schedules(optimizer)))


@pytest.mark.parametrize("kind", [*MAKERS, "by its class", "VariationalAdam"])
def test_a_trainer_resumes_bit_for_bit(kind, accelerator, tmp_path):
    whole = trainer(kind, tmp_path / "whole", save_strategy="steps", save_steps=2)
    assert whole.train().global_step == ROWS // 8
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert checkpoint.is_dir()
    resumed = trainer(kind, tmp_path / "resumed", save_strategy="no")
    assert resumed.train(resume_from_checkpoint=str(checkpoint)).global_step == ROWS // 8
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(Model()))
    groups = resumed.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == {
        "by its class": [0.1, 0.0],
        "VariationalAdam": [1e-4],
    }.get(kind, [0.0])
    if kind != "VariationalAdam":  # the third of the four steps was the last cold one
        assert groups[0]["temperature"] == 1e-4 and (groups[0]["lr"] < 0.02) == (kind in MAKERS)


def test_draws_of_accumulated_batches_are_those_of_a_plain_loop(accelerator, tmp_path):
    run = trainer("VariationalAdam", tmp_path, save_strategy="no")
    seen = []
    run.model.register_forward_pre_hook(
        lambda _, __, batch: seen.append({key: batch[key] for key in ("x", "labels")}), with_kwargs=True
    )
    run.train()
    model = Model()
    optimizer = variational(model.parameters())
    for i in range(0, len(seen), 2):
        for batch in seen[i : i + 2]:
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                model(**batch)["loss"].backward()
        optimizer.step()
    assert len(seen) == ROWS // 4 and same(weights(run.model), weights(model))
