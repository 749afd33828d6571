r"""MaskPro (arXiv 2506.12876) as a PyTorch optimizer: it moves masks where others move weights.

The parameters are the model's weights; each holds ``dense * mask``, written in place, so the
forward pass is left alone. The dense values never change. Every weight has a logit.

"policy", the paper's estimator, needs forward passes only. One step, for the loss f, the drawn mask
m and the initial one:

.. math::
    r &= f(m, \xi) - f(m_0, \xi) \\
    \pi &\leftarrow \pi - \eta \, (r - \delta) / \sigma \; \nabla_\pi \log P(m) \\
    \delta &\leftarrow \alpha \delta + (1 - \alpha) r

with sigma the running spread of r - delta (1 in the published rule). "straight_through" also needs
a backward pass. With c the gradient of the loss with respect to the mask,

.. math:: \pi \leftarrow \pi - \eta \, \mathrm{clip}(g / \mathrm{rms}(g), -1, 1), \quad
          g = \nabla_\pi \sum_j c_j P(j \in S)

The way of one batch's loss into the logits is :meth:`MaskPro.step` and :meth:`MaskPro.learn`, which
call, block by block, the functions of the module ``transition``:

- policy: ``tracker.judge`` gives (r - delta) / sigma and the next delta; ``transition`` moves the
  logits along the score and draws the next mask;
- straight-through: a hook of ``straight_through.Gradients`` takes each weight's gradient;
  ``lessons.Lessons`` finds g with ``directed``, then its rms, and moves the logits with ``moved``;
  ``transition`` draws the next mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskpro_lightning.initial import initializers
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim import saved_state, tracker
from maskpro_lightning.optim.estimators import Estimator, EstimatorName, estimator_of
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.masked_weight import Draw, Groups, MaskedWeight, Version
from maskpro_lightning.optim.states import LogitsDtype, Memory, States
from maskpro_lightning.optim.straight_through import Gradients
from maskpro_lightning.optim.together import Together
from maskpro_lightning.weights import admission
from maskpro_lightning.weights.layout import Layout, like, local, whole_of
from maskpro_lightning.weights.sharding import (
    flat_shapes,
    over_ranks,
    shows_gradients_late,
)


class MaskPro(Optimizer):
    """Learn N:M masks of frozen weights.

    ``loss = optimizer.step(closure)`` evaluates the loss under the drawn mask, moves the logits and
    draws the next mask. Nothing is touched before the first step or :meth:`begin`; from then on the
    parameters hold the weights under the drawn mask.

    Memory per weight of b bytes, in bytes: b (weight) + b (dense copy) + 4 (logits) + 1/4 (masks).
    With ``memory="lean"``, which copies pruned weights only: b + b (M - N) / M + 4 + 1/4. Logits in
    bfloat16 take 2 instead of 4.

    Args:
        params: Weights, best as ``(name, weight)`` pairs: a mask's randomness depends on the seed
            and the weight's name. Parameter groups may set their own ``lr``, ``pattern`` and
            ``input_dim`` (the dimension groups lie along; the last by default).
        pattern: Weights kept of every M, such as "2:4".
        estimator: "straight_through" or "policy", or a :class:`StraightThrough` or
            :class:`Policy` with numbers of your own.
        seed: Seed of the draws.
        model: The model that the weights belong to, where FSDP shards it (``fully_shard`` or
            ``FullyShardedDataParallel`` with ``use_orig_params=True``): each rank then keeps the
            state of its own shards, and draws the masks that a single rank would draw.
        fused: Whether to compile the step of the masks (patterns with N <= 2 and M <= 8) into one
            loop, which is several times as fast. None compiles if there is a compiler, and enough
            weights to win back the time of compiling.
        memory: "plain" keeps a dense copy of each weight, "lean" a copy of its pruned values. Both
            learn the same, and load each other's checkpoints.
        logits_dtype: "bfloat16" saves 2 bytes a weight. Logits are then rounded up or down at
            random, so that small steps count on average.

    Raises:
        TypeError, ValueError: an argument out of range, an unknown pattern, or a weight that M does
            not divide.
        RuntimeError: ``fused`` is True and there is no compiler.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pattern: str | NMPattern = "2:4",
        *,
        estimator: Estimator | EstimatorName = "straight_through",
        seed: int = 0,
        model: nn.Module | None = None,
        fused: bool | None = None,
        memory: Memory = "plain",
        logits_dtype: LogitsDtype = "float32",
    ) -> None:
        for argument, given, choices in (
            ("memory", memory, get_args(Memory)),
            ("logits_dtype", logits_dtype, get_args(LogitsDtype)),
        ):
            if given not in choices:
                raise ValueError(f"{argument} is one of {', '.join(choices)}; got {given!r}.")
        groups = [
            {**each, "params": list(each["params"])} if isinstance(each, dict) else each
            for each in params
        ]
        number = sum(len(g["params"]) if isinstance(g, dict) else 1 for g in groups)
        #: The estimator, whose numbers the parameter groups start from.
        self.estimator = estimator_of(estimator).for_fit(NMPattern.parse(pattern), number)
        defaults = {
            "pattern": str(NMPattern.parse(pattern)),
            "input_dim": -1,
            "estimator": self.estimator.name,
            **self.estimator.rule(),
            "seed": seed,
            "step": 0,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            admission.check_rule(group)
            # The residual tracker; every group holds the same one, since there is one loss.
            group.update(tracker.new())
            group["initial_lr"] = group["lr"]
        shapes = {} if model is None else flat_shapes(model)
        admission.check_weights(
            (group, name, p, shapes.get(id(p), p.shape)) for group, name, p in self._parameters()
        )
        weights = [
            (parameter, NMPattern.parse(group["pattern"]), group["input_dim"])
            for group, _, parameter in self._parameters()
        ]
        self._states = States(model, weights, memory, logits_dtype)
        self._fusion = Fusion(
            fused, [(local(p), layout.pattern) for p, layout in self.layouts.items()]
        )
        self._gradients = Gradients(self.names, self._states, self._fusion)
        #: Of the last step: the loss, and for the policy also baseline, residual and advantage.
        self.last: dict[str, Tensor] = {}

    # Properties

    @property
    def layouts(self) -> Mapping[Tensor, Layout]:
        """The part of each weight that is this rank's."""
        return self._states.layouts

    @property
    def sharded(self) -> bool:
        """Whether weights are split over ranks, and with them all tensors of their shape."""
        return any(layout.across for layout in self.layouts.values())

    @property
    def names(self) -> list[str]:
        """The weights' names, in order."""
        return [name for _, name, _ in self._parameters()]

    @property
    def begun(self) -> bool:
        """Whether the parameters are masked and the dense weights kept in the state."""
        return bool(self.state)

    @property
    def holds(self) -> Version | None:
        """The version that the parameters hold; None if they hold different ones."""
        versions = {held.version for held in self._states.held.values()} or {"dense"}
        return versions.pop() if len(versions) == 1 else None

    @property
    def without_gradient(self) -> list[str]:
        """The names of weights that no gradient has reached yet."""
        return [name for name in self.names if name in self._gradients.unreached]

    def all_finite(self) -> bool:
        """Whether all gradients of the last step were finite; waits for the device."""
        return bool(self._gradients.all_finite)

    @property
    def tracker(self) -> dict[str, Tensor]:
        """The residual tracker, scalars by name; see the module ``tracker``."""
        return {name: self.param_groups[0][name] for name in tracker.new()}

    # The step: a loss, or gradients, into the logits

    @torch.no_grad()
    def begin(
        self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        """Keep the dense weights, start the logits from initial masks and draw the first mask.

        Args:
            masks: Initial masks by parameter name, bool, shaped like the whole weights, exactly N
                of every M; or an iterable of (name, mask), which holds one mask at a time. By
                default the largest weights are kept.

        Raises:
            RuntimeError: begun already.
            ValueError: a mask is missing, has another shape, or breaks the pattern.
        """
        if self.begun:
            raise RuntimeError("The masks have begun already: make a new MaskPro to start over.")
        known = {name: (group, parameter) for group, name, parameter in self._parameters()}
        given = self._largest() if masks is None else admission.each_once(list(known), masks)
        state = {}
        for name, mask in given:
            group, parameter = known[name]
            layout = self.layouts[parameter]
            admission.check_mask(name, mask, layout.shape)
            mask = whole_of(mask).to(parameter.device)
            layout.pattern.check(mask, layout.input_dim, f"the mask of {name!r}")
            whole = self.whole(parameter)
            about = whole, mask, layout.pattern, layout.input_dim
            logits = self.estimator.initial_logits(*about, group["logit_scale"])
            state[parameter] = self._states.new(parameter, whole, mask, logits)
        # Only now, so that an error above, such as no memory, leaves nothing begun.
        for parameter, tensors in state.items():
            self.state[parameter] = self._states.keep(parameter, tensors)
        self._draw(Fusion.off())

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        baseline: Tensor | None = None,
        *,
        backward_passes: int = 1,
    ) -> Tensor | None:
        """Evaluate the drawn mask, move the logits, draw the next mask.

        Args:
            closure: Computes the loss, a scalar, on one batch. For "straight_through" it also calls
                ``loss.backward()``; for "policy" it runs without gradients. Without a closure
                nothing is learned; :meth:`begin` is called if that has not happened yet.
            baseline: For "policy", the initial mask's loss on the same batch. By default the
                closure is called under the initial mask, too, with the same random numbers.
            backward_passes: How often the closure calls ``backward()``, see
                :meth:`taking_gradients`.

        Returns:
            The loss under the drawn mask, or None without a closure.

        Raises:
            TypeError: the closure returned no tensor of one number.
            RuntimeError: no gradient has reached a masked weight.
            ValueError: ``backward_passes`` is above 1 with FSDP1; or a learning rate is out of
                range.
        """
        if not self.begun:
            self.begin()
        if closure is None:
            return None
        if self.estimator.needs_gradients:
            self._refuse_late_gradients(backward_passes)
            with torch.enable_grad(), self.taking_gradients(backward_passes):
                loss = closure()
        else:
            with torch.no_grad():
                if baseline is None:
                    with self.applied("initial"), torch.random.fork_rng(self._cuda_devices()):
                        baseline = closure()
                self.write("drawn")
                loss = closure()
        admission.check_loss(loss, "The closure returned")
        self.learn(loss, baseline)
        return loss

    @contextmanager
    def taking_gradients(
        self, backward_passes: int = 1, reduce: Callable[[Tensor], object] | None = None
    ) -> Iterator[None]:
        """Within a ``with`` block, learn from each gradient during the backward pass, and free it.

        For "straight_through". The gradients of only a few weights are in memory at once; with
        FSDP1, which shows gradients when the backward pass is over, those of all. The parameters
        hold the drawn mask within the block.

        Args:
            backward_passes: The number of backward passes that one step learns from. Each moves the
                logits by its share of ``lr``, along its own gradient divided by its own size.
            reduce: Averages a gradient over ranks in place, if nothing else does.
        """
        if not self.begun:
            self.begin()
        self._check_rates()
        self.write("drawn")
        with self._gradients.taken(self._with_states, backward_passes, reduce):
            yield

    @torch.no_grad()
    def learn(self, loss: Tensor, baseline: Tensor | None = None) -> None:
        """Move the logits by a loss that was computed already, and draw the next mask.

        Args:
            loss: The loss under the drawn mask, a scalar. "straight_through" learns from the
                gradients that came within :meth:`taking_gradients`, and from those in ``grad``.
            baseline: The initial mask's loss on the same batch, which "policy" needs.

        Raises:
            TypeError: a loss is no tensor of one number.
            RuntimeError: no gradient has reached a masked weight.
            ValueError: a learning rate is out of range.
        """
        admission.check_loss(loss)
        if self.estimator.needs_gradients:
            self.last = {"loss": loss.detach()}
            skipped = self._gradients.finish(self._masked_weights(), loss.device)
            for group in self.param_groups:
                group.update(tracker.skips(self.tracker, skipped))
            change = None
        else:
            admission.check_loss(baseline, "The baseline is")
            assert baseline is not None
            change = self._judge(loss.detach().float(), baseline.detach().float())
        self._check_rates()
        for group in self.param_groups:
            group["step"] += 1
        self._draw(self._fusion, change)
        self._opt_called = True  # learning rate schedulers look for this

    def _judge(self, loss: Tensor, baseline: Tensor) -> Tensor:
        """The advantage: how much worse than expected the drawn mask was. Updates the tracker."""
        residual, rule = loss - baseline, self.param_groups[0]
        advantage, after = tracker.judge(
            self.tracker, residual, rule["tracker_momentum"], published=rule["published"]
        )
        for group in self.param_groups:
            group.update(after)
        self.last = {
            "loss": loss,
            "baseline": baseline,
            "residual": residual,
            "advantage": advantage,
        }
        return advantage

    def _draw(self, fusion: Fusion, advantage: Tensor | None = None) -> None:
        """Move the logits by the drawn mask's advantage, if one is given; draw the next mask."""
        together = Together(fusion)
        changes = {
            id(group): None if advantage is None else group["lr"] * advantage
            for group in self.param_groups
        }
        weights = list(self._masked_weights())
        for group, _, masked in weights:
            draw = Draw(group["seed"], group["step"])
            masked.advance(draw, changes[id(group)], together)
        together.finish()
        for _, _, masked in weights:
            masked.held.arrive()

    # Versions of the weights

    @torch.no_grad()
    def write(self, version: Version) -> None:
        """Write a version of the weights into the parameters.

        Args:
            version: "dense", all weights; or the weights that a mask keeps: "initial"; "drawn", the
                mask that the next step evaluates; "mode", the most likely mask (of each group the N
                highest logits), which is the one to deploy; "best", the mask that :meth:`remember`
                kept, or the initial one if there is none.

        Raises:
            ValueError: an unknown version.
        """
        if version not in get_args(Version):
            raise ValueError(f"version is one of {get_args(Version)}, got {version!r}.")
        # Not even a reshard: a backward pass may still need the whole weights that FSDP holds.
        if all(held.holds(version) for held in self._states.held.values()):
            return
        for _, _, masked in self._masked_weights():
            masked.write(version)

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the most likely mask as the version "best"."""
        for _, parameter, masked in self._masked_weights():
            if masked.held.version == "best":
                masked.write("mode")
            self.state[parameter]["best"] = masked.packed_mode()

    @contextmanager
    def applied(self, version: Version) -> Iterator[None]:
        """Within a ``with`` block, let the parameters hold a version."""
        before = self.holds or "drawn"
        self.write(version)
        try:
            yield
        finally:
            self.write(before)

    @torch.no_grad()
    def overwritten(self) -> list[str]:
        """The names of weights that do not hold what was written into them last."""
        return [m.name for _, _, m in self._masked_weights() if not bool(m.is_intact())]

    # Masks, logits and statistics

    @torch.no_grad()
    def masks(self, version: Version = "mode") -> dict[str, Tensor]:
        """Masks by parameter name, bool, shaped like the weights.

        Raises:
            RuntimeError: not begun.
        """
        if not self.begun:
            raise RuntimeError("There are no masks before the first step or begin().")
        return {
            masked.name: like(masked.mask(version), parameter)
            for _, parameter, masked in self._masked_weights()
        }

    @torch.no_grad()
    def whole_masks(self, version: Version = "mode") -> Iterator[tuple[str, Tensor]]:
        """Masks of whole weights by name, one at a time; a collective for each if sharded."""
        for _, parameter, masked in self._masked_weights():
            yield masked.name, self.layouts[parameter].whole(masked.mask(version))

    @torch.no_grad()
    def whole(self, parameter: Tensor) -> Tensor:
        """The whole of a weight as it is now; a collective if it is sharded."""
        self._states.reshard()
        return self.layouts[parameter].whole(local(parameter))

    def logits(self) -> dict[str, Tensor]:
        """The logits by parameter name, shaped like the weights; not copies."""
        return {name: self.state[parameter]["logits"] for _, name, parameter in self._parameters()}

    @torch.no_grad()
    def groups(self) -> Iterator[Groups]:
        """All groups of this rank's parts in blocks, for statistics."""
        for _, _, masked in self._masked_weights():
            yield from masked.groups()

    def redrawn(self) -> dict[str, Tensor]:
        """By name, the number of this rank's groups that the last draw changed, int64 scalars."""
        return {masked.name: masked.redrawn.sum() for _, _, masked in self._masked_weights()}

    @torch.no_grad()
    def changed(self, version: Version) -> float:
        """Share of groups, 0 to 1, whose mask of a version is not the initial one; a collective."""
        counts = [
            [float(number), float(groups)]
            for number, groups in (m.changed(version) for _, _, m in self._masked_weights())
        ]
        number, groups = self.over_ranks(torch.tensor(counts, dtype=torch.float64)).sum(0).tolist()
        return float(number / groups)

    @torch.no_grad()
    def refuse_not_finite(self) -> None:
        """Refuse weights that hold NaN or infinity, by name; a collective.

        Raises:
            ValueError: names the first of them.
        """
        self._states.reshard()
        wrong = torch.stack([(~local(p).isfinite()).sum() for p in self.layouts])
        counts = self.over_ranks(wrong.cpu().double()[:, None])[:, 0].tolist()
        admission.check_finite(dict(zip(self.names, counts, strict=True)))

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Add up numbers that ranks have counted in their parts, one row for each weight."""
        _, _, first = next(self._parameters())
        return over_ranks(list(self.layouts.values()), numbers, local(first).device)

    # Checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state: this rank's part of dense weights, logits and masks; the same in each memory.

        Dense weights and logits may be views of the optimizer's own tensors.
        """
        packed = super().state_dict()
        order = chain.from_iterable(group["params"] for group in packed["param_groups"])
        packed["state"] = (
            {
                key: {name: like(value, parameter) for name, value in masked.saved().items()}
                for key, (_, parameter, masked) in zip(order, self._masked_weights(), strict=True)
            }
            if self.begun
            else {}
        )
        return packed

    def check_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Refuse a saved state that :meth:`load_state_dict` would refuse; nothing is touched.

        Returns:
            The state as this version of the package saves it.

        Raises:
            ValueError: see :meth:`load_state_dict`.
        """
        weights = list(zip(self.names, self.layouts.values(), strict=True))
        return saved_state.checked(state_dict, self.param_groups, weights)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the parameters then hold its drawn mask.

        Raises:
            ValueError: the state belongs to other weights, another pattern or another estimator, or
            it is damaged; nothing is touched then.
        """
        state_dict = self.check_state(state_dict)
        self.write("dense")  # of the masks that have begun here, if any
        order = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        state = {
            parameter: self._states.restored(parameter, state_dict["state"][key])
            for key, (_, _, parameter) in zip(order, self._parameters(), strict=True)
            if state_dict["state"].get(key)
        }
        # The base class would cast to the parameter's dtype; logits and masks have their own.
        super().load_state_dict({**state_dict, "state": {}})
        self._states.forget()
        self._gradients.forget()
        for parameter, tensors in state.items():
            self.state[parameter] = self._states.keep(parameter, tensors)
        self.write("drawn")

    def __getstate__(self) -> dict[str, Any]:
        kept = {"estimator", "last", "_states", "_fusion", "_gradients"}
        return super().__getstate__() | {name: vars(self)[name] for name in kept}

    # Internals

    def _parameters(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        number = count()
        for group in self.param_groups:
            names = group.get("param_names") or (str(next(number)) for _ in group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                yield group, name, parameter

    def _masked_weights(self) -> Iterator[tuple[dict[str, Any], Tensor, MaskedWeight]]:
        """All weights, once begun; resharded, so that parameters are this rank's parts."""
        self._states.reshard()
        yield from self._with_states()

    def _with_states(self) -> Iterator[tuple[dict[str, Any], Tensor, MaskedWeight]]:
        for group, name, parameter in self._parameters() if self.begun else ():
            yield group, parameter, self._states.masked(name, parameter, self.state[parameter])

    def _check_rates(self) -> None:
        for group in self.param_groups:
            admission.check_lr(group)

    def _largest(self) -> Iterator[tuple[str, Tensor]]:
        """Masks that keep the largest weights."""
        for name, (parameter, layout) in zip(self.names, self.layouts.items(), strict=True):
            weight = self.whole(parameter)
            yield name, initializers.magnitude(weight, layout.pattern, layout.input_dim)

    def _cuda_devices(self) -> list[torch.device]:
        return list({p.device for _, _, p in self._parameters() if p.device.type == "cuda"})

    def _refuse_late_gradients(self, backward_passes: int) -> None:
        if backward_passes > 1 and any(shows_gradients_late(p) for _, _, p in self._parameters()):
            raise ValueError(
                f"backward_passes is {backward_passes}, but FSDP1 shows gradients only when a "
                f"backward pass is over, and adds up those of several: call each backward() within "
                f"a block of its own, with optimizer.taking_gradients({backward_passes}), and then "
                f"optimizer.learn(loss)."
            )
