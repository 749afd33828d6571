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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from maskpro_lightning import initializers, tracker
from maskpro_lightning.fusion import Fusion
from maskpro_lightning.lean_weight import Held, LeanWeight, loaded
from maskpro_lightning.masked_weight import Draw, Groups, MaskedWeight, Version
from maskpro_lightning.pattern import NMPattern

Estimator = Literal["policy", "straight_through"]
Memory = Literal["plain", "lean"]
LogitsDtype = Literal["float32", "bfloat16"]

#: Step size, initial logit and final sharpness by estimator, where they are not given.
DEFAULTS: dict[Estimator, dict[str, float]] = {
    "policy": {"lr": 0.1, "logit_scale": 4.0, "sharpness": 1.0},
    "straight_through": {"lr": 0.1, "logit_scale": 3.0, "sharpness": 4.0},
}


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
            and gets further on the same compute, for patterns with N <= 2.
        lr: Step size of the logits, in units of logits; ``DEFAULTS`` holds what applies to each
            estimator where this, ``logit_scale`` or ``sharpness`` is None.
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
        fused: Compile the step of the masks (patterns with N <= 2) into one loop over the weights,
            several times as fast: True or False, or None for where there is a compiler and enough
            weights to win back the time that compiling takes.
        memory: "plain" keeps a dense copy of each weight, "lean" what the weight's mask leaves out.
            Both learn the same, and load each other's checkpoints.
        logits_dtype: "bfloat16" saves 2 bytes a weight; logits are then rounded up or down at
            random, so that small steps count on average.

    Raises:
        ValueError: an argument out of range, an unknown pattern, or a weight that M does not
            divide.
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
        fused: bool | None = None,
        memory: Memory = "plain",
        logits_dtype: LogitsDtype = "float32",
    ) -> None:
        if estimator not in DEFAULTS:
            raise ValueError(f"estimator is one of {', '.join(DEFAULTS)}; got {estimator!r}.")
        if memory not in get_args(Memory):
            raise ValueError(f"memory is one of {', '.join(get_args(Memory))}; got {memory!r}.")
        lr = DEFAULTS[estimator]["lr"] if lr is None else lr
        logit_scale = DEFAULTS[estimator]["logit_scale"] if logit_scale is None else logit_scale
        sharpness = DEFAULTS[estimator]["sharpness"] if sharpness is None else sharpness
        for name, value, holds, rule in (
            ("lr", lr, lr > 0, "lr > 0"),
            ("logit_scale", logit_scale, logit_scale > 0, "logit_scale > 0"),
            ("sharpness", sharpness, sharpness > 0, "sharpness > 0"),
            ("momentum", momentum, 0 <= momentum < 1, "0 <= momentum < 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}, but {rule} must hold.")
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
            "step": 0,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            # The tracker of residuals; every group holds the same, since there is one loss.
            group.update(tracker.new())
            group["initial_lr"] = group["lr"]
        for group, name, parameter in self._parameters():
            pattern, inputs = NMPattern.parse(group["pattern"]), parameter.shape[group["input_dim"]]
            if group["estimator"] == "straight_through" and pattern.n > 2:
                raise ValueError(
                    f"The estimator 'straight_through' learns patterns that keep 1 or 2 of a "
                    f"group, not {pattern}: choose estimator='policy'."
                )
            if inputs % pattern.m:
                raise ValueError(
                    f"{name!r} has {inputs} input features, not a multiple of {pattern.m} "
                    f"(pattern {pattern})."
                )
        self._fusion = Fusion(
            fused, [(p, NMPattern.parse(group["pattern"])) for group, _, p in self._parameters()]
        )
        if logits_dtype not in get_args(LogitsDtype):
            rule = ", ".join(get_args(LogitsDtype))
            raise ValueError(f"logits_dtype is one of {rule}; got {logits_dtype!r}.")
        self._memory = memory
        self._logits_dtype: torch.dtype = getattr(torch, logits_dtype)
        # What the weights hold, or should, where a change was interrupted.
        self._holds: Version = "dense"
        self._changing = False
        self._held: dict[Tensor, Held] = {}
        #: Loss, baseline, residual and advantage of the last step, scalars.
        self.last: dict[str, Tensor] = {}

    @property
    def begun(self) -> bool:
        """Whether the parameters are masked and the dense weights kept in the state."""
        return bool(self.state)

    @torch.no_grad()
    def begin(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Keep the dense weights, start the logits from the initial masks and draw the first.

        Args:
            masks: Initial masks by parameter name, bool, shaped like the weights, exactly N of
                every M; without them the largest weights are kept.

        Raises:
            RuntimeError: begun already.
            ValueError: a mask is missing, has another shape, or breaks the pattern.
        """
        if self.begun:
            raise RuntimeError("The masks have begun already: make a new MaskPro to start over.")
        known = {name for _, name, _ in self._parameters()}
        unknown = sorted(set(masks or ()) - known)
        if unknown:
            raise ValueError(f"There are masks of unknown weights: {unknown[:3]}.")
        initial = {}
        for group, name, parameter in self._parameters():
            pattern, input_dim = NMPattern.parse(group["pattern"]), group["input_dim"]
            if masks is None:
                mask = initializers.magnitude(parameter, pattern, input_dim)
            else:
                mask = _mask_of(name, parameter, masks)
            pattern.check(mask, input_dim, f"the mask of {name!r}")
            initial[name] = mask
        for group, name, parameter in self._parameters():
            mask, scale = initial.pop(name), group["logit_scale"]
            if self._memory == "lean":
                pattern = NMPattern.parse(group["pattern"])
                about = self._logits_dtype, pattern, group["input_dim"]
                state = LeanWeight.state(parameter, mask, scale, *about)
                self._held[parameter] = Held()
            else:
                state = MaskedWeight.state(parameter, mask, scale, self._logits_dtype)
            self.state[parameter] = state
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
            if all(parameter.grad is None for _, _, parameter in self._parameters()):
                raise RuntimeError(
                    "No gradient has reached any masked weight: the closure has to call "
                    "loss.backward(), and weights need requires_grad=True and a part in the loss."
                )
            self.last = {"loss": loss.detach()}
            self._draw(learn=True)
            return loss
        if baseline is None:
            with self.applied("initial"), torch.random.fork_rng(self._cuda_devices()):
                baseline = closure()
        self.write("drawn")
        loss = closure()
        residual = loss.detach().float() - baseline.detach().float()
        first = self.param_groups[0]
        advantage, judged = tracker.judge(
            self.tracker, residual, first["momentum"], normalize=first["normalize"]
        )
        for group in self.param_groups:
            group.update(judged)
        self.last = {
            "loss": loss.detach(),
            "baseline": baseline.detach(),
            "residual": residual,
            "advantage": advantage,
        }
        self._draw(advantage, learn=True)
        return loss

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
        if not self.begun or (version == self._holds and not self._changing):
            return
        self._changing, self._holds = True, version
        for _, masked in self._masked_weights():
            masked.write(version)
        self._changing = False

    @contextmanager
    def applied(self, version: Version) -> Iterator[None]:
        """Write a version into the parameters for the duration of a ``with`` block."""
        before = self._holds
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
        return {masked.name: masked.mask(version) for _, masked in self._masked_weights()}

    def logits(self) -> dict[str, Tensor]:
        """The logits by parameter name, shaped like the weights; not copies."""
        return {name: self.state[parameter]["logits"] for _, name, parameter in self._parameters()}

    @torch.no_grad()
    def groups(self) -> Iterator[Groups]:
        """Go through all groups in blocks, for statistics."""
        for group, masked in self._masked_weights():
            yield from masked.groups(_sharpness(group))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, alike for each ``memory``: for "lean" it holds a dense copy of the weights."""
        saved = super().state_dict()
        if self._memory == "lean" and self.begun:
            order = chain.from_iterable(group["params"] for group in saved["param_groups"])
            for key, (_, masked) in zip(order, self._masked_weights(), strict=True):
                assert isinstance(masked, LeanWeight)
                saved["state"][key] = masked.saved()
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; the parameters then hold the drawn mask of that state.

        Raises:
            ValueError: the state belongs to other weights or another pattern.
        """
        self._check_state(state_dict)
        self.write("dense")  # what is begun here ends here
        super().load_state_dict(state_dict)
        # The base class casts what it loads to the parameter's dtype; logits and masks have theirs.
        order = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, (group, _, parameter) in zip(order, self._parameters(), strict=True):
            saved = {
                name: value.detach().to(parameter.device).clone()
                for name, value in state_dict["state"].get(key, {}).items()
            }
            if saved:
                saved["logits"] = saved["logits"].to(self._logits_dtype)
                self.state[parameter] = self._unpacked(group, parameter, saved)
        self._holds = "dense"
        self.write("drawn")

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

    def _masked_weights(self) -> Iterator[tuple[dict[str, Any], MaskedWeight | LeanWeight]]:
        for group, name, parameter in self._parameters():
            about = name, NMPattern.parse(group["pattern"]), group["input_dim"], parameter
            state = self.state[parameter]
            if self._memory == "lean":
                yield group, LeanWeight(*about, **state, held=self._held[parameter])
            else:
                yield group, MaskedWeight(*about, **state)

    def _unpacked(
        self, group: dict[str, Any], parameter: Tensor, saved: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state of a weight, which is made to hold the dense version, from a saved one."""
        if self._memory == "plain":
            return {name: value for name, value in saved.items() if name != "redrawn"}
        parameter.copy_(saved["dense"])
        self._held[parameter] = Held()
        return loaded(saved, NMPattern.parse(group["pattern"]), group["input_dim"])

    def _cuda_devices(self) -> list[torch.device]:
        return list({p.device for _, _, p in self._parameters() if p.device.type == "cuda"})

    def _draw(self, advantage: Tensor | None = None, *, learn: bool = False) -> None:
        """Move the logits, by an advantage or by gradients, then draw the next masks."""
        for group in self.param_groups:
            group["step"] += learn
        self._changing, self._holds = True, "drawn"
        for group, masked in self._masked_weights():
            draw = Draw(group["seed"], group["step"], _sharpness(group))
            change = direction = None
            if advantage is not None:
                change = group["lr"] * advantage
            elif learn and masked.weight.grad is not None:
                direction = masked.direction(masked.weight.grad, draw.sharpness).mul_(group["lr"])
            masked.advance(draw, change, direction, self._fusion)
            masked.weight.grad = None
        self._changing = False

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        for key in ("param_names", "pattern", "input_dim"):
            saved = [group.get(key) for group in saved_groups]
            own = [group.get(key) for group in self.param_groups]
            if saved != own:
                raise ValueError(
                    f"The saved masks belong to another model or pattern: {key} is {saved} there "
                    f"and {own} here."
                )
        order = chain.from_iterable(group["params"] for group in saved_groups)
        for key, (_, name, parameter) in zip(order, self._parameters(), strict=True):
            state = state_dict["state"].get(key, {})
            if state and state["logits"].shape != parameter.shape:
                raise ValueError(
                    f"The saved masks belong to another model: {name!r} has shape "
                    f"{tuple(state['logits'].shape)} there and {tuple(parameter.shape)} here."
                )


def _mask_of(name: str, parameter: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    if name not in masks:
        raise ValueError(f"There is no initial mask for {name!r} among {len(masks)} masks.")
    if masks[name].shape != parameter.shape:
        raise ValueError(
            f"The mask of {name!r} has shape {tuple(masks[name].shape)}, the weight "
            f"{tuple(parameter.shape)}."
        )
    return masks[name]


def _sharpness(group: dict[str, Any]) -> float:
    """1 at the start, the group's sharpness once a scheduler has taken ``lr`` to 0."""
    done = 1 - min(1, group["lr"] / group["initial_lr"])  # a warm-up may go above
    sharpness: float = 1 + (group["sharpness"] - 1) * done
    return sharpness
