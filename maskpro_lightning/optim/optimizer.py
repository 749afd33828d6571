r"""MaskPro (arXiv 2506.12876) as a PyTorch optimizer: it moves masks where others move weights.

The parameters are the model's weights. The state of each is its ``dense`` copy, which never
changes, and its ``logits``; the parameter itself always holds ``dense * mask``, written in place,
so the forward pass is left alone. One step, for the loss f, the drawn mask m and the initial one:

.. math::
    r &= f(m, \xi) - f(m_0, \xi) \\
    \pi &\leftarrow \pi - \eta \, (r - \delta) / \sigma \; \nabla_\pi \log P(m) \\
    \delta &\leftarrow \alpha \delta + (1 - \alpha) r

with sigma the running spread of r - delta (1 in the published rule). That is the estimator
"policy", which needs forward passes only. "straight_through" pays for a backward pass and learns
from what keeping a weight does to the loss: with c the gradient with respect to the mask,

.. math:: \pi \leftarrow \pi - \eta \, g / \mathrm{rms}(g), \quad
          g = \nabla_\pi \sum_j c_j P(j \in S)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import chain, count
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size, is_initialized
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from maskpro_lightning.initial import initializers
from maskpro_lightning.masks import distribution
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim import saved_state, tracker
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.lean_weight import Held, LeanWeight, loaded
from maskpro_lightning.optim.masked_weight import Draw, Groups, MaskedWeight, Version
from maskpro_lightning.optim.together import Together
from maskpro_lightning.weights import admission
from maskpro_lightning.weights.admission import LARGEST
from maskpro_lightning.weights.layout import Layout, like, local, sums, whole_of
from maskpro_lightning.weights.sharding import Replicas, find_replicas, flat_shapes, layouts, settle

Estimator = Literal["policy", "straight_through"]
Exploration = Literal["shared", "per_replica"]
Memory = Literal["plain", "lean"]
LogitsDtype = Literal["float32", "bfloat16"]

_log = logging.getLogger(__name__)

#: Step size, initial logit and final sharpness by estimator, where they are not given.
DEFAULTS: dict[Estimator, dict[str, float]] = {
    "policy": {"lr": 0.1, "logit_scale": 4.0, "sharpness": 1.0},
    "straight_through": {"lr": 0.1, "logit_scale": 3.0, "sharpness": 4.0},
}

# Standard deviations of a random walk between an initial mask and a change of mind. The walk widens
# as a gap closes, so that of seven nearly two are left: chance flips about 0.1 % of the groups.
_WALK_MARGIN = 7.0


def policy_lr(pattern: NMPattern, logit_scale: float, steps: int) -> float:
    """The step size of the policy at which a whole fit's noise hardly changes a mask.

    A step moves the gap between a kept and a pruned logit by ``lr * advantage * (s_i - s_j)``, s
    the score. An advantage that knows nothing about the group has variance 1, so T steps at a rate
    that falls linearly to 0 are a random walk of variance ``lr^2 * T / 3 * E (s_i - s_j)^2``. What
    flips a group beyond that is evidence, and more steps can find more of it.

    Args:
        pattern: The pattern.
        logit_scale: The gap at the start, in units of logits.
        steps: T.
    """
    information = distribution.gap_information(pattern, logit_scale)
    rate = logit_scale / (_WALK_MARGIN * math.sqrt(information * steps / 3))
    return min(rate, LARGEST)  # what is hardly ever drawn differently tells nothing


class MaskPro(Optimizer):
    """Learn N:M masks of frozen weights from the loss alone.

    ``loss = optimizer.step(closure)`` evaluates the loss, without gradients, under the initial
    mask and under the drawn one, moves the logits and draws the next mask. Nothing is touched
    before the first step or :meth:`begin`; after it the parameters hold the drawn mask.

    Memory per weight, in bytes, for weights of b bytes: b (weight) + b (dense) + 4 (logits) + 1, or
    with ``memory="lean"``, which keeps pruned weights instead of all, b + b (M - N) / M + 4 + 1/4.
    Logits in bfloat16 take 2 instead of 4.

    Args:
        params: Weights, best as ``(name, weight)`` pairs: a mask's randomness depends on the seed
            and the weight's name. Parameter groups may set their own ``lr``, ``pattern`` and
            ``input_dim`` (the dimension groups lie along; the last by default).
        pattern: Weights kept of every M, such as "2:4".
        estimator: "policy" learns from the loss alone, two forward passes a step (one if the
            baseline is known); "straight_through" from gradients, a forward and a backward pass,
            and gets further on the same compute.
        lr: Step size of the logits, in units of logits; ``DEFAULTS`` holds what applies to each
            estimator where this, ``logit_scale`` or ``sharpness`` is None. :func:`policy_lr` knows
            a better one for "policy" where the number of steps is known.
        logit_scale: Initial logit of a kept weight, in units of logits; the others start at 0.
            The larger, the less is explored: the initial mask of a 2:4 group is drawn with
            probability 0.98 at 5 and 0.9999 at 10.
        sharpness: Masks are drawn from softmax(k * logits), where k rises from 1 to this value as
            a learning rate scheduler takes ``lr`` to 0; without a scheduler it stays 1.
        momentum: Decay of the tracker of residuals, alpha in [0, 1).
        normalize: Divide the advantage by its running spread, so that one ``lr`` fits models and
            losses of any size. False is the published rule (for Llama-2 7B: lr 50, logit_scale
            10), whose lr has to be found for each model.
        seed: Seed of the draws.
        exploration: "shared": all ranks evaluate the same mask, each on its data; the closure's
            loss has to be the mean over them. "per_replica": each copy of the model evaluates a
            mask of its own; the closure's loss is the rank's own, only losses travel, and the
            logits move by the mean of what each mask teaches (with "straight_through": along the
            gradients, which the strategy averages).
        model: The model that the weights belong to, where FSDP shards it (``fully_shard`` or
            ``FullyShardedDataParallel`` with ``use_orig_params=True``): each rank then keeps the
            state of its own shards, and draws what one rank would draw.
        fused: Compile the step of the masks (patterns with N <= 2) into one loop over the weights,
            several times as fast: True or False, or None for where there is a compiler and enough
            weights to win back the time that compiling takes.
        memory: "plain" keeps a dense copy of each weight, "lean" what the weight's mask leaves out
            (whole weights only, and one mask for all ranks). Both learn the same, and load each
            other's checkpoints.
        logits_dtype: "bfloat16" saves 2 bytes a weight; logits are then rounded up or down at
            random, so that small steps count on average.

    Raises:
        ValueError: an argument out of range, an unknown pattern, a weight that M does not
            divide, groups cut by a shard's edge with "straight_through", or shards with "lean".
        RuntimeError: ``fused`` is True and there is no compiler.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pattern: str | NMPattern = "2:4",
        *,
        estimator: Estimator = "policy",
        lr: float | None = None,
        logit_scale: float | None = None,
        sharpness: float | None = None,
        momentum: float = 0.99,
        normalize: bool = True,
        seed: int = 0,
        exploration: Exploration = "shared",
        model: nn.Module | None = None,
        fused: bool | None = None,
        memory: Memory = "plain",
        logits_dtype: LogitsDtype = "float32",
    ) -> None:
        for argument, given, choices in (
            ("estimator", estimator, DEFAULTS),
            ("exploration", exploration, get_args(Exploration)),
            ("memory", memory, get_args(Memory)),
            ("logits_dtype", logits_dtype, get_args(LogitsDtype)),
        ):
            if given not in choices:
                raise ValueError(f"{argument} is one of {', '.join(choices)}; got {given!r}.")
        if memory == "lean" and exploration == "per_replica":
            raise ValueError(
                "exploration='per_replica' needs what memory='lean' does not keep: choose "
                "memory='plain' or exploration='shared'."
            )
        lr = DEFAULTS[estimator]["lr"] if lr is None else lr
        logit_scale = DEFAULTS[estimator]["logit_scale"] if logit_scale is None else logit_scale
        sharpness = DEFAULTS[estimator]["sharpness"] if sharpness is None else sharpness
        defaults = {
            "pattern": str(NMPattern.parse(pattern)),
            "input_dim": -1,
            "estimator": estimator,
            "lr": lr,
            "logit_scale": logit_scale,
            "sharpness": sharpness,
            "momentum": momentum,
            "normalize": normalize,
            "seed": seed,
            "exploration": exploration,
            "step": 0,
            "drawn_sharpness": 1.0,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            admission.check_rule(group)
            # The tracker of residuals; every group holds the same, since there is one loss.
            group.update(tracker.new())
            group["initial_lr"] = group["lr"]
        self._model = model
        self._memory = memory
        self._logits_dtype: torch.dtype = getattr(torch, logits_dtype)
        #: Which part of each weight is this rank's.
        self.layouts = self._find_layouts()
        self._fusion = Fusion(fused, [(local(p), at.pattern) for p, at in self.layouts.items()])
        # What state holds of weights whose groups are cut is a view of these.
        self._padded: dict[Tensor, dict[str, Tensor]] = {}
        # What lean weights hold, and how far they are on their way to something else.
        self._held: dict[Tensor, Held] = {}
        self._holds: Version | None = "dense"
        #: Loss, baseline, residual and advantage of the last step, scalars.
        self.last: dict[str, Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether the parameters are masked and the dense weights kept in the state."""
        return bool(self.state)

    @torch.no_grad()
    def begin(
        self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        """Keep the dense weights, start the logits from the initial masks and draw the first.

        Args:
            masks: Initial masks by parameter name, bool, shaped like the whole weights, exactly N
                of every M; or pairs of them, of which each is dropped before the next is asked
                for. Without them the largest weights are kept.

        Raises:
            RuntimeError: begun already.
            ValueError: a mask is missing, has another shape, or breaks the pattern.
        """
        if self.begun:
            raise RuntimeError("The masks have begun already: make a new MaskPro to start over.")
        state, known = {}, {name: (g, parameter) for g, name, parameter in self._parameters()}
        for name, mask in self._initial(list(known), masks):
            group, parameter = known[name]
            layout = self.layouts[parameter]
            admission.check_mask(name, mask, layout.shape)
            mask = whole_of(mask)
            layout.pattern.check(mask, layout.input_dim, f"the mask of {name!r}")
            about = local(parameter), layout.take(mask), group["logit_scale"], self._logits_dtype
            if self._memory == "lean":
                state[parameter] = LeanWeight.state(*about, layout.pattern, layout.input_dim)
            else:
                state[parameter] = MaskedWeight.state(*about)
        # At once, so that an error on the way, such as no memory, leaves nothing begun.
        for parameter, tensors in state.items():
            self._keep(parameter, tensors)
        self._draw()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        baseline: Tensor | None = None,
    ) -> Tensor | None:
        """Evaluate the drawn mask, move the logits, draw the next mask.

        Args:
            closure: Computes the loss, a scalar, on one batch; called without gradients by the
                estimator "policy", while that of "straight_through" calls ``loss.backward()``.
                Without a closure nothing is learned: the state is made if it is not there yet.
            baseline: The initial mask's loss on the same batch, for "policy". Left out, it is
                measured by calling the closure under the initial mask, with the same random
                numbers.

        Returns:
            The loss under the mask that was drawn.
        """
        if not self.begun:
            self.begin()
        if closure is None:
            return None
        if self.defaults["estimator"] == "straight_through":
            self.write("drawn")
            with torch.enable_grad():
                loss = closure()
            admission.check_loss(loss)
            if all(parameter.grad is None for _, _, parameter in self._parameters()):
                raise RuntimeError(
                    "No gradient has reached any masked weight: the closure has to call "
                    "loss.backward(), and weights need requires_grad=True and a part in the loss."
                )
            self.last = {"loss": loss.detach()}
            finite = loss.detach().isfinite()
            for group in self.param_groups:
                group.update(tracker.skips(self.tracker, finite))
            self._draw(finite=finite)
            return loss
        if baseline is None:
            with self.applied("initial"), torch.random.fork_rng(self._cuda_devices()):
                baseline = closure()
            admission.check_loss(baseline)
        self.write("drawn")
        loss = closure()
        admission.check_loss(loss)
        losses_K2 = torch.stack([loss.detach().float(), baseline.detach().float()])[None]
        if self._explores_apart:
            losses_K2 = self._replicas.gather(losses_K2[0])
        advantage_K = self._judge(losses_K2[:, 0] - losses_K2[:, 1])
        self.last = {
            "loss": losses_K2[:, 0].mean(),
            "baseline": losses_K2[:, 1].mean(),
            "residual": (losses_K2[:, 0] - losses_K2[:, 1]).mean(),
            "advantage": advantage_K.mean(),
        }
        self._draw(advantage_K)
        return loss

    def _judge(self, residual_K: Tensor) -> Tensor:
        """The advantages of masks that were drawn together; the tracker learns of all alike."""
        first = self.param_groups[0]
        judged = [
            tracker.judge(self.tracker, each, first["momentum"], normalize=first["normalize"])
            for each in residual_K
        ]
        advantage_K = torch.stack([advantage for advantage, _ in judged])
        for name in self.tracker:
            after = torch.stack([after[name] for _, after in judged]).float().mean()
            for group in self.param_groups:
                group[name] = after
        return advantage_K

    @torch.no_grad()
    def write(self, version: Version) -> None:
        """Write a version of the weights into the parameters.

        Args:
            version: "dense", all weights; "initial", those of the initial mask; "drawn", those of
                the mask that the next step evaluates; "mode", those of the most likely mask,
                which is the one to deploy.
        """
        if version not in get_args(Version):
            raise ValueError(f"version is one of {get_args(Version)}, got {version!r}.")
        if not self.begun or version == self._holds:
            return
        self._holds = None  # what an interrupted write leaves is no version
        for _, _, masked in self._masked_weights():
            masked.write(version)
        self._holds = version

    @contextmanager
    def applied(self, version: Version) -> Iterator[None]:
        """Write a version into the parameters for the duration of a ``with`` block."""
        before = self._holds or "drawn"
        self.write(version)
        try:
            yield
        finally:
            self.write(before)

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
        """Masks of whole weights, one after the other; all ranks have to ask for all of them."""
        for _, parameter, masked in self._masked_weights():
            yield masked.name, self.layouts[parameter].whole(masked.mask(version))

    @property
    def sharded(self) -> bool:
        """Whether a weight is split over ranks; what is shaped like a weight then is, too."""
        return any(layout.across for layout in self.layouts.values())

    @property
    def names(self) -> list[str]:
        """The weights' names, in their order."""
        return [name for _, name, _ in self._parameters()]

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Add up what ranks have counted in their parts of each weight, a row for a weight.

        Copies of a part count once, or by their mean, where they have masks of their own.
        """
        if not self.sharded and not (self._explores_apart and is_initialized()):
            return numbers
        parameter = next(iter(self.layouts))
        shares = torch.tensor([layout.ranks / get_world_size() for layout in self.layouts.values()])
        numbers = (numbers * shares[:, None]).to(parameter.device)
        all_reduce(numbers)
        return numbers.cpu()

    @torch.no_grad()
    def whole(self, parameter: Tensor) -> Tensor:
        """The whole of a weight as it is now; all ranks have to ask for it."""
        if self._model is not None:
            settle(self._model)
        return self.layouts[parameter].whole(local(parameter))

    def logits(self) -> dict[str, Tensor]:
        """The logits by parameter name, shaped like the weights; not copies."""
        return {name: self.state[parameter]["logits"] for _, name, parameter in self._parameters()}

    @torch.no_grad()
    def groups(self) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        for group, _, masked in self._masked_weights():
            yield from masked.groups(_sharpness(group))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, alike for each ``memory``: for "lean" it holds a dense copy of the weights."""
        saved = super().state_dict()
        if self._memory == "lean" and self.begun:
            order = chain.from_iterable(group["params"] for group in saved["param_groups"])
            for key, (_, _, masked) in zip(order, self._masked_weights(), strict=True):
                assert isinstance(masked, LeanWeight)
                saved["state"][key] = masked.saved()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the parameters then hold the drawn mask of that state.

        Raises:
            ValueError: the state belongs to other weights, another pattern or another estimator, or
            it is damaged; nothing is touched then.
        """
        weights = list(zip(self.names, self.layouts.values(), strict=True))
        saved_state.check(state_dict, self.param_groups, weights)
        self.write("dense")  # what is begun here ends here
        self._holds = None
        order = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        state = {
            parameter: {
                name: self._part(parameter, name, value)
                for name, value in state_dict["state"].get(key, {}).items()
            }
            for key, (_, _, parameter) in zip(order, self._parameters(), strict=True)
        }
        # The base class would cast to the parameter's dtype; logits and masks have their own.
        super().load_state_dict({**state_dict, "state": {}})
        self._padded.clear()
        for parameter, tensors in state.items():
            if tensors:
                self._keep(parameter, self._in_own_form(parameter, tensors))
        explored = {group.get("exploration") for group in state_dict["param_groups"]}
        if self._explores_apart or "per_replica" in explored:
            for group, _, masked in self._masked_weights() if self.begun else ():
                if isinstance(masked, MaskedWeight):  # lean ones load replica 0's, which all share
                    masked.redraw(self._draws(group, group["step"], group["drawn_sharpness"])[0])
        self._holds = "dense"
        self.write("drawn")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_held", "_holds", "_padded", "_model", "_fusion", "_memory", "_logits_dtype")
        own = {name: vars(self)[name] for name in (*kept, "last", "layouts")}
        return super().__getstate__() | own

    @property
    def tracker(self) -> dict[str, Tensor]:
        """The tracker of residuals: ``delta``, ``variance`` and ``count``, scalars."""
        return {name: self.param_groups[0][name] for name in tracker.new()}

    def _parameters(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        number = count()
        for group in self.param_groups:
            names = group.get("param_names") or (str(next(number)) for _ in group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                yield group, name, parameter

    def _masked_weights(
        self,
    ) -> Iterator[tuple[dict[str, Any], Tensor, MaskedWeight | LeanWeight]]:
        if self._model is not None:
            settle(self._model)
        for group, name, parameter in self._parameters():
            state = {key: local(value) for key, value in self.state[parameter].items()}
            state |= self._padded.get(parameter, {})
            layout = self.layouts[parameter]
            if self._memory == "lean":
                held = self._held[parameter]
                lean = partial(LeanWeight, name, layout.pattern, layout.input_dim, parameter)
                yield group, parameter, lean(**state, held=held)
            else:
                yield group, parameter, MaskedWeight(name, layout, local(parameter), **state)

    def _find_layouts(self) -> dict[Tensor, Layout]:
        shapes = {} if self._model is None else flat_shapes(self._model)
        admission.check_weights(
            (group, name, p, shapes.get(id(p), p.shape)) for group, name, p in self._parameters()
        )
        weights = [
            (parameter, NMPattern.parse(group["pattern"]), group["input_dim"])
            for group, _, parameter in self._parameters()
        ]
        found = layouts(self._model, weights)
        for layout, (group, name, _) in zip(found, self._parameters(), strict=True):
            if group["estimator"] == "straight_through" and layout.may_be_cut:
                raise ValueError(
                    f"{name!r} is cut within groups of {layout.pattern.m} inputs (FSDP1, or tensor "
                    f"parallelism along the inputs), but the estimator 'straight_through' needs "
                    f"the gradients of whole groups: use fully_shard (FSDP2), or choose "
                    f"estimator='policy'."
                )
            if self._memory == "lean" and (layout.across or layout.flat):
                raise ValueError(
                    f"{name!r} is sharded, but memory='lean' exchanges whole weights: choose "
                    f"memory='plain', whose state is sharded like the weights."
                )
        return {parameter: layout for (parameter, _, _), layout in zip(weights, found, strict=True)}

    def _initial(
        self,
        known: Sequence[str],
        masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None,
    ) -> Iterator[tuple[str, Tensor]]:
        """The initial masks of all weights, one after the other."""
        if masks is None:
            for name, parameter in zip(known, self.layouts, strict=True):
                layout, weight = self.layouts[parameter], self.whole(parameter)
                yield name, initializers.magnitude(weight, layout.pattern, layout.input_dim)
            return
        unknown = sorted(set(masks) - set(known)) if isinstance(masks, Mapping) else []
        missing = set(known)
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            if unknown or name not in known:
                raise ValueError(
                    f"There are masks of unknown weights, {unknown[:3] or [name]}: those of this "
                    f"model are named like {known[0]!r}."
                )
            missing.discard(name)
            yield name, mask
        for name in known:
            if name in missing:
                raise ValueError(
                    f"There is no initial mask for {name!r} among {len(known) - len(missing)} "
                    f"masks: give one for every weight, or leave the weight out."
                )

    def _keep(self, parameter: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Make tensors, padded where their layout says so, the state of a parameter."""
        layout = self.layouts[parameter]
        if layout.cut:
            self._padded[parameter] = {k: v for k, v in tensors.items() if k != "dense"}
        if self._memory == "lean":
            self._held[parameter] = Held()
            self.state[parameter] = dict(tensors)
            return
        self.state[parameter] = {
            name: like(layout.own(value) if name != "dense" else value, parameter)
            for name, value in tensors.items()
        }

    def _in_own_form(self, parameter: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a weight, which may be made to hold the dense version, from a saved one."""
        saved["logits"] = saved["logits"].to(self._logits_dtype)
        if self._memory == "plain":
            return {name: value for name, value in saved.items() if name != "redrawn"}
        parameter.copy_(saved["dense"])
        layout = self.layouts[parameter]
        return loaded(saved, layout.pattern, layout.input_dim)

    def _part(self, parameter: Tensor, name: str, value: Tensor) -> Tensor:
        """This rank's part of a saved state, which may be of the whole weight; a copy."""
        layout = self.layouts[parameter]
        if name == "redrawn":
            return value.to(parameter.device)
        if isinstance(value, DTensor) and not isinstance(parameter, DTensor):
            value = value.full_tensor()
        value = local(value.detach())
        if tuple(value.shape) != layout.size:
            value = layout.take(value)
            value = layout.own(value) if name == "dense" else value
        elif layout.may_be_cut and name != "dense":
            value = layout.take(layout.whole(value.to(parameter.device)))
        return value.to(parameter.device).clone()

    def _cuda_devices(self) -> list[torch.device]:
        return list({p.device for _, _, p in self._parameters() if p.device.type == "cuda"})

    def _draw(self, advantage_K: Tensor | None = None, *, finite: Tensor | None = None) -> None:
        """Move the logits, by an advantage or, if finite, gradients; draw the next masks."""
        self._refuse_learning_rates()
        self._holds = None
        for group in self.param_groups:
            group["step"] += advantage_K is not None or finite is not None
        spreads = {} if finite is None else self._directions()
        together = Together(self._fusion)
        changes = {
            id(group): None if advantage_K is None else group["lr"] * advantage_K
            for group in self.param_groups
        }
        for group, parameter, masked in self._masked_weights():
            draw, *_ = self._draws(group, group["step"], _sharpness(group))
            judged: list[Draw] = []
            change, direction = changes[id(group)], None
            if change is not None and self._explores_apart:
                _, *judged = self._draws(group, group["step"] - 1, group["drawn_sharpness"])
            if finite is not None and parameter.grad is not None:
                spread = spreads[masked.name]
                idle = ~(spread.isfinite() & (spread > 0) & finite)
                direction = local(parameter.grad).div_(spread).masked_fill_(idle, 0)
                direction.mul_(group["lr"])
                if direction.dtype == torch.float16:  # where a large step does not fit
                    direction.nan_to_num_()
            if isinstance(masked, LeanWeight):
                masked.advance(draw, change, direction, self._fusion)
            else:
                masked.advance(draw, change, direction, together, judged)
            parameter.grad = None
        together.finish()
        for group in self.param_groups:
            group["drawn_sharpness"] = _sharpness(group)
        self._holds = "drawn"
        if _log.isEnabledFor(logging.DEBUG):
            self._refuse_drift()

    @property
    def _explores_apart(self) -> bool:
        return bool(self.defaults["exploration"] == "per_replica")

    @cached_property
    def _replicas(self) -> Replicas:
        return find_replicas(list(self.layouts.values()), next(iter(self.layouts)).device)

    def _draws(self, group: dict[str, Any], step: int, sharpness: float) -> list[Draw]:
        """This replica's draw, and then those of all replicas."""
        if not self._explores_apart:
            return [Draw(group["seed"], step, sharpness)]
        replicas = self._replicas
        draws = [
            Draw(group["seed"], step, sharpness, replica)
            for replica in range(len(replicas.members))
        ]
        return [draws[replicas.index], *draws]

    def _refuse_drift(self) -> None:
        """Compare the logits of replicas, which must never differ in a bit."""
        checksum = torch.zeros((), dtype=torch.int64, device=next(iter(self.layouts)).device)
        for value in self.logits().values():
            checksum += local(value).float().contiguous().view(torch.int32).sum(dtype=torch.int64)
        if not self._replicas.agree(checksum):
            raise RuntimeError(
                "The logits of the ranks have drifted apart: they were given different losses. "
                "Average the closure's loss over all ranks, or set exploration='per_replica'."
            )

    def _directions(self) -> dict[str, Tensor]:
        """Turn gradients into what logits move along; by name, its root mean square.

        Divided by that, one step size fits all; where it is not finite nothing can be learned.
        """
        parts, squares = {}, []
        for group, parameter, masked in self._masked_weights():
            if parameter.grad is not None:
                squares.append(masked.direction(local(parameter.grad), _sharpness(group)))
                parts[masked.name] = self.layouts[parameter]
        totals = zip(parts.items(), sums(list(parts.values()), squares), strict=True)
        return {name: (total / math.prod(part.shape)).sqrt() for (name, part), total in totals}

    def _refuse_learning_rates(self) -> None:
        for group in self.param_groups:
            if not 0 <= group["lr"] <= LARGEST:
                raise ValueError(
                    f"The learning rate is {group['lr']} at step {group['step']}: a scheduler has "
                    f"to keep it in [0, {LARGEST:.0e}]."
                )


def _sharpness(group: dict[str, Any]) -> float:
    """1 at the start, the group's sharpness once a scheduler has taken ``lr`` to 0."""
    done = 1 - min(1, group["lr"] / group["initial_lr"])  # a warm-up may go above
    sharpness: float = 1 + (group["sharpness"] - 1) * done
    return sharpness
