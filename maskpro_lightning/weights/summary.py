"""The table at the start of a fit: which weights get a mask, which do not, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed import get_rank, is_available, is_initialized

from maskpro_lightning.masks.pattern import NMPattern
from maskpro_lightning.weights.contractions import observe
from maskpro_lightning.weights.reasons import UNKNOWN, unfit
from maskpro_lightning.weights.targets import LeftOut, Selection, count
from maskpro_lightning.weights.verification import Verdict, verify

# The most names in a row, and in a remark below the table.
_NAMES, _TOLD = 2, 5
# The share of the model from which on a weight is large.
_LARGE = 0.01
_COLUMNS = ("", "weights", "numbers", "share", "such as")
# Characters that names have, however narrow the terminal is.
_NARROWEST = 24


@dataclass(frozen=True)
class Row:
    """Some weights of a model.

    Attributes:
        what: "masked", or why they are not.
        weights: The number of weights.
        numbers: The number of their elements.
        share: These as a share of the model's, 0 to 1.
        names: The largest of the weights, and how many more there are.
    """

    what: str
    weights: int
    numbers: int
    share: float
    names: str

    def cells(self) -> tuple[str, ...]:
        """The row as texts."""
        return self.what, f"{self.weights:,}", f"{self.numbers:,}", f"{self.share:.1%}", self.names


def announce(
    model: nn.Module, selection: Selection, pattern: NMPattern, run: Callable[[], object]
) -> None:
    """Watch a forward pass, refuse masks that products would not see, and print the table.

    Args:
        model: The model.
        selection: Its weights, masked and left out.
        pattern: The pattern of the masks.
        run: Runs the model on a batch.

    Raises:
        ValueError: see :func:`verify`.
    """
    with observe(model) as seen:
        run()
    show(model, selection, pattern, verify(selection, seen))


def show(
    model: nn.Module, selection: Selection, pattern: NMPattern, verdict: Verdict | None = None
) -> None:
    """Print the table of a selection, on the first rank only; with rich where it is installed.

    Args:
        model: The model.
        selection: Its weights, masked and left out.
        pattern: The pattern of the masks.
        verdict: What :func:`verify` found, if a forward pass was watched.
    """
    if is_available() and is_initialized() and get_rank() != 0:
        return
    title = f"{pattern} masks of {type(model).__name__}"
    found = rows(model, selection)
    notes = list(remarks(model, selection, pattern, verdict))
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("\n".join([title, *_aligned([_COLUMNS, *(row.cells() for row in found)]), *notes]))
        return
    console = Console()
    table = Table(title=title, title_justify="left")
    for name in _COLUMNS[:4]:
        table.add_column(name, justify="right" if name else "left")
    cells = [_COLUMNS, *(row.cells() for row in found)]
    numbers = sum(max(len(each[place]) for each in cells) for place in (1, 2, 3))
    room = max(_NARROWEST, console.width - numbers - 13)  # borders and spaces between columns
    for row in found:
        first = Text(f"{row.what}\n").append("\n".join(_fitting(row.names, room)), "dim")
        table.add_row(first, *row.cells()[1:4], style="bold" if row is found[0] else None)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def rows(model: nn.Module, selection: Selection) -> list[Row]:
    """All of a model: the masked weights, those left out, by reason, and the vectors."""
    masked, total = count(model, selection.targets)
    targets = sorted(selection.targets, key=lambda target: -target.shape.numel())
    names = _named([target.name for target in targets])
    found = [Row("masked", len(targets), masked, masked / total, names)]
    together: dict[str, list[LeftOut]] = {}
    for each in sorted(selection.left_out, key=lambda each: -each.numbers):
        together.setdefault(each.reason, []).append(each)
    for reason, some in together.items():
        numbers, names = sum(each.numbers for each in some), _named([each.name for each in some])
        found.append(Row(f"left out: {reason}", len(some), numbers, numbers / total, names))
    found[1:] = sorted(found[1:], key=lambda row: -row.numbers)
    rest = sum(1 for _ in model.parameters()) - sum(row.weights for row in found)
    if rest:
        numbers = total - sum(row.numbers for row in found)
        found.append(Row("vectors", rest, numbers, numbers / total, "biases, norms"))
    return found


def remarks(
    model: nn.Module, selection: Selection, pattern: NMPattern, verdict: Verdict | None
) -> Iterator[str]:
    """Sentences below the table: what the forward pass has shown."""
    if verdict is None:
        return
    _, total = count(model, selection.targets)
    large = [pair for pair in verdict.unmasked if pair[0].numbers >= _LARGE * total]
    if large:
        told = [f"{each.name} ({each.numbers / total:.1%}) {each.reason}" for each, _ in large]
        yield f"Large weights that are multiplied without a mask: {_named(told, _TOLD, '; ')}."
    fitting = [f'"{each.name}:{dim}"' for each, dim in large if _can_be_masked(each, dim, pattern)]
    if fitting:
        yield f"To mask them, too: include=[{', '.join(fitting[:_TOLD])}]."
    if verdict.idle:
        names = _named([target.name for target in verdict.idle], _TOLD)
        yield f"Masked, but in no product of the first batch: {names}."
    if verdict.unobserved:
        yield (
            f"The products of {len(verdict.unobserved)} masked weights were not observed, as they "
            f"are sharded."
        )


def _can_be_masked(each: LeftOut, dim: int | None, pattern: NMPattern) -> bool:
    if dim is None or each.reason != UNKNOWN:
        return False
    return unfit(each.parameter, each.parameter.shape, dim, 1, pattern) is None


def _named(names: Sequence[str], most: int = _NAMES, comma: str = ", ") -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return comma.join(names[:most]) + more


def _fitting(names: str, room: int) -> list[str]:
    """Names on lines of so many characters, by their ends, which tell them apart."""
    lines = [names] if len(names) <= room else names.split(", ")
    return [
        line if len(line) <= room else f"\N{HORIZONTAL ELLIPSIS}{line[1 - room :]}"
        for line in lines
    ]


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[place]) for line in lines) for place in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.rjust(width) if 0 < place < 4 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
