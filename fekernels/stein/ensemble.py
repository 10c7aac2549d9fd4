"""A repulsive ensemble: the weights of several copies of a network as the particles of `fe.SVGD`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fekernels import random
from fekernels._catalogue.random import LANGEVIN_NOISE
from fekernels._checks import integer, number
from fekernels._runtime.agreement import Agreement
from fekernels._runtime.parts import check_unsharded
from fekernels._runtime.ranks import draw_seed, group_of
from fekernels.posterior.model_average import Activation, Average, Prediction
from fekernels.posterior.model_calls import Pick, as_inputs, call, check_pick, pick
from fekernels.stein.svgd import SVGD
from fekernels.stein.target import State, Target

__all__ = ["SVGDEnsemble"]

INITIAL = 2  # stream: noise and groups of the same seed are streams 0 and 1


class SVGDEnsemble(SVGD):
    """Copies of one network that repel each other (D'Angelo & Fortuin 2021, arXiv:2106.11642).

    Particle k holds the weights of member k, flattened. Its log-density is -loss - prior_precision/2 |weights|^2. With
    a loss summed over the data that is Bayes' posterior; with a mean loss over N data points, `temperature=1/N` and
    a prior divided by N make it that, as for `fe.LangevinAdam`. `bandwidth=0` switches all interaction off: a plain
    ensemble of MAP estimates.

        ensemble = fe.SVGD.from_model(make_model, F.cross_entropy, size=16, temperature=1 / N, prior_precision=1 / N)
        ensemble.run(2000, batches=loader)  # or ensemble.step(x, y)
        ensemble.predict(test_x).mean

    Args:
        model: a function that makes a member; or a module, whose copies get new weights by the `reset_parameters` of
            its parts; or a sequence of modules, the members as they are. In the mode (train or eval) that it comes in.
        loss: called as loss(model(x), *targets) with the arguments (x, *targets) of `step`; returns a scalar.
        size: number of members, for a function or a module.
        prior_precision: of a Gaussian prior around 0 on each weight, in units of the loss.
        chunk_size: members that go through the network at once; None is all. Memory of activations grows with it.
        options: of `fe.SVGD`; the seed makes the initial weights too. With a `process_group` members are split over
            its ranks: `size` counts all, of which a rank makes those of `fe.distributed.share(size)` alone, with the
            weights that they have in one process; a sequence holds this rank's own. `predict` averages all of them
            and is a collective then. To be as in one process, all ranks step with the same batch.

    Trainable parameters must have one dtype and device; others (requires_grad=False) are the first member's for all.
    Buffers belong to each member, and travel with `state_dict`. Dropout draws a mask a member from torch's
    generator, which is no part of `state_dict`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has changed then.
    """

    _target: _Members

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module] | Sequence[nn.Module],
        loss: Callable[..., Tensor],
        *,
        size: int | None = None,
        prior_precision: float = 0.0,
        chunk_size: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        group = group_of(name, options.get("process_group"))
        drawn = draw_seed() if seed is None else None
        with Agreement(name, group) as agreement:
            if not callable(loss):
                raise TypeError(f"{name}: loss must be callable; got {type(loss).__name__}")
            precision = number(name, "prior_precision", prior_precision)
            if chunk_size is not None:
                chunk_size = integer(name, "chunk_size", chunk_size, 1, 1 << 31)
            for key in ("log_prob", "scores", "batched", "particles"):
                if key in options:
                    raise TypeError(f"{name}: {key} must not be given; the model and the loss make it")
            if seed is not None:
                seed = integer(name, "seed", seed, -(1 << 63), 1 << 64)
            agreement.tell(number=drawn or 0)
        seed = agreement.number if seed is None else seed
        with Agreement(name, group) as agreement:
            members, held = _members(name, model, size, seed, group)
            target, particles = _Members.of(name, members, held, loss, precision, chunk_size)
            agreement.tell()
        super().__init__(target, particles, seed=seed, **options)
        self._drawn_seed = drawn if group is None else None

    @property
    def size(self) -> int:
        """Number of members."""
        return self._all.n

    def parameters_of(self, member: int) -> State:
        """The weights and buffers of a member by name, as `load_state_dict` of its network takes them; copies.

        Of ranks those of one's own: members are numbered as in one process.
        """
        first, count = self._all.begin, len(self._particles)
        member = integer(type(self).__name__, "member", member, first, first + count) - first
        own = self._target.unflatten(self._particles[member])
        return {
            name: tensor.clone()
            for name, tensor in {**own, **{k: v[member] for k, v in self._target.buffers.items()}}.items()
        }

    def outputs(self, *inputs: Any, **keywords: Any) -> Iterator[Any]:
        """What each member (of ranks, each of this one's) returns, in eval mode and without gradients."""
        for k, particle in enumerate(self._particles):
            yield call(self._target.skeleton, self._target.weights(particle, k), (inputs, keywords))

    def predict(
        self,
        x: Tensor | tuple[Any, ...] | Mapping[str, Any],
        activation: Activation = "softmax",
        *,
        dim: int = -1,
        output: Pick = None,
    ) -> Prediction:
        """The prediction averaged over the members, and how far they disagree.

        Args:
            x, activation, dim, output: as for `fe.PosteriorSamples.predict`, and so are the errors.
        """
        owner = f"{type(self).__name__}.predict"
        average = Average(owner, activation, dim)
        output = check_pick(owner, output)
        inputs, keywords = as_inputs(x)
        answers: Iterator[Tensor] = (
            pick(owner, answer, output) for answer in self.outputs(*inputs, **keywords)
        )
        if self._all.group is not None:
            answers = self._of_all_ranks(answers, (inputs, keywords), owner, output)
        for answer in answers:
            average.add(answer)
        return average.prediction()

    def _of_all_ranks(
        self, answers: Iterator[Tensor], inputs: Any, owner: str, output: Pick
    ) -> Iterator[Tensor]:
        with self._all.together() as agreement:
            own = list(answers)
            if not own:  # whose shape is that of any network of these
                own = [pick(owner, call(self._target.skeleton, {}, inputs), output)]
            stacked = torch.stack(own)[: len(self._particles)]
            agreement.tell(len(stacked))
        return iter(self._all.gather(stacked))


def _members(
    name: str, model: Any, size: int | None, seed: int, group: Any
) -> tuple[Iterator[nn.Module], int]:
    """The members one by one, so that no more than one of them is held besides the particles; and how many are held.

    Where none is, one comes all the same: what a member is made of is asked of it.
    """
    if isinstance(model, Sequence):
        if not model or size not in (None, len(model)):
            raise ValueError(
                f"{name}: model must be as many modules as size={size}, at least 1; got {len(model)}"
            )
        for i, member in enumerate(model):
            if not isinstance(member, nn.Module):
                raise TypeError(f"{name}: model[{i}] must be a module; got {type(member).__name__}")
        return iter(model), len(model)
    if not isinstance(model, nn.Module) and not callable(model):
        raise TypeError(
            f"{name}: model must be a module, a function that makes one, or a sequence of them; "
            f"got {type(model).__name__}"
        )
    if size is None:
        raise TypeError(f"{name}: size must be given with a single model; got None")
    count = integer(name, "size", size, 1, 1 << 31)
    if isinstance(model, nn.Module):
        check_unsharded(name, model)
        for path, part in model.named_modules():
            if list(part.parameters(recurse=False)) and not hasattr(part, "reset_parameters"):
                raise ValueError(
                    f"{name}: model must be a function that makes a member, since {path or 'the model'!r} "
                    f"({type(part).__name__}) has parameters and no reset_parameters()"
                )
    own = range(count)
    if group is not None:
        from fekernels.distributed import share

        own = share(count, group)
    return _made(name, model, count, seed, own or range(1)), len(own)


def _made(name: str, model: Any, count: int, seed: int, own: range) -> Iterator[nn.Module]:
    member: nn.Module | None = copy.deepcopy(model) if isinstance(model, nn.Module) else None
    words = random.bits((count, 2), seed=seed, stream=INITIAL, purpose=LANGEVIN_NOISE)
    for k in own:
        # A generator state of its own for each member: the first k members do not depend on their number.
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(words[k].numpy().tobytes(), "little"))
            if member is None:
                made = model()
            else:
                made = member
                for part in made.modules():
                    reset: Any = getattr(part, "reset_parameters", None)
                    if reset is not None:
                        reset()
        if not isinstance(made, nn.Module):
            raise TypeError(f"{name}: model must return a module; got {type(made).__name__}")
        yield made


class _Members(Target):
    """Log-densities of flattened weights: the network is called once, over all members, by vmap."""

    def __init__(
        self,
        skeleton: nn.Module,
        shapes: dict[str, torch.Size],
        buffers: State,
        loss: Callable[..., Tensor],
        prior_precision: float,
        chunk_size: int | None,
    ) -> None:
        self.skeleton, self.shapes, self.buffers = skeleton, shapes, buffers
        self.loss, self.prior_precision, self.chunk_size = loss, prior_precision, chunk_size

    @classmethod
    def of(
        cls,
        name: str,
        members: Iterator[nn.Module],
        held: int,
        loss: Callable[..., Tensor],
        prior_precision: float,
        chunk_size: int | None,
    ) -> tuple[_Members, Tensor]:
        rows: list[Tensor] = []
        buffers: list[State] = []
        skeleton: nn.Module | None = None
        shapes: dict[str, torch.Size] = {}
        for member in members:
            own = {key: param for key, param in member.named_parameters() if param.requires_grad}
            kinds = {(param.dtype, param.device) for param in own.values()}
            if len(kinds) != 1:
                raise ValueError(
                    f"{name}: model must have trainable parameters of one dtype on one device; "
                    f"got {sorted(map(str, kinds))}"
                )
            sizes = {key: param.shape for key, param in own.items()}
            if skeleton is None:
                skeleton, shapes = copy.deepcopy(member), sizes
            elif sizes != shapes:
                raise ValueError(
                    f"{name}: model must give members of the same parameters; got {sizes} after {shapes}"
                )
            rows.append(torch.cat([param.detach().reshape(-1) for param in own.values()]))
            buffers.append({key: buffer.detach().clone() for key, buffer in member.named_buffers()})
        assert skeleton is not None
        stacked = {key: torch.stack([each[key] for each in buffers])[:held] for key in buffers[0]}
        return cls(skeleton, shapes, stacked, loss, prior_precision, chunk_size), torch.stack(rows)[:held]

    def unflatten(self, particle: Tensor) -> State:
        parts = particle.split([shape.numel() for shape in self.shapes.values()])
        return {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def weights(self, particle: Tensor, member: int) -> State:
        # Copies: a forward that writes a buffer must not reach the member's.
        return {
            **self.unflatten(particle),
            **{key: value[member].clone() for key, value in self.buffers.items()},
        }

    def evaluate(self, particles: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
        if not batch:
            raise TypeError("SVGDEnsemble: step must be called with a batch (x, *targets); got nothing")
        inputs = batch[0] if isinstance(batch[0], tuple) else batch[:1]

        def energy(particle: Tensor, buffers: State) -> Tensor:
            output = torch.func.functional_call(
                self.skeleton, {**self.unflatten(particle), **buffers}, inputs
            )
            loss = self.loss(output, *batch[1:])
            if not isinstance(loss, Tensor):
                raise TypeError(f"SVGDEnsemble: loss must return a tensor; got {type(loss).__name__}")
            if loss.dim():
                raise ValueError(f"SVGDEnsemble: loss must return a scalar; got shape {tuple(loss.shape)}")
            return loss

        with torch.enable_grad():
            x = particles.detach().requires_grad_(True)
            losses = torch.vmap(energy, randomness="different", chunk_size=self.chunk_size)(x, self.buffers)
            (gradients,) = torch.autograd.grad(losses.sum(), x)
        scores = gradients.neg_()
        log_prob = -losses.detach()
        if self.prior_precision:
            # By hand: autograd would keep a copy of all weights for it.
            scores.add_(particles, alpha=-self.prior_precision)
            squares = torch.linalg.vector_norm(particles, dim=1).square()  # no temporary of their size
            log_prob = log_prob - self.prior_precision / 2 * squares
        return scores, log_prob

    def state(self) -> State:
        return {key: buffer.clone() for key, buffer in self.buffers.items()}

    def load(self, state: State) -> None:
        for key, buffer in self.buffers.items():
            buffer.copy_(state[key])
