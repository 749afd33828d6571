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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskpro_lightning.initial import initializers
from maskpro_lightning.initial.logits import graded
from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.optim import gradients, saved_state, tracker
from maskpro_lightning.optim.fusion import Fusion
from maskpro_lightning.optim.lean_weight import LeanWeight
from maskpro_lightning.optim.masked_weight import Draw, Groups, MaskedWeight, Version
from maskpro_lightning.optim.replicas import MaskSharing
from maskpro_lightning.optim.rule import (
    DEFAULTS,
    Estimator,
    Exploration,
    LogitsDtype,
    Memory,
    check_lr,
    sharpness_of,
)
from maskpro_lightning.optim.states import States
from maskpro_lightning.optim.together import Together
from maskpro_lightning.weights import admission
from maskpro_lightning.weights.layout import Layout, like, local, whole_of
from maskpro_lightning.weights.sharding import flat_shapes

_log = logging.getLogger(__name__)


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
            estimator where this or ``logit_scale`` is None. :func:`policy_lr` knows a better one
            for "policy" where the number of steps is known.
        logit_scale: How far apart the logits of a kept and of a pruned weight start where the
            choice between them was typical, in units of logits; it is less where it was a close
            one, and more where it was easy, see :func:`graded`. The larger, the less is explored:
            the initial mask of a 2:4 group whose gaps are all alike is drawn with probability 0.98
            at 5 and 0.9999 at 10.
        sharpness: Masks are drawn from softmax(k * logits), where k goes from 1 to this value as
            a learning rate scheduler takes ``lr`` to 0; without a scheduler it stays 1.
        momentum: Decay of the tracker of residuals, alpha in [0, 1).
        normalize: Divide the advantage by its running spread, so that one ``lr`` fits models and
            losses of any size. False is the published rule (for Llama-2 7B: lr 50, logit_scale
            10), whose lr has to be found for each model, and whose kept weights all start at
            ``logit_scale``, the others at 0.
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
        sharpness: float = 1.0,
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
        self._states = self._make_states(model, memory, getattr(torch, logits_dtype))
        weights = [(local(p), layout.pattern) for p, layout in self.layouts.items()]
        self._fusion = Fusion(fused, weights)
        self._sharing = MaskSharing(
            exploration == "per_replica", list(self.layouts.values()), weights[0][0].device
        )
        self._holds: Version | None = "dense"
        # Whether each gradient of this step was finite, and how many backward passes there were.
        self._learned: list[Tensor] = []
        self._passes = 0
        #: Loss, baseline, residual and advantage of the last step, scalars.
        self.last: dict[str, Tensor] = {}

    @property
    def layouts(self) -> Mapping[Tensor, Layout]:
        """Which part of each weight is this rank's."""
        return self._states.layouts

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
        known = {name: (group, parameter) for group, name, parameter in self._parameters()}
        given = self._largest() if masks is None else admission.each_once(list(known), masks)
        state = {}
        for name, mask in given:
            group, parameter = known[name]
            layout = self.layouts[parameter]
            admission.check_mask(name, mask, layout.shape)
            mask = whole_of(mask).to(parameter.device)
            layout.pattern.check(mask, layout.input_dim, f"the mask of {name!r}")
            logits = self._initial_logits(group, parameter, mask)
            state[parameter] = self._states.new(parameter, mask, logits)
        # At once, so that an error on the way, such as no memory, leaves nothing begun.
        for parameter, tensors in state.items():
            self.state[parameter] = self._states.keep(parameter, tensors)
        self._draw(Fusion.off())

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        baseline: Tensor | None = None,
        *,
        backward_passes: int = 1,
    ) -> Tensor | None:
        """Evaluate the drawn mask, move the logits, draw the next mask.

        Args:
            closure: Computes the loss, a scalar, on one batch; called without gradients by the
                estimator "policy", while that of "straight_through" calls ``loss.backward()``.
                Without a closure nothing is learned: the state is made if it is not there yet.
            baseline: The initial mask's loss on the same batch, for "policy". Left out, it is
                measured by calling the closure under the initial mask, with the same random
                numbers.
            backward_passes: How often the closure calls ``backward()``, see :meth:`learning`.

        Returns:
            The loss under the mask that was drawn.
        """
        if not self.begun:
            self.begin()
        if closure is None:
            return None
        if self.defaults["estimator"] == "straight_through":
            return self._step_from_gradients(closure, backward_passes)
        return self._step_from_losses(closure, baseline)

    @contextmanager
    def learning(
        self, backward_passes: int = 1, reduce: Callable[[Tensor], object] | None = None
    ) -> Iterator[None]:
        """Within a ``with`` block, learn from each gradient as soon as it is there, and free it.

        The parameters hold the drawn mask then, since logits that move change the most likely one.
        For "straight_through", whose :meth:`step` does this around its closure: so there are never
        the gradients of more than a few weights at once. A step learns as well from what it finds
        in ``grad``, which other backward passes left there.

        Args:
            backward_passes: How many of them one step learns from. Each moves the logits by its
                share of ``lr``, along its own gradient divided by its own size.
            reduce: Averages a gradient over ranks in place, where nothing else does.
        """
        if not self.begun:
            self.begin()
        for group in self.param_groups:
            check_lr(group)
        self.write("drawn")
        share, part = 1 / backward_passes, self._passes
        self._passes += backward_passes

        def see(group: dict[str, Any], name: str, parameter: Tensor) -> None:
            if reduce is not None and parameter.grad is not None:
                reduce(local(parameter.grad))
            self._learn(group, name, parameter, share, part)

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(see, group, name))
            for group, name, parameter in self._parameters()
            if parameter.requires_grad
        ]
        try:
            yield
        except BaseException:
            self._learned.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _step_from_gradients(self, closure: Callable[[], Tensor], backward_passes: int) -> Tensor:
        with torch.enable_grad(), self.learning(backward_passes):
            loss = closure()
        admission.check_loss(loss)
        for group, name, parameter in self._parameters():
            self._learn(group, name, parameter, share=1, part=self._passes)
        if not self._learned:
            raise RuntimeError(
                "No gradient has reached any masked weight: the closure has to call "
                "loss.backward(), and weights need requires_grad=True and a part in the loss."
            )
        self.last = {"loss": loss.detach()}
        finite = torch.stack([each.to(loss.device) for each in self._learned])
        for group in self.param_groups:
            group.update(tracker.skips(self.tracker, (~finite).float().mean()))
            group["step"] += 1
        self._draw(self._fusion)
        return loss

    @torch.no_grad()
    def _learn(
        self, group: dict[str, Any], name: str, parameter: Tensor, share: float, part: int
    ) -> None:
        """Learn from what is in a weight's ``grad``, and free it."""
        if parameter.grad is None:
            return
        masked = self._states.masked(name, parameter, self.state[parameter])
        layout, gradient = self.layouts[parameter], local(parameter.grad)
        finite = gradients.learn(
            masked, layout, gradient, group, self._fusion, share=share, part=part
        )
        self._learned.append(finite)
        parameter.grad = None

    def _step_from_losses(self, closure: Callable[[], Tensor], baseline: Tensor | None) -> Tensor:
        if baseline is None:
            with self.applied("initial"), torch.random.fork_rng(self._cuda_devices()):
                baseline = closure()
            admission.check_loss(baseline)
        self.write("drawn")
        loss = closure()
        admission.check_loss(loss)
        losses_2 = torch.stack([loss.detach().float(), baseline.detach().float()])
        losses_K2 = self._sharing.gather(losses_2)
        advantage_K = self._judge(losses_K2[:, 0] - losses_K2[:, 1])
        self.last = {
            "loss": losses_K2[:, 0].mean(),
            "baseline": losses_K2[:, 1].mean(),
            "residual": (losses_K2[:, 0] - losses_K2[:, 1]).mean(),
            "advantage": advantage_K.mean(),
        }
        for group in self.param_groups:
            check_lr(group)
            group["step"] += 1
        self._draw(self._fusion, advantage_K)
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
                which is the one to deploy; "best", those of the mask that :meth:`remember` kept,
                the initial one before (not with memory="lean").
        """
        if version not in get_args(Version):
            raise ValueError(f"version is one of {get_args(Version)}, got {version!r}.")
        if not self.begun or version == self._holds:
            return
        self._holds = None  # what an interrupted write leaves is no version
        for _, _, masked in self._masked_weights():
            masked.write(version)
        self._holds = version

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the most likely mask of each group as the version "best".

        Raises:
            ValueError: with memory="lean", which has no place for it.
        """
        for _, _, masked in self._masked_weights():
            masked.remember()
        if self._holds == "best":
            self._holds = None

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
        """Add up what ranks have counted in their parts of each weight, a row for a weight."""
        return self._sharing.over_ranks(numbers)

    @torch.no_grad()
    def whole(self, parameter: Tensor) -> Tensor:
        """The whole of a weight as it is now; all ranks have to ask for it."""
        self._states.settle()
        return self.layouts[parameter].whole(local(parameter))

    def logits(self) -> dict[str, Tensor]:
        """The logits by parameter name, shaped like the weights; not copies."""
        return {name: self.state[parameter]["logits"] for _, name, parameter in self._parameters()}

    @torch.no_grad()
    def groups(self) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        for group, _, masked in self._masked_weights():
            yield from masked.groups(sharpness_of(group))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, alike for each ``memory``: for "lean" it holds a dense copy of the weights."""
        saved = super().state_dict()
        if self._states.lean and self.begun:
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
            parameter: self._states.restored(parameter, state_dict["state"][key])
            for key, (_, _, parameter) in zip(order, self._parameters(), strict=True)
            if state_dict["state"].get(key)
        }
        # The base class would cast to the parameter's dtype; logits and masks have their own.
        super().load_state_dict({**state_dict, "state": {}})
        self._states.forget()
        self._learned.clear()
        self._passes = 0
        for parameter, tensors in state.items():
            self.state[parameter] = self._states.keep(parameter, tensors)
        explored = {group.get("exploration") for group in state_dict["param_groups"]}
        if self._sharing.apart or "per_replica" in explored:
            for group, _, masked in self._masked_weights() if self.begun else ():
                if isinstance(masked, MaskedWeight):  # lean ones load replica 0's, which all share
                    draw, *_ = self._sharing.draws(group, group["step"], group["drawn_sharpness"])
                    masked.redraw(draw)
        self._holds = "dense"
        self.write("drawn")

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_states", "_fusion", "_sharing", "_holds", "_learned", "_passes", "last")
        own = {name: vars(self)[name] for name in kept}
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
        self._states.settle()
        for group, name, parameter in self._parameters():
            yield group, parameter, self._states.masked(name, parameter, self.state[parameter])

    def _make_states(
        self, model: nn.Module | None, memory: Memory, logits_dtype: torch.dtype
    ) -> States:
        shapes = {} if model is None else flat_shapes(model)
        admission.check_weights(
            (group, name, p, shapes.get(id(p), p.shape)) for group, name, p in self._parameters()
        )
        weights = [
            (parameter, NMPattern.parse(group["pattern"]), group["input_dim"])
            for group, _, parameter in self._parameters()
        ]
        states = States(model, weights, memory, logits_dtype)
        for group, name, parameter in self._parameters():
            needs_gradients = group["estimator"] == "straight_through"
            states.check(name, parameter, needs_gradients=needs_gradients)
        return states

    def _largest(self) -> Iterator[tuple[str, Tensor]]:
        """Masks that keep the largest weights."""
        for name, (parameter, layout) in zip(self.names, self.layouts.items(), strict=True):
            weight = self.whole(parameter)
            yield name, initializers.magnitude(weight, layout.pattern, layout.input_dim)

    def _initial_logits(self, group: dict[str, Any], parameter: Tensor, mask: Tensor) -> Tensor:
        """Logits of a whole weight; those of the published rule have one size."""
        scale, layout = group["logit_scale"], self.layouts[parameter]
        if not group["normalize"]:
            return mask.float().mul_(scale)
        return graded(self.whole(parameter), mask, layout.pattern, layout.input_dim, scale)

    def _cuda_devices(self) -> list[torch.device]:
        return list({p.device for _, _, p in self._parameters() if p.device.type == "cuda"})

    def _draw(self, fusion: Fusion, advantage_K: Tensor | None = None) -> None:
        """Move the logits by what an advantage says of the masks drawn last; draw the next."""
        self._holds = None
        together = Together(fusion)
        changes = {
            id(group): None if advantage_K is None else group["lr"] * advantage_K
            for group in self.param_groups
        }
        for group, _, masked in self._masked_weights():
            draw, *_ = self._sharing.draws(group, group["step"], sharpness_of(group))
            judged: list[Draw] = []
            change = changes[id(group)]
            if change is not None:
                _, *judged = self._sharing.draws(group, group["step"] - 1, group["drawn_sharpness"])
            if isinstance(masked, LeanWeight):
                masked.advance(draw, change, fusion)
            else:
                masked.advance(draw, change, together, judged)
        together.finish()
        for group in self.param_groups:
            group["drawn_sharpness"] = sharpness_of(group)
        self._holds = "drawn"
        self._learned.clear()
        self._passes = 0
        if _log.isEnabledFor(logging.DEBUG):
            self._sharing.refuse_drift(self.logits().values())
