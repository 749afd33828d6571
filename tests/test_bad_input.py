"""Every input that is refused, and what the user reads: the thing, the rule, the remedy."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from modules import Net, fit, same_weights
from rules import mask_callback, mask_optimizer
from torch import Tensor, nn
from torch.nn.utils import prune

from maskpro_lightning import NMPattern, find_targets, save_masks

Call = Callable[[Path], Any]
Edit = Callable[[dict[str, Any]], Any]
Case = tuple[str, Call, type[Exception], str]
CASES: list[Case] = []


def add(name: str, call: Call, error: type[Exception], message: str) -> None:
    CASES.append((name, call, error, message))


# --- patterns -----------------------------------------------------------------------------------

for n, m in [(4, 2), (2, 0), (0, 4), (4, 4)]:
    add(
        f"pattern {n}:{m}",
        lambda _, n=n, m=m: mask_callback(f"{n}:{m}"),
        ValueError,
        f"The pattern {n}:{m} keeps {n} of every {m} weights, but 1 <= N < M must hold: write "
        f'"2:4" to keep two of four.',
    )
for text in ["", "2/4", "a:b", "2:4:8", "-1:4", "2.0:4", "9999999999:4"]:
    add(
        f"pattern {text!r}",
        lambda _, text=text: mask_callback(text),
        ValueError,
        f"{text!r} is not an N:M pattern: write kept weights, a colon and the group size, such as "
        f'"2:4".',
    )
add(
    "pattern 2",  # 2:4 without quotes in YAML is the number 124, which is taken apart again
    lambda _: mask_callback(2),
    ValueError,
    "2 is not an N:M pattern: write kept weights, a colon and the group size, in quotes, such as "
    '"2:4".',
)
for thing in [None, (2, 4)]:
    add(
        f"pattern {thing!r}",
        lambda _, thing=thing: mask_callback(thing),
        TypeError,
        f'A pattern is a string like "2:4", got {thing!r}.',
    )
for thing in [2.0, True]:
    add(
        f"NMPattern({thing}, 4)",
        lambda _, thing=thing: NMPattern(thing, 4),
        TypeError,
        f"n of an N:M pattern must be an int, got {thing}.",
    )


# --- the rule -----------------------------------------------------------------------------------


def with_rule(name: str, value: Any) -> Call:
    return lambda _: mask_callback(**{name: value})


NAN, INFINITE = float("nan"), float("inf")
for name, values in {
    "lr": (0.0, -1.0, NAN, INFINITE, 2e6),
    "logit_scale": (0.0, -4.0, NAN),
}.items():
    for value in values:
        message = f"{name} is {value}, but 0 < {name} <= 1e+06 must hold."
        add(f"{name} {value}", with_rule(name, value), ValueError, message)
for value in (1.0, -0.1, NAN):
    message = f"momentum is {value}, but 0 <= momentum < 1 must hold."
    add(f"momentum {value}", with_rule("momentum", value), ValueError, message)
for name in ("lr", "momentum"):
    message = f"{name} is '1', but it must be a number."
    add(f"{name} as text", with_rule(name, "1"), TypeError, message)
add("seed 1.5", with_rule("seed", 1.5), TypeError, "seed is 1.5, but it must be an int.")
add(
    "estimator",
    with_rule("estimator", "adam"),
    ValueError,
    "estimator is one of straight_through, policy; got 'adam'.",
)
for method in ("largest", ""):
    add(
        f"init {method!r}",
        with_rule("init", method),
        ValueError,
        f"init is one of magnitude, wanda, sparsegpt, reconstruction, random, nonzeros, a "
        f".safetensors file of masks, or masks by parameter name; got {method!r}.",
    )
for name, least in {"calibration_batches": 1, "baseline_cache": 0}.items():
    message = f"{name} is {least - 1}, but {name} >= {least} must hold."
    add(name, with_rule(name, least - 1), ValueError, message)
add(
    "on_logger_error",
    with_rule("on_logger_error", "ignore"),
    ValueError,
    "on_logger_error is one of raise, warn; got 'ignore'.",
)


# --- layers -------------------------------------------------------------------------------------


def chosen(net: Callable[[], nn.Module] = Net, pattern: str = "2:4", **globs: Any) -> Call:
    return lambda _: find_targets(net(), pattern, **globs)


def holding(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A Net whose first weight is another kind of tensor."""

    def make() -> nn.Module:
        net = Net()
        weight = change(net.net[0].weight.detach())
        net.net[0].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        return net

    return make


def pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.net[0], "weight", 0.5)
    return net


for argument in ("include", "exclude"):
    message = f'{argument} is a list of globs: write {argument}=["net.0"].'
    add(f"{argument} as text", chosen(**{argument: "net.0"}), TypeError, message)
    message = "'nat*' matches no layer or parameter of Net; the nearest is 'net*'."
    add(f"{argument} that is idle", chosen(**{argument: ["nat*"]}), ValueError, message)
LEFT = "No layer of {} is left to mask: {}. Choose another pattern, include or exclude."
add(
    "everything excluded",
    chosen(exclude=["*"]),
    ValueError,
    LEFT.format("Net", "'net.0.weight' is excluded"),
)
add(
    "nothing included",
    chosen(include=[]),
    ValueError,
    LEFT.format("Net", "'net.0.weight' is not included"),
)
add(
    "no layers",
    chosen(lambda: nn.Embedding(4, 4)),
    ValueError,
    LEFT.format("Embedding", "'weight' is an embedding"),
)
add(
    "indivisible",
    chosen(pattern="2:32"),
    ValueError,
    LEFT.format("Net", "'net.0.weight' has 16 inputs, not a multiple of 32"),
)
UNFIT = (
    "1 of the included weights cannot be masked: 'net.0.weight' {}. Leave them out with "
    'exclude=["net.0"].'
)
for name, kind, change in [
    ("int8", torch.int8, lambda w: w.to(torch.int8)),
    ("complex", torch.complex64, lambda w: w.to(torch.complex64)),
    ("float8", torch.float8_e4m3fn, lambda w: w.to(torch.float8_e4m3fn)),
    ("sparse", torch.sparse_coo, lambda w: w.to_sparse()),
]:
    reason = f"holds {kind} numbers, not dense floating-point ones of 16 bits or more"
    add(
        f"{name} weights",
        chosen(holding(change), include=["net.0"]),
        ValueError,
        UNFIT.format(reason),
    )
add(
    "meta weights",
    chosen(holding(lambda w: w.to("meta"))),
    ValueError,
    "'net.0.weight' is on the meta device, without values (1 of 2 weights): load the weights "
    "before masking.",
)
add(
    "pruned by torch",
    chosen(pruned, include=["net.0"]),
    ValueError,
    UNFIT.format("is computed from other parameters (weight_norm or another parametrization)"),
)


# --- weights of an optimizer --------------------------------------------------------------------


def weight(*shape: int, **kwargs: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, **kwargs))


def optimizer(*params: Any, **kwargs: Any) -> Call:
    return lambda _: mask_optimizer(list(params), **kwargs)


def stepped(loss: Any) -> Call:
    return lambda _: mask_optimizer([("w", weight(4, 4))]).step(lambda: loss)


SHARED = weight(4, 4)
TWICE = "{!r} is given twice, first as {!r}: give each weight once, under a name of its own."
add(
    "two weights of a name",
    optimizer(("w", weight(4, 4)), ("w", weight(4, 4))),
    ValueError,
    TWICE.format("w", "w"),
)
add(
    "a weight with two names",
    optimizer({"params": [("v", SHARED)]}, {"params": [("w", SHARED)], "lr": 1.0}),
    ValueError,
    "some parameters appear in more than one parameter group",  # by torch
)
for shape, dim in [((), -1), ((4, 4), 5), ((0, 4), -1)]:
    add(
        f"a weight of shape {shape}",
        optimizer({"params": [("w", weight(*shape))], "input_dim": dim}),
        ValueError,
        f"'w' has shape {shape}, without groups of weights along input_dim={dim}: leave it out or "
        f"give its own input_dim.",
    )
add(
    "inputs that M does not divide",
    optimizer(("w", weight(4, 6))),
    ValueError,
    "'w' has 6 input features, not a multiple of 4 (pattern 2:4): leave it out or choose another "
    "pattern.",
)
add(
    "integers",
    optimizer(("w", torch.ones(4, 4, dtype=torch.int8))),
    ValueError,
    "'w' holds torch.int8 numbers; masks need dense floating-point weights of at least 16 bits: "
    "leave it out or load the model unquantised.",
)
add(
    "meta device",
    optimizer(("w", weight(4, 4, device="meta"))),
    ValueError,
    "'w' is on the meta device, without values: load the weights before masking.",
)
add(
    "lr of a group",
    optimizer({"params": [weight(4, 4)], "lr": 0.0}),
    ValueError,
    "lr is 0.0, but 0 < lr <= 1e+06 must hold.",
)


def stepped_with(size: float) -> Call:
    """What a fit asks of weights, of which some are not finite, before its first step."""

    def run(_: Path) -> None:
        weights = {name: weight(4, 4) for name in ("net.0.weight", "net.2.weight")}
        weights["net.0.weight"].data[1] = size
        mask_optimizer(weights.items()).refuse_not_finite()

    return run


NO_LOSS = "The closure returned {}, but a loss is a tensor of one number."
for loss, what in [(None, "NoneType"), (1.0, "float"), (torch.ones(3), "shape (3,)")]:
    add(f"a loss that is {what}", stepped(loss), TypeError, NO_LOSS.format(what))

add(
    "a loss that is learned from by itself",
    lambda _: mask_optimizer([("w", weight(4, 4))]).learn(None),
    TypeError,
    "The loss is NoneType, but a loss is a tensor of one number.",
)
for size in (NAN, INFINITE):
    add(
        f"a weight that holds {size}",
        stepped_with(size),
        ValueError,
        "'net.0.weight' holds 4 numbers that are NaN or infinite: load the weights again, or leave "
        'it out with exclude=["net.0"].',
    )


def raised_lr(_: Path) -> None:
    made = mask_optimizer([("w", weight(4, 4))])
    made.begin()
    made.param_groups[0]["lr"] = NAN
    made.step(lambda: torch.tensor(1.0))


add(
    "a scheduler that goes astray",
    raised_lr,
    ValueError,
    "The learning rate is nan at step 0: a scheduler has to keep it in [0, 1e+06].",
)


# --- initial masks ------------------------------------------------------------------------------


def started(init: Any, module: pl.LightningModule | None = None, **kwargs: Any) -> Call:
    return lambda folder: fit(
        module or Net(), mask_callback(init=init, **kwargs), folder=folder, max_steps=1
    )


def masks(edit: Edit = lambda masks: None) -> dict[str, Any]:
    made = mask_optimizer(
        [(target.name, target.parameter) for target in find_targets(Net(), "2:4")]
    )
    made.begin()
    found: dict[str, Any] = made.masks()
    edit(found)
    return found


def from_file(edit: Edit, **kwargs: Any) -> Call:
    def call(folder: Path) -> None:
        save_masks(masks(edit), NMPattern(2, 4), folder / "masks.safetensors")
        started(folder / "masks.safetensors", **kwargs)(folder)

    return call


FIRST = "net.0.weight"
MISSING = (
    "There is no initial mask for 'net.0.weight' among 1 masks: give one for every weight, or "
    "leave the weight out."
)
EXTRA = (
    "There are masks of unknown weights, ['other']: those of this model are named like "
    "'net.0.weight'."
)
SHAPE = (
    "The mask of 'net.0.weight' has shape (8, 16), but the weight has shape (16, 16): give a mask "
    "in the shape of the whole weight."
)
FULL = (
    "the mask of 'net.0.weight' is not 2:4: group 0 keeps 4 of 4 weights (4 of 64 groups are "
    "wrong)."
)
for name, edit, message in [
    ("missing", lambda m: m.pop(FIRST), MISSING),
    ("extra", lambda m: m.update(other=m[FIRST]), EXTRA),
    ("shape", lambda m: m.update({FIRST: m[FIRST][:8]}), SHAPE),
    ("not 2:4", lambda m: m[FIRST][0].fill_(value=True), FULL),
]:
    add(f"masks: {name}", started(masks(edit)), ValueError, message)
    if name != "not 2:4":  # of which no file can be written
        add(f"mask file: {name}", from_file(edit), ValueError, message)
add(
    "masks: numbers",
    started(masks(lambda m: m.update({FIRST: m[FIRST].float()}))),
    TypeError,
    "the mask of 'net.0.weight' must be a bool tensor, got torch.float32.",
)
add(
    "masks: lists",
    started({FIRST: [[True]], "net.2.weight": [[True]]}),
    TypeError,
    "The mask of 'net.0.weight' is a list, not a bool tensor.",
)


# --- trainers and modules -----------------------------------------------------------------------


class VectorLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.ones(3)


class WithoutGradient(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch).detach()


add(
    "a training_step that returns a vector",
    started("magnitude", VectorLoss()),
    TypeError,
    "training_step returned shape (3,), but a loss is a tensor of one number.",
)
add(
    "a loss without a gradient",
    started("magnitude", WithoutGradient(), estimator="straight_through"),
    RuntimeError,
    "The loss of WithoutGradient has no gradient, which estimator='straight_through' learns from: "
    "choose estimator='policy'.",
)


# --- checkpoints --------------------------------------------------------------------------------


@functools.cache
def checkpoint() -> dict[str, Any]:
    """What a fit of one step saved."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = fit(Net(), mask_callback(), folder=Path(folder), max_steps=1)
        trainer.save_checkpoint(Path(folder, "a.ckpt"))
        found: dict[str, Any] = torch.load(Path(folder, "a.ckpt"), weights_only=True)
        return found


def resumed(edit: Edit = lambda saved: None, pattern: str = "2:4", **kwargs: Any) -> Call:
    def call(folder: Path) -> None:
        saved = copy.deepcopy(checkpoint())
        edit(saved)
        torch.save(saved, folder / "edited.ckpt")
        callback = mask_callback(pattern, **kwargs)
        path = folder / "edited.ckpt"
        fit(Net(), callback, folder=folder, ckpt_path=path, max_steps=2)

    return call


def ours(saved: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = saved["callbacks"]["MaskProCallback"]
    return found


def group(saved: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = saved["optimizer_states"][0]["param_groups"][0]
    return found


def states(saved: dict[str, Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = saved["optimizer_states"][0]["state"]
    return found


def state(saved: dict[str, Any]) -> dict[str, Any]:
    return states(saved)[0]


OTHER = (
    "The saved masks belong to another model, pattern or estimator: {} there and {} here. Go on "
    "with what they were made with, or start anew."
)
DAMAGED = "This is no whole state of MaskPro, or a damaged one: {}. Resume from another checkpoint."
add(
    "resumed: pattern",
    resumed(pattern="1:4"),
    ValueError,
    OTHER.format("pattern is '2:4'", "'1:4'"),
)
add(
    "resumed: estimator",
    resumed(estimator="straight_through"),
    ValueError,
    OTHER.format("estimator is 'policy'", "'straight_through'"),
)
add(
    "resumed: layers",
    resumed(exclude=["net.0"]),
    ValueError,
    OTHER.format("param_names is a list of 2", "one of 1"),
)
add(
    "resumed: names",
    resumed(lambda s: group(s).update(param_names=["net.0.weight", "head.weight"])),
    ValueError,
    OTHER.format("param_names is 'head.weight'", "'net.2.weight'"),
)
add(
    "resumed: newer",
    resumed(lambda s: ours(s).update(format=99)),
    ValueError,
    "This checkpoint holds format 99 of MaskProCallback, and this version reads up to 2: pip "
    "install --upgrade maskpro-lightning.",
)
add(
    "resumed: no baselines",
    resumed(lambda s: ours(s).pop("baselines")),
    ValueError,
    "What this checkpoint holds of MaskProCallback is damaged (KeyError('baselines')): resume from "
    "another one.",
)
add(
    "resumed: shape",
    resumed(lambda s: state(s).update(logits=torch.zeros(8, 16))),
    ValueError,
    "The saved masks belong to another model: 'net.0.weight' has shape (8, 16) there and (16, 16) "
    "here.",
)
NOT_FINITE = "the logits of 'net.0.weight' are not all below 1e+20"
NUMBERS = "'net.0.weight' has torch.float32, torch.float32 and torch.float32"
PARTS = "the state of 'net.0.weight' is not dense, logits, masks"
for name, edit, reason in [
    ("logits", lambda s: state(s)["logits"].fill_(NAN), NOT_FINITE),
    ("dtypes", lambda s: state(s).update(masks=torch.zeros(16, 16)), NUMBERS),
    ("state", lambda s: state(s).pop("dense"), PARTS),
    ("half", lambda s: states(s).pop(0), "it holds masks of 1 weights instead of 2"),
    ("lr", lambda s: group(s).update(lr=NAN), "lr is nan"),
    ("step", lambda s: group(s).update(step=-1), "step is -1"),
    ("tracker", lambda s: group(s).update(delta=torch.tensor(NAN)), "delta is tensor(nan)"),
    ("kind", lambda s: group(s).update(tracker_momentum="0.9"), "tracker_momentum is '0.9'"),
    ("lack", lambda s: group(s).pop("seed"), "seed is None"),
]:
    add(f"resumed: damaged {name}", resumed(edit), ValueError, DAMAGED.format(reason))
add(
    "resumed: damaged masks",
    resumed(lambda s: state(s)["masks"].fill_(3)),
    ValueError,
    "the saved initial mask of 'net.0.weight' is not 2:4: group 0 keeps 4 of 4 weights (64 of 64 "
    "groups are wrong).",
)


# --- the test -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"), [pytest.param(*case, id=name) for name, *case in CASES]
)
def test_it_is_refused_with_a_message(
    call: Call, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as info:
        call(tmp_path)
    assert type(info.value) is error
    assert str(info.value) == message


def test_no_message_is_tried_for_less_than_sixty_inputs() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 60


def test_two_optimizers_are_no_matter_since_neither_is_used(tmp_path: Path) -> None:
    class Two(Net):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in self.net[::2]]

    callback = mask_callback()
    fit(Two(), callback, folder=tmp_path, max_steps=1)
    assert callback.optimizer is not None


def test_nothing_is_touched_by_a_checkpoint_that_is_refused(tmp_path: Path) -> None:
    module = Net()
    made = mask_optimizer([(t.name, t.parameter) for t in find_targets(module, "2:4")])
    saved = copy.deepcopy(checkpoint()["optimizer_states"][0])
    saved["state"][1]["logits"].fill_(NAN)
    with pytest.raises(ValueError, match=r"logits of 'net\.2\.weight' are not all below 1e\+20"):
        made.load_state_dict(saved)
    assert not made.begun
    assert same_weights(module, Net())
